"""What the package does not do, watched by Python's own audit events: no network, no unpickling, no
code made at run time, no process, no file written. What CI installs is pinned.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import watched
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_install import ROOT

# ---- at run time

# (event, by a module, of a function of ours) as regular expressions → why that is right
DECLARED = {
    r"(compile|exec) \| (collections|dataclasses) \| .*, <module>": (
        "the standard library makes named tuples and data classes of source of its own"
    ),
    r"ctypes.dlopen \| ctypes \| neftune_kernels/backends.py, load_library": (
        "the package's own libraries, from its own folder"
    ),
    r"open \| sitecustomize \| neftune_run/site/sitecustomize.py, report": (
        "a process of neftune-run's tells it that it was reached"
    ),
    r"(tempfile.mkdtemp|os.mkdir) \| tempfile \| neftune_run/__init__.py, main": (
        "the temporary folder for these reports"
    ),
    r"(shutil.rmtree|os.(remove|rmdir)) \| (shutil|posixpath) \| neftune_run/__init__.py, main": (
        "and its end"
    ),
    r"os.posix_spawn \| neftune_run \| neftune_run/__init__.py, run": "COMMAND itself",
}


def watch(*arguments):
    command = [sys.executable, watched.__file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_but_what_is_declared(tmp_path):
    events = [line for line in watch(tmp_path) if " | " in line]
    unknown = [one for one in events if not any(re.match(how, one) for how in DECLARED)]
    assert not unknown, "\n".join(unknown)
    idle = {how for how in DECLARED if not any(re.match(how, one) for one in events)}
    assert all(how.startswith("ctypes.dlopen") for how in idle)  # an install without a library
    libraries = [one.rsplit(" | ")[-1] for one in events if one.startswith("ctypes.dlopen")]
    assert all(path.startswith(f"'{ROOT}/neftune_kernels/_C") for path in libraries)


def test_what_is_never_done_would_be_seen(tmp_path):
    """Each intrusion is followed by an event of its own that nothing declares."""
    found, name = {}, None
    for line in watch(tmp_path, "--intruded"):
        if line.startswith("INTRUSION "):
            name = line.removeprefix("INTRUSION ")
        else:
            found.setdefault(name, []).append(line)
    assert set(found) == set(watched.INTRUSIONS)
    for lines in found.values():
        assert not any(re.match(how, line) for how in DECLARED for line in lines)


# ---- in the source, of what no run reaches (GPUs, other tools)

FOREIGN = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "socket", "ssl", "urllib", "http"),
    *("requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub", "subprocess", "pty"),
    *("code", "codeop", "runpy"),
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("system", "popen", "execv", "execve", "fork", "posix_spawn", "posix_spawnp"),
    *("import_module", "open", "write_text", "write_bytes", "savefig"),
    *("mkdtemp", "rmtree", "mkdir", "unlink"),
}
# (file, name) → why
ALLOWED = {
    ("neftune_kernels/backends.py", "import_module"): "of its own Triton kernels",
    ("neftune_kernels/doctor.py", "import_module"): "of transformers and matplotlib, by name",
    ("neftune_kernels/doctor.py", "savefig"): "its picture",
    ("neftune_run/__init__.py", "open"): "reads its processes' reports",
    ("neftune_run/__init__.py", "mkdtemp"): "a temporary folder for them",
    ("neftune_run/__init__.py", "rmtree"): "and its end",
    ("neftune_run/site/sitecustomize.py", "open"): "writes such a report",
    ("neftune_run/__init__.py", "posix_spawnp"): "COMMAND itself",
}


def names_of(tree):
    """What a file imports and calls, each by its last name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name.partition(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Name) and node.id in BUILT_IN:
            yield node.id
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            if name in CALLS:
                yield name
            if called in ("torch.load", "numpy.load", "np.load", "torch.hub.load"):
                yield "pickle"


def test_nothing_of_it_is_in_the_source():
    found = set()
    paths = [*(ROOT / "neftune_kernels").rglob("*.py"), *(ROOT / "neftune_run").rglob("*.py")]
    assert len(paths) > 50
    for path in paths:
        names = set(names_of(ast.parse(path.read_text(encoding="utf-8"))))
        file = path.relative_to(ROOT).as_posix()
        found |= {(file, name) for name in names & (FOREIGN | BUILT_IN | CALLS)}
    assert found == set(ALLOWED)
