"""Docstrings as this package writes them, made Markdown for the site. An extension of griffe.

Lists under "Args:" and "Raises:" may name several at once, examples are doctests, formulas have
stars, and roles such as :func:`name` are code.
"""

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:meth|func|class|attr|mod):(`[^`]+`)")
HEAD = re.compile(r"(Args|Returns|Raises|Example|Shape|Words):$")
LISTS = ("Args", "Raises")


def escaped(text: str) -> str:
    """Prose with nothing that Markdown would read, but for what stands in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", part) for part in parts
    )


def entries(lines: list[str]) -> list[str]:
    """One string for each entry of a list: what is indented further goes on."""
    found: list[str] = []
    for line in lines:
        if not line.startswith(" ") or not found:
            found.append(line)
        else:
            found[-1] += " " + line.strip()
    return [one for one in found if one.strip()]


def as_list(lines: list[str]) -> str:
    items = []
    for one in entries(lines):
        names, colon, rest = one.partition(": ")
        if colon:
            code = ", ".join(f"`{name.strip()}`" for name in names.split(","))
            items.append(f"- {code}: {escaped(rest)}")
        else:
            items.append(f"- {escaped(one)}")
    return "\n".join(items)


def markdown(docstring: str) -> str:
    """The whole docstring: prose, then sections."""
    sections: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in ROLE.sub(r"\1", docstring).splitlines():
        if head := HEAD.match(line):
            sections.append((head[1], []))
        elif line and not line.startswith((" ", "-")) and sections[-1][0] is not None:
            sections.append((None, [line]))
        else:
            sections[-1][1].append(line)
    written = []
    for name, lines in sections:
        body = textwrap.dedent("\n".join(lines)).strip("\n")
        if name == "Example":
            written.append(f"**Example**\n\n```pycon\n{body}\n```")
        elif name in LISTS:
            written.append(f"**{name}**\n\n{as_list(body.splitlines())}")
        elif name is not None:
            written.append(f"**{name}**\n\n{escaped(body)}")
        else:
            written.append(prose(body))
    return "\n\n".join(written)


def prose(body: str) -> str:
    """Paragraphs as they are; a list begins after an empty line; what is indented is no code."""
    lines = [line.strip() for line in body.splitlines()]
    spaced: list[str] = []
    for line in lines:
        if line.startswith("- ") and spaced and not spaced[-1].startswith("- ") and spaced[-1]:
            spaced.append("")
        spaced.append(line)
    return escaped("\n".join(spaced))


class DocstringMarkdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
