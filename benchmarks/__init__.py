"""Speed, as ratios against a baseline in the same run. `python -m benchmarks.NAME`; figures in README.md."""
