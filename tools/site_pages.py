"""Pages of the site that live beside the code: cards of shipped files, and what a repository has at its root.

A hook of `mkdocs.yml`. Links between these files and `docs/` are written as they hold in the repository, and changed
here to what they are on the site.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
} | {
    f"bdense_core/assets/{folder.name}/CARD.md": f"card-{folder.name}.md"
    for folder in sorted((ROOT / "bdense_core" / "assets").iterdir())
    if (folder / "CARD.md").is_file()
}
"""Files of the repository, and what they are called on the site."""


def on_files(files: Files, config: Any, **_kwargs: object) -> Files:
    """Add the pages to those of `docs/`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_kwargs: object) -> str:
    """A page with its links as they are on the site."""
    is_outside = page.file.src_uri in PAGES.values()
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
        if is_outside:
            markdown = markdown.replace(f"]({source})", f"]({name})")
    return markdown.replace("](docs/", "](") if is_outside else markdown
