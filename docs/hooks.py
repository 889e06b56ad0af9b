"""What the site takes from the repository as it stands."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

# Pages outside of docs/. They and the files that they link to keep their paths, so that one link is
# right in the repository and on the site.
PAGES = (
    "README.md",
    "kernels/README.md",
    "shaped_attn/sde/covariance-sde.md",
    "shaped_attn/nn/papers.md",
    "bench/NOTES.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)


def linked_files(page):
    """Paths of the files that a page shows or links to, pages excepted."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?![a-z]+:)([^)#]+)\)", text):
        path = (ROOT / page).parent.joinpath(target).resolve()
        if path.is_file() and path.suffix != ".md":
            yield path.relative_to(ROOT).as_posix()


def on_files(files, config):
    for path in {*PAGES, *(path for page in PAGES for path in linked_files(page))}:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files
