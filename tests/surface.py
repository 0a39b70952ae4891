"""The public surface as text: names, signatures, errors, commands, switches, operators.

    python tests/surface.py           prints it
    python tests/surface.py --write   writes tests/golden/surface.txt, once a change is meant

What is public says docs/api.md, what a change demands docs/stability.md. The text is the same under
every Python, torch and set of packages: other people's packages are stubs here, so this runs as a
program of its own.
"""

import argparse
import ast
import importlib
import inspect
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / "tests" / "golden" / "surface.txt"
HEAD = """\
# The public surface. A line that goes or changes breaks somebody: docs/stability.md says what that
# demands. Written by `python tests/surface.py --write`, compared by tests/test_surface.py.
"""

# ---- annotations and signatures, in words that no version of Python or torch changes


def class_name(cls: type) -> str:
    """Where its users find it."""
    for module in (torch, nn):
        if getattr(module, cls.__name__, None) is cls:
            return f"{module.__name__}.{cls.__name__}"
    own = cls.__module__ == "builtins" or cls.__module__.startswith("neftune_kernels")
    return cls.__qualname__ if own else f"{cls.__module__}.{cls.__qualname__}"


def spelled(annotation: object) -> str:
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is ...:
        return "..."
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, list):  # the arguments of a Callable
        return f"[{', '.join(map(spelled, annotation))}]"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spelled, parts))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if origin is not None:
        return f"{class_name(origin)}[{', '.join(map(spelled, parts))}]"
    if isinstance(annotation, type):
        return class_name(annotation)
    return str(annotation)


STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def parameter_lines(signature: inspect.Signature) -> Iterator[str]:
    """A line each; "/" and "*" stand where they do in Python."""
    before = None
    for one in signature.parameters.values():
        if before is one.POSITIONAL_ONLY and one.kind is not before:
            yield "/"
        if one.kind is one.KEYWORD_ONLY and before not in (one.KEYWORD_ONLY, one.VAR_POSITIONAL):
            yield "*"
        before = one.kind
        said = "" if one.annotation is one.empty else f": {spelled(one.annotation)}"
        default = "" if one.default is one.empty else f" = {one.default!r}"
        yield f"{STARS.get(one.kind, '')}{one.name}{said}{default}"
    if before is inspect.Parameter.POSITIONAL_ONLY:
        yield "/"


def call_lines(name: str, function: Callable[..., object], is_method: bool = False) -> list[str]:
    signature = inspect.signature(function)
    if is_method:
        _, *parameters = signature.parameters.values()
        signature = signature.replace(parameters=parameters)
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {spelled(returned)}"
    inside = [f"    {line}" for line in parameter_lines(signature)]
    return [f"{name}(", *inside, f"){arrow}"] if inside else [f"{name}(){arrow}"]


# ---- names: docs/api.md is the list

DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.M)
MEMBERS = re.compile(r"members: (?:\[(.*)\]|false)")
MADE_BY_US = ("NEFTuneHandle", "TrainerPatch")  # nobody else calls their constructors


class Public(typing.NamedTuple):
    path: str  # where its users import it from
    value: typing.Any
    members: tuple[str, ...]


def find(path: str) -> typing.Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def public_names() -> list[Public]:
    found = []
    for path, options in DIRECTIVE.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        value, members = find(path), MEMBERS.search(options)
        listed = tuple((members[1] or "").split(", ")) if members else ()
        listed = tuple(filter(None, listed))
        if isinstance(value, types.ModuleType):
            found += [Public(f"{path}.{name}", getattr(value, name), ()) for name in listed]
        else:
            found.append(Public(path, value, listed))
    return found


def member_lines(cls: type, name: str) -> list[str]:
    member = inspect.getattr_static(cls, name)
    path = f"{cls.__name__}.{name}"
    if isinstance(member, property):
        returned = spelled(inspect.signature(member.fget).return_annotation)
        return [f"{path}: {returned}{'' if member.fset is None else ', assignable'}"]
    if isinstance(member, classmethod):
        return call_lines(f"classmethod {path}", getattr(cls, name))
    return call_lines(path, member, is_method=True)


