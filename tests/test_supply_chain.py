"""What the package does not do, watched by Python's own audit events: no network, no unpickling, no
code made at run time, no process, no file written. What CI installs is pinned.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys

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


# ---- what CI installs

PINNED = re.compile(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.!+]+")
FILES = sorted([*ROOT.glob("requirements-*.txt"), ROOT / "constraints.txt"])
BY_CI = ("Makefile", ".ci/run", "tests/wheels.sh", *map(str, ROOT.glob(".github/workflows/*.yml")))
# What a command of pip installs beside pins: this tree, a torch that is pinned where it is named, a
# wheel of ours, a version that a target is about.
ALSO = {".", "$TORCH", "$(TORCH)", "${wheel}[test]", "transformers==$$version"}
# Targets that CI does not call, about versions whose own requirements are not ours to choose.
NOT_CI = ("transformers==$$version",)


def lines_of(path):
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned():
    assert len(FILES) > 9
    for path in FILES:
        for line in lines_of(path):
            if not line.startswith("-r "):
                assert PINNED.fullmatch(line.partition(";")[0]), f"{path.name}: {line}"
            else:
                assert ROOT / line.removeprefix("-r ") in FILES, f"{path.name}: {line}"


def test_every_install_is_of_pins():
    """And of nothing that a pinned package asks for itself: -c names these, --no-deps has none."""
    installs = [
        (name, command)
        for name in BY_CI
        for command in re.findall(r"pip (?:install|wheel)\b(.*)", (ROOT / name).read_text())
    ]
    assert len(installs) > 12
    for name, command in installs:
        command = re.split(r" 2>/dev/null| \|\| | && | \\$|;", command)[0]
        words = [word.strip("\"'") for word in command.split()]
        given = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-r", "-c")]
        assert "--no-deps" in words or "-c" in words or any(one in words for one in NOT_CI), command
        others = [
            word
            for i, word in enumerate(words)
            if not word.startswith("-")
            and (i == 0 or words[i - 1] not in ("-r", "-c", "--wheel-dir"))
            and word not in (*ALSO, "$(ARGS)", "dist/*.tar.gz")
        ]
        assert all(map(PINNED.fullmatch, others)), f"{name}: {others}"
        known = {path.name for path in FILES} | {"pins.txt"}
        assert set(given) <= known, f"{name}: {given}"


def test_torch_is_pinned_wherever_it_is_named():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"^TORCH \?= (.*)$", makefile, re.M)
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        named += re.findall(r"torch: ([^}\s]+)", text.replace("torch: ${{", ""))
        named += re.findall(r"TORCH=(\S+)", text.replace('TORCH="$TORCH"', ""))
    assert len(named) == 5 and all(map(PINNED.fullmatch, named)), named


def test_actions_are_pinned_by_commit():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for used in re.findall(r"uses: (\S+)", path.read_text()):
            ours = used.startswith("$/")
            assert ours or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", used), f"{path.name}: {used}"


def of_this_python(path):
    for line in lines_of(path):
        if line.startswith("-r "):
            yield from of_this_python(ROOT / line.removeprefix("-r "))
        elif (one := Requirement(line)).marker is None or one.marker.evaluate():
            yield one


def test_what_pins_ask_for_is_pinned_too():
    """Every package that `make setup` brings, as far as it is installed here."""
    asked = [Requirement("torch"), *of_this_python(ROOT / "requirements-dev.txt")]
    pinned = {canonicalize_name(one.name) for one in asked}
    for name in ("constraints.txt", "requirements-triton.txt"):
        pinned |= {canonicalize_name(one.name) for one in of_this_python(ROOT / name)}
    seen, missing = set(), set()
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        if (name, *sorted(one.extras)) in seen:
            continue
        seen.add((name, *sorted(one.extras)))
        by_torch = name.startswith(("nvidia-", "cuda-"))  # constraints.txt says which it pins not
        if name not in pinned and not by_torch:
            missing.add(name)
        try:
            requires = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = ("", *one.extras)
        for further in map(Requirement, requires):
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                asked.append(further)
    assert len(seen) > 50 or "transformers" not in {name for name, *_ in seen}
    assert not missing, "constraints.txt has no " + ", ".join(sorted(missing))
