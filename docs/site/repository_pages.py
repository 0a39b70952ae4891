"""Files of the repository that pages link become pages of the site, so that a link works in a
checkout and here alike. A hook of mkdocs.
"""

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]+)?\)")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml"}
AS_THEY_ARE = (".png", ".csv")


def outside(page: str, target: str) -> str | None:
    """The path in the repository of what a page links, where that lies outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.endswith(AS_THEY_ARE):
        return f"repository/{path}"
    return f"repository/{path.removesuffix('.md')}.md"


def content(path: str) -> str:
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        # its own links lead on in the repository, not here
        body = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
    else:
        fence = "`" * 4
        language = LANGUAGES.get(pathlib.Path(path).suffix, "text")
        body = f"# {posixpath.basename(path)}\n\n{fence}{language}\n{text}\n{fence}\n"
    return f"---\nsearch: {{exclude: true}}\nhide: [navigation]\n---\n\n{body}"


def on_files(files: Files, config: Any) -> Files:
    history = changes((ROOT / "CHANGELOG.md").read_text())
    files.append(File.generated(config, "changes.md", content=history))
    wanted = set()
    for file in list(files.documentation_pages()):
        text = file.content_string
        for target, _ in LINK.findall(text):
            if path := outside(file.src_uri, target):
                wanted.add(path)
    for path in sorted(wanted):
        if path.endswith(AS_THEY_ARE):
            added = File.generated(config, place(path), content=(ROOT / path).read_bytes())
        elif (ROOT / path).is_file():
            added = File.generated(config, place(path), content=content(path))
        else:
            continue  # the link stays as it is, and strict mode names it
        added.inclusion = added.inclusion.NOT_IN_NAV
        files.append(added)
    return files


def changes(text: str) -> str:
    """CHANGELOG.md, with its links as they are from docs/."""
    return re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def moved(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        path = outside(page.file.src_uri, target)
        if path is None or files.get_file_from_path(place(path)) is None:
            return found[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(place(path), start)}{anchor})"

    return LINK.sub(moved, markdown)