def settings_of(cls: type) -> list[str]:
    """The attributes that are read and assigned: of NEFTuneHandle the keywords of apply_neftune and
    sign, else keywords of the constructor that become attributes.
    """
    if cls.__name__ == "TrainerPatch":
        return ["noise_alpha"]
    if cls.__name__ == "NEFTuneHandle":
        words = inspect.signature(find("neftune_kernels.apply_neftune")).parameters.values()
        names = [one.name for one in words if one.kind is not one.VAR_KEYWORD]
        return [name for name in [*names, "sign"] if name not in ("model", "embedding")]
    made = cls(3, 2) if issubclass(cls, nn.Module) else cls()
    words = inspect.signature(cls).parameters.values()
    names = [one.name for one in words if one.kind is one.KEYWORD_ONLY]
    return [name for name in ["noise_alpha", *names] if hasattr(made, name)]


def class_lines(path: str, cls: type, members: tuple[str, ...]) -> list[str]:
    bases = [class_name(base) for base in cls.__bases__ if base.__module__.startswith("torch")]
    head = f"class {path}({', '.join(bases)})" if bases else f"class {path}"
    lines = []
    if cls.__name__ not in MADE_BY_US:
        lines += call_lines("__init__", cls.__init__, is_method=True)  # type: ignore[misc]
    settings = settings_of(cls)
    lines += [f"setting {name}" for name in settings]
    for name in members:
        if name not in settings:
            lines += member_lines(cls, name)
    return [head, *(f"    {line}" for line in lines)]


def name_lines() -> Iterator[str]:
    import neftune_kernels

    names = public_names()
    listed = {one.path.removeprefix("neftune_kernels.") for one in names}
    constants = sorted(set(neftune_kernels.__all__) - listed)
    yield f"neftune_kernels.SPEC_VERSION = {neftune_kernels.SPEC_VERSION}"
    yield from (f"neftune_kernels.{name}" for name in constants if name != "SPEC_VERSION")
    for path, value, members in names:
        yield ""
        if isinstance(value, type):
            yield from class_lines(path, value, members)
        else:
            yield from call_lines(path, value)


# ---- errors

RAISES = re.compile(r"^Raises:\n((?: +.*\n?)+)", re.M)
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.M)
PLUGINS = {"axolotl": "NEFTunePlugin", "swift": "make_callback"}  # of other tools' files


def promised_errors(value: object) -> list[str]:
    """What the section "Raises:" of a docstring names."""
    return sorted(
        {
            name
            for section in RAISES.findall(inspect.getdoc(value) or "")
            for names in ENTRY.findall(section)
            for name in names.split(", ")
        }
    )


def error_lines() -> Iterator[str]:
    plugins = [f"neftune_kernels.integrations.{file}.{name}" for file, name in PLUGINS.items()]
    for path, value, members in [*public_names(), *(Public(one, find(one), ()) for one in plugins)]:
        if raised := promised_errors(value):
            yield f"{path}: {', '.join(raised)}"
        for name in members:
            if raised := promised_errors(inspect.getattr_static(value, name)):
                yield f"{path}.{name}: {', '.join(raised)}"


# ---- what functions return as dictionaries


def key_lines() -> Iterator[str]:
    import neftune_kernels
    from neftune_kernels.integrations import training

    yield f"available_backends(): {', '.join(neftune_kernels.available_backends())}"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            return self.embed(input_ids)

    model = Model()
    handle = neftune_kernels.apply_neftune(model, embedding="embed")
    ids = torch.tensor([[1, 2]])
    checked = handle.check(input_ids=ids, attention_mask=ids)
    yield f"NEFTuneHandle.stats(): {', '.join(handle.stats())}"
    yield f"NEFTuneHandle.check(): {', '.join(checked)}"
    yield f"NEFTuneHandle.check()['sites'][0]: {', '.join(checked['sites'][0])}"
    logged = ["noise_alpha", *training.LOGGED, "calls", "skipped/<reason>"]
    yield f"logged: {', '.join(f'{training.LOG_PREFIX}{name}' for name in logged)}"
    module = neftune_kernels.NEFTuneEmbedding(3, 2, padding_idx=0, embed_scale=2.0)
    yield f"NEFTuneEmbedding.state_dict(): {', '.join(module.state_dict())}"


# ---- commands


class Parsing(Exception):
    """A parser that was about to parse."""


