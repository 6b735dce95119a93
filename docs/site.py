"""Hooks of mkdocs.yml: the README is the home page, and links that leave docs/ find their file.

On GitHub a page links files of the repository beside docs/. The site has copies of those, below
`repository/`; no link of a page has to be written twice.
"""

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOME = "index.md"
COPIES = "repository"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def source_of(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    if uri == HOME:
        return "README.md"
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path == "README.md":
        return HOME
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def links(markdown: str, source: str) -> list[str]:
    """The files of the repository that a page links, by their paths."""
    folder = posixpath.dirname(source)
    return [
        posixpath.normpath(posixpath.join(folder, target))
        for _, target, _ in LINK.findall(markdown)
        if "://" not in target
    ]


def on_files(files: Files, config: Any) -> Files:
    """Adds the home page, and every file beside docs/ that a page links, to any depth."""
    pages = [file.src_uri for file in files.documentation_pages()]
    files.append(File.generated(config, HOME, abs_src_path=str(ROOT / "README.md")))
    waiting = [*(source_of(uri) for uri in pages), "README.md"]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        for path in links((ROOT / source).read_text(), source):
            if path in seen or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            seen.add(path)
            files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of a page from paths of the repository to paths of the site."""
    uri = page.file.src_uri
    source = source_of(uri)

    def turned(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return f"{before}{posixpath.relpath(place_of(path), posixpath.dirname(uri) or '.')}{after}"

    return LINK.sub(turned, markdown)
