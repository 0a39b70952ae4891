"""Pages for single tools in the navigation, whichever there are. A hook of mkdocs."""

import pathlib
from typing import Any

FOLDERS = ("tools", "ways")  # of docs/


def on_config(config: Any) -> Any:
    docs = pathlib.Path(config.docs_dir)
    found = [path for folder in FOLDERS for path in sorted((docs / folder).rglob("*.md"))]
    if found:
        place = next(i for i, one in enumerate(config.nav) if "Understand" in one)
        config.nav.insert(place, {"Tools": [path.relative_to(docs).as_posix() for path in found]})
    return config