def parser_of(main: Callable[[], object]) -> argparse.ArgumentParser:
    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        raise Parsing(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main()
        except Parsing as parsing:
            (parser,) = parsing.args
            return parser
    raise AssertionError(f"{main} parses no arguments")


def option_lines(command: str, main: Callable[[], object]) -> list[str]:
    lines = [command]
    for action in parser_of(main)._actions:
        names = ", ".join(action.option_strings) or action.dest
        takes = "" if action.nargs == 0 else f" {action.nargs or 'one'}"
        plain = action.default in (None, False, argparse.SUPPRESS)
        lines.append(f"    {names}{takes}{'' if plain else f' = {action.default}'}")
    return lines


def command_lines() -> Iterator[str]:
    import neftune_run
    from neftune_kernels import __main__, doctor

    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for script in re.findall(r"^\[project\.scripts\]\n((?:.+\n)+)", declared, re.M):
        yield from (f"script {line}" for line in script.splitlines())
    yield from option_lines("neftune-run", neftune_run.main)
    yield f"    exit {neftune_run.STRICT}: --strict, and no training had noise"
    yield from option_lines("python -m neftune_kernels", __main__.main)
    yield from option_lines("python -m neftune_kernels.doctor", lambda: doctor.main([]))
    (extras,) = re.findall(r"^\[project\.optional-dependencies\]\n((?:.+\n)+)", declared, re.M)
    names = re.findall(r"^(\w+) =", extras, re.M)
    yield f"extras: {', '.join(sorted(names))}"


# ---- switches of the environment

OF_ONE_RUN = ("NEFTUNE_RUN_ALPHA", "NEFTUNE_RUN_REPORTS")  # from neftune-run to its processes
SWITCH = re.compile(r"NEFTUNE_[A-Z_]+[A-Z]")


def switches() -> set[str]:
    """Every string of the code that is such a name, and what the C++ code asks for."""
    found = set()
    for path in [ROOT / "setup.py", *(ROOT / "neftune_kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and SWITCH.fullmatch(node.value)
        }
    for path in (ROOT / "csrc").rglob("*.*"):
        asked = path.read_text(encoding="utf-8")
        found |= set(re.findall(r'getenv\("(NEFTUNE_\w+)"\)', asked))
    return found - set(OF_ONE_RUN)


# ---- other tools' files: names that stand in their YAML


def plugin_lines() -> Iterator[str]:
    axolotl = importlib.import_module("neftune_kernels.integrations.axolotl")
    plugin = axolotl.NEFTunePlugin
    yield f"axolotl, plugins: {plugin.__module__}.{plugin.__name__}"
    for name, annotation in axolotl.NEFTuneArgs.__annotations__.items():
        yield f"    {name}: {spelled(annotation)} = {getattr(axolotl.NEFTuneArgs, name)!r}"
    importlib.import_module("neftune_kernels.integrations.swift")
    named = sys.modules["swift.callbacks"].callbacks_map
    yield f"ms-swift, neftune_kernels.integrations.swift, callbacks: {', '.join(named)}"
    litgpt = importlib.import_module("neftune_kernels.integrations.litgpt")
    yield f"LitGPT, by neftune-run: the embedding is {litgpt.EMBEDDING}"


# ---- all of it


def operator_lines() -> Iterator[str]:
    from neftune_kernels import ops

    for one in sorted(ops.OPERATORS, key=lambda one: one.name):
        yield f"{ops.NAMESPACE}::{one.name}{one.schema}"


def put_stubs() -> None:
    """What our files for other packages take from these."""
    trainer = {"Trainer": type("Trainer", (), {"train": lambda self: None})}
    base = {"TrainerCallback": type("TrainerCallback", (), {}), "__version__": "5"}
    nothing = dict.fromkeys(("activate_neftune", "deactivate_neftune"))
    pydantic = {
        "BaseModel": type("BaseModel", (), {}),
        "Field": lambda default, **_: default,
        "NonNegativeInt": int,
        "field_validator": lambda *_: lambda method: method,
    }
    stubs = {
        "transformers": base | trainer,
        "transformers.trainer": trainer | nothing,
        "pytorch_lightning": {"Callback": type("Callback", (), {})},
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": type("BasePlugin", (), {})},
        "pydantic": pydantic,
        "swift": {},
        "swift.callbacks": {"callbacks_map": {}},
    }
    for name, content in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


SECTIONS: dict[str, Callable[[], typing.Iterable[str]]] = {
    "names": name_lines,
    "errors": error_lines,
    "keys": key_lines,
    "commands": command_lines,
    "environment": lambda: sorted(switches()),
    "files of other tools": plugin_lines,
    "operators": operator_lines,
}


def surface() -> str:
    put_stubs()
    parts = [f"## {name}\n\n" + "\n".join(lines()) + "\n" for name, lines in SECTIONS.items()]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PATH.relative_to(ROOT)}")
    wanted = parser.parse_args()
    text = surface()
    if wanted.write:
        PATH.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
