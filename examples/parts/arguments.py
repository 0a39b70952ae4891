"""What command lines take, and what is missing before anything is loaded."""

import argparse
import importlib.util
import math
import sys

MAKE_DEMO = "`make demo` installs what this demo needs into build/demo-venv, and runs it."
MAKE_SETUP = "`make setup` installs what this program needs into .venv."


def alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return value


def positive_integer(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def require_packages(names: list[str], remedy: str) -> None:
    """Ends the program, saying what is missing and the remedy, where one of these is."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"Not installed here: {', '.join(missing)}. {remedy}")
