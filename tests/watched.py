"""What this package does beside computing: a program that runs its features under an audit hook and
prints every event that is none of a computation's, with the function of ours that brought it about.

    python tests/watched.py FOLDER [--intruded]

FOLDER is where neftune-run's reports go. --intruded: code under a path of ours does what we never
do, and has to be seen. tests/test_supply_chain.py runs both. A function brings about what it does
itself and what the standard library, torch or numpy do for it; what a package does while it is
imported, and what a model or a trainer does around us, is theirs.
"""

import contextlib
import os
import pathlib
import sys
from types import FrameType

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = tuple(f"{ROOT / name}{os.sep}" for name in ("neftune_kernels", "neftune_run"))
KINDS = (
    *("socket.", "ssl.", "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib."),
    *("pickle.", "marshal.load", "exec", "compile", "code.__new__", "ctypes.dlopen"),
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pty."),
    *("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"),
    *("os.chmod", "os.chown", "os.truncate", "shutil.", "tempfile.", "webbrowser."),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FOR_US = {*sys.stdlib_module_names, "torch", "numpy"}


def ours(frame: FrameType | None) -> str | None:
    """The innermost function of ours, unless others than FOR_US stand between."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(FOLDERS):
            return f"{pathlib.Path(file).relative_to(ROOT)}, {frame.f_code.co_name}"
        name = frame.f_globals.get("__name__", "")
        is_importing = name.startswith(("importlib._bootstrap", "_frozen_importlib"))
        if is_importing or name.partition(".")[0] not in FOR_US or name == "__main__":
            return None
        frame = frame.f_back
    return None


def reads(mode: object, flags: int) -> bool:
    return not flags & WRITES and not (isinstance(mode, str) and set(mode) & set("wax+"))


def watch(event: str, args: tuple[object, ...]) -> None:
    if not event.startswith(KINDS) or (event == "open" and reads(args[1], int(str(args[2])))):
        return
    frame = sys._getframe(1)
    function = ours(frame)
    if function is not None:
        what = repr(args[0])[:80] if args else ""
        print(f"{event} | {frame.f_globals['__name__']} | {function} | {what}", flush=True)


def features() -> None:
    """Every public name that needs no GPU and no process of its own."""
    import copy

    import torch
    from torch import nn

    import neftune_kernels as package
    from neftune_kernels import __main__, distributed, schedules

    ids, weight = torch.tensor([[1, 2], [2, 0]]), torch.ones(3, 4, requires_grad=True)
    told = {"attention_mask": ids > 0}, {"lengths": torch.tensor([2, 1])}, {"padding_idx": 0}
    for distribution in ("uniform", "normal", "rademacher"):
        for words in told:
            for backend in (None, "reference"):
                how = {**words, "distribution": distribution, "backend": backend}
                package.noisy_embedding(ids, weight, 5.0, **how).sum().backward()
    package.add_noise(torch.zeros(2, 2, 4), 5.0, position_ids=ids)
    package.neftune_noise((2, 2), 4, 5.0, cu_seqlens=torch.tensor([0, 1, 4]))
    module = package.NEFTuneEmbedding.from_pretrained(weight.detach(), freeze=False)
    module(ids).sum().backward()
    copy.deepcopy(module).load_state_dict(module.state_dict())
    module.to_embedding()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            return 2.0 * self.embed(input_ids)

    model = Model()
    with package.apply_neftune(model, 5.0, embedding="embed") as handle:
        model(ids, attention_mask=ids > 0).sum().backward()
        handle.stats(), handle.check(input_ids=ids), handle.describe(), repr(handle)
    distributed.data_parallel_index(weight)
    schedules.warmup_schedule(2, schedules.linear_schedule(5.0, 0.0, 4))(1)
    sys.argv = ["neftune_kernels"]
    __main__.main()
    trainers()


def trainers() -> None:
    try:
        from neftune_kernels.integrations import transformers
    except ImportError:
        print("NOT RUN: transformers is not installed")
        return
    transformers.patch_trainer(5.0).undo()
    transformers.NEFTuneCallback(5.0)


def launcher(folder: str) -> None:
    """neftune-run, and what the Python that it starts runs first."""
    import runpy
    import tempfile

    import neftune_run

    tempfile.tempdir = os.environ["NEFTUNE_RUN_REPORTS"] = folder
    site = ROOT / "neftune_run" / "site" / "sitecustomize.py"
    with contextlib.suppress(KeyError):  # it takes its own place among the modules
        runpy.run_path(str(site), run_name="sitecustomize")
    del os.environ["NEFTUNE_RUN_REPORTS"]
    sys.argv = ["neftune-run", sys.executable, "-c", "pass"]
    with contextlib.suppress(SystemExit):
        neftune_run.main()


INTRUSIONS = {
    "socket": "import socket; socket.socket()",
    "a name looked up": "import socket; socket.getaddrinfo('localhost', 1)",
    "urllib": "import urllib.request; urllib.request.urlopen('file:///dev/null')",
    "pickle": "import pickle; pickle.loads(pickle.dumps(len))",
    "torch.load": (
        "import io, torch; file = io.BytesIO(); torch.save(torch.nn.Linear(1, 1), file)\n"
        "file.seek(0); torch.load(file, weights_only=False)"
    ),
    "eval": "eval('1 + 1')",
    "exec": "exec('x = 1')",
    "a process": "import subprocess; subprocess.run(['true'])",
    "a shell": "import os; os.system('true')",
    "a library": "import ctypes; ctypes.CDLL(None)",
    "a file": "open('/dev/null', 'w').close()",
    "a folder": "import os; os.mkdir('/dev/null/none')",
}


def intrude() -> None:
    file = str(ROOT / "neftune_kernels" / "intruder.py")
    codes = {name: compile(text, file, "exec") for name, text in INTRUSIONS.items()}
    sys.addaudithook(watch)
    for name, code in codes.items():
        print(f"INTRUSION {name}")
        with contextlib.suppress(OSError):
            exec(code, {"__name__": "neftune_kernels.intruder"})


if __name__ == "__main__":
    if "--intruded" in sys.argv:
        intrude()
    else:
        folder = sys.argv[1]
        sys.addaudithook(watch)
        features()
        launcher(folder)
