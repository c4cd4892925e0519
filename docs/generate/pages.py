"""What `make docs` builds beside the files of docs/: pages made of the code, and pages that lie at the top.

mkdocs calls the functions `on_...` (see mkdocs.yml).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[2]
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
}


def on_config(config: MkDocsConfig) -> None:
    """Put every page of results into the menu, by name: a new one needs no line there."""
    pages = sorted(path.name for path in Path(config.docs_dir, "results").glob("*.md"))
    for entry in config.nav or []:
        if entry.get("Results") == "results/":
            entry["Results"] = sorted((f"results/{name}" for name in pages), key=lambda name: "index" not in name)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that no file in docs/ holds."""
    for name, text in top_pages().items():
        files.append(File.generated(config, name, content=text))
    for name, write in reference.PAGES.items():
        files.append(File.generated(config, name, content=write()))


def top_pages() -> dict[str, str]:
    """The files at the top of the project as pages: links to docs/ lead to its pages, those among them too."""
    made = {}
    for source, name in TOP.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        made[name] = re.sub(r"\]\(([A-Z]+\.md)", lambda found: f"]({TOP[found[1]]}", text)
    return made
