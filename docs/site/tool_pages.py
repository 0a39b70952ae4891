"""Pages for single tools, docs/tools/*.md, in the navigation, whichever there are. A hook of
mkdocs.
"""

import pathlib
from typing import Any


def on_config(config: Any) -> Any:
    folder = pathlib.Path(config.docs_dir) / "tools"
    pages = sorted(path.relative_to(config.docs_dir).as_posix() for path in folder.rglob("*.md"))
    if pages:
        place = next(i for i, one in enumerate(config.nav) if "Understand" in one)
        config.nav.insert(place, {"Tools": pages})
    return config
