"""`python search/launch_study.py`: the door to `bdense-weights launch`."""

import sys
from pathlib import Path


def _main() -> None:
    # Run as a script, Python puts this folder first on the import path; the package is one above.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [root, *(entry for entry in sys.path if entry != str(Path(__file__).resolve().parent))]
    from search.cli import launch, main

    main(command=launch, prog_name="python search/launch_study.py")


if __name__ == "__main__":
    _main()
