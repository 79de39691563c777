"""The report of a study: one HTML page that needs nothing else, and the same as Markdown with PNG files."""
