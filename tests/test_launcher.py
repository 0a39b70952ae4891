"""Launches past Triton's kernel[grid] hand the driver the same; a foreign Triton is left alone.

Without a GPU: tests/launcher_calls.py runs Triton's own driver code over a driver that computes
nothing, and the rest gives the launcher Tritons that no package index has. `make launcher-matrix`
runs this file under every triton that installs.
"""

import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import types
import warnings

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed: its launcher is not compared with ours", allow_module_level=True
    )
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 turns the compiler off", allow_module_level=True)

import torch
import triton
from launcher_calls import PLACES, calls

from bench.launch import StubDriver
from neftune_kernels import triton_kernels

TESTS = pathlib.Path(__file__).parent


# ---- over a driver that writes launches down


@pytest.fixture(scope="module")
def run_calls(tmp_path_factory):
    """launcher_calls.py with the given arguments: what it printed."""
    gcc, include = (
        shutil.which("gcc"),
        pathlib.Path(triton.__file__).parent / "backends/nvidia/include",
    )
    if sys.platform != "linux" or gcc is None or not (include / "cuda.h").exists():
        pytest.skip(
            "launches past kernel[grid] are not compared with its own: that needs Linux, gcc and "
            f"the cuda.h of the triton wheel ({triton.__version__})"
        )
    if torch.version.cuda or torch.version.hip:
        pytest.skip(
            "launches are not compared: this torch would load the driver that computes nothing"
        )
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    flags = [
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        f"-Wl,-soname,{library.name}",
        f"-I{include}",
    ]
    subprocess.run([gcc, *flags, str(TESTS / "fake_libcuda.c"), "-o", str(library)], check=True)
    paths = {
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "PYTHONPATH": TESTS.parent,
        "TRITON_CACHE_DIR": folder / "cache",
    }
    switches = {"NEFTUNE_SELF_CHECK": "0"}  # the driver computes nothing that could be checked
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NEFTUNE_", "TRITON_"))
    }
    environment |= {name: str(path) for name, path in paths.items()} | switches

    def run(*arguments):
        command = [sys.executable, str(TESTS / "launcher_calls.py"), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "Warning" not in ran.stderr, ran.stderr
        return json.loads(ran.stdout)

    return run


@pytest.fixture(scope="module")
def compared(run_calls):
    return run_calls()


@pytest.mark.parametrize("name", calls())
def test_same_launch(compared, record_property, name):
    """Function, parameters' bytes, grid, block, shared memory, stream, device: kernel[grid]'s."""
    assert compared["triton"] == triton.__version__
    for place in PLACES:
        found = compared["calls"][f"{name}; {place}"]
        assert found["launches"] >= 1 and found["wrong"] == []
    record_property(
        "launches", sum(compared["calls"][f"{name}; {place}"]["launches"] for place in PLACES)
    )


def test_a_launch_with_the_devices_alpha_is_that_of_every_alpha(compared):
    """A captured graph holds the launch: at another alpha it would be the same, byte for byte, and
    the host has not asked for its value. With the host's alpha it would not.
    """
    assert len(compared["alphas"]) == 6
    for name, is_same in compared["alphas"].items():
        assert is_same == name.startswith("device"), name


def test_swapped_arguments_are_seen(run_calls):
    """Two integers of each launch swapped: each launch differs, in just these two."""
    for name, found in run_calls("--spoiled")["calls"].items():
        named = {text.split(":")[0] for text in found["wrong"]}
        assert named in (
            {"columns", "position_offset"},
            {"columns", "padding_value"},
            {"tokens", "padding_idx"},
        ), name


# ---- foreign Tritons


class CompiledKernel:
    """What Triton has compiled. Its launcher writes down what it is handed, and by which grid."""

    function, packed_metadata = 7, (1, 1, 0)

    def __init__(self, kernel):
        self.kernel, self._run = kernel, self.launcher

    def launcher(self, *given, **named):
        self.kernel.launched.append((self.kernel.grid, given))

    @property
    def run(self):
        return self._run


class Kernel:
    """A @triton.jit function. `hand` calls the launcher, by default with what Triton gives it."""

    params = ()

    def __init__(self, compiled=CompiledKernel, hand=lambda run, *given: run(*given)):
        self.compiled, self.hand = compiled(self), hand
        self.grid, self.asked, self.launched = None, [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.asked.append((grid, args))
            self.grid = grid
            hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
            self.hand(self.compiled._run, *grid, 0, 7, (1, 1, 0), None, *hooks, *args)
            self.grid = None
            return self.compiled

        return launch


def without(name):
    class Lacking(CompiledKernel):
        pass

    def lacking(self):
        raise AttributeError(f"no {name}")

    setattr(Lacking, name, property(lacking))
    return Lacking


class AnotherRun(CompiledKernel):
    run = CompiledKernel.launcher


class NeedsHooks(CompiledKernel):
    def launcher(self, *given):
        if None in given[7:9]:
            raise TypeError("'NoneType' object is not callable")
        super().launcher(*given)


FOREIGN = {
    "no function": Kernel(without("function")),
    "no packed_metadata": Kernel(without("packed_metadata")),
    "no run": Kernel(without("run")),
    "another run": Kernel(AnotherRun),
    "needs hooks": Kernel(NeedsHooks),
    "stream first": Kernel(hand=lambda run, *given: run(given[3], *given[:3], *given[4:])),
    "function before stream": Kernel(
        hand=lambda run, *given: run(*given[:3], given[4], given[3], *given[5:])
    ),
    "one more": Kernel(hand=lambda run, *given: run(*given[:6], None, *given[6:])),
    "one less": Kernel(hand=lambda run, *given: run(*given[:6], *given[7:])),
    "one more at the end": Kernel(hand=lambda run, *given: run(*given, None)),
    "no hooks": Kernel(hand=lambda run, *given: run(*given[:7], None, None, *given[9:])),
    "arguments reversed": Kernel(hand=lambda run, *given: run(*given[:9], *given[:8:-1])),
    "arguments in a tuple": Kernel(hand=lambda run, *given: run(*given[:9], given[9:])),
    "arguments by name": Kernel(hand=lambda run, *given: run(*given[:9], args=given[9:])),
}


@pytest.fixture
def own_state(monkeypatch):
    """No GPU's driver, and nothing given up that other tests want."""
    monkeypatch.setattr(triton.runtime.driver, "_active", StubDriver())
    monkeypatch.setattr(triton_kernels.Launcher, "unexpected", "")


def launch(launcher, count):
    """As the callers of Launcher do; (grid, arguments) of each."""
    given = []
    for number in range(count):
        args = (torch.zeros(2), torch.zeros(3), None, 5000 + number, 0.5, "pairs")
        grid = (4 + number, 1, 1)
        launcher("key", launcher.compiled.get("key"), -1, grid, args, 1)
        given.append((grid, args))
    return given


def same(first, second):
    """Equal grids, and the same objects as arguments."""
    return [(grid, [*map(id, args)]) for grid, args in first] == [
        (grid, [*map(id, args)]) for grid, args in second
    ]


def test_known_triton_is_passed_by(own_state, recwarn):
    """The control of the tests below: one launch by kernel[grid], one without a program."""
    kernel = Kernel()
    given = launch(triton_kernels.Launcher(kernel), 3)
    assert not recwarn and kernel.compiled._run == kernel.compiled.launcher
    assert [grid for grid, _ in kernel.asked] == [given[0][0], triton_kernels.NO_PROGRAM]
    assert math.prod(triton_kernels.NO_PROGRAM) == 0
    assert [grid for grid, _ in kernel.launched] == [given[0][0], None, None]
    assert same([(handed[:3], handed[9:]) for _, handed in kernel.launched], given)
    assert all(
        handed[3:9] == (0, 7, (1, 1, 0), None, None, None) for _, handed in kernel.launched[1:]
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_triton_launches_by_itself(own_state, recwarn, name):
    """Each launch takes place once, by kernel[grid]; one warning names the version."""
    kernel = FOREIGN[name]
    kernel.asked.clear(), kernel.launched.clear()
    first, second = triton_kernels.Launcher(kernel), triton_kernels.Launcher(kernel)
    warnings.simplefilter("always")  # not Python's own once
    given = [*launch(first, 1), *launch(second, 1), *launch(first, 2), *launch(second, 2)]
    assert same([asked for asked in kernel.asked if asked[0] != triton_kernels.NO_PROGRAM], given)
    assert [grid for grid, _ in kernel.launched if grid != triton_kernels.NO_PROGRAM] == [
        grid for grid, _ in given
    ]
    assert not first.compiled and not second.compiled
    (warning,) = recwarn
    assert f"triton {triton.__version__} is not as" in str(warning.message)
    assert triton_kernels.Launcher.unexpected in str(warning.message)
    assert len(triton_kernels.Launcher.unexpected) < 300, "no tensor is printed"


def test_another_threads_launch_takes_place(own_state, recwarn):
    """While a kernel is tried without a program, others may launch it."""

    def hand(run, *given):
        if given[:3] == triton_kernels.NO_PROGRAM:
            run(9, 9, 9, *given[3:])
        run(*given)

    kernel = Kernel(hand=hand)
    launch(triton_kernels.Launcher(kernel), 2)
    assert [handed[:3] for _, handed in kernel.launched] == [
        (4, 1, 1),
        (9, 9, 9),
        (5, 1, 1),
    ] and not recwarn


def test_callers_mistake_is_not_tritons(own_state, recwarn):
    """A TypeError that kernel[grid] raises, too, is the caller's; the fast launch stays."""

    class Strict(CompiledKernel):
        def launcher(self, *given):
            if not isinstance(given[9], torch.Tensor):
                raise TypeError("Pointer argument must be either uint64 or have data_ptr method")
            super().launcher(*given)

    launcher = triton_kernels.Launcher(Kernel(Strict))
    _, (_, *rest) = launch(launcher, 2)[-1]
    found = launcher.compiled["key"]
    wrong = types.SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(TypeError, match="Pointer argument"):
        launcher("key", found, -1, (4, 1, 1), (wrong, *rest), 1)
    assert (
        launcher.compiled == {"key": found}
        and not triton_kernels.Launcher.unexpected
        and not recwarn
    )


def test_hooks_get_tritons_launch(own_state):
    """Profilers' hooks: kernel[grid] while there are any."""
    kernel, chains = (
        Kernel(),
        (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook),
    )
    launcher = triton_kernels.Launcher(kernel)
    launch(launcher, 2)
    for chain in chains:
        kernel.launched.clear()
        chain.add(print)
        try:
            launch(launcher, 1)
        finally:
            chain.remove(print)
        launch(launcher, 1)
        assert [grid for grid, _ in kernel.launched] == [(4, 1, 1), None]


def test_triton_without_knobs(own_state, monkeypatch, recwarn):
    """Where Triton's hooks are not to be found, the backend loads, launches and warns once."""
    spec = importlib.util.spec_from_file_location(
        "neftune_kernels.other_kernels", triton_kernels.__file__
    )
    kernels = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as hidden:
        hidden.delattr(triton, "knobs")
        hidden.setitem(sys.modules, "triton.knobs", None)
        spec.loader.exec_module(kernels)
    ran = []

    class Recording(StubDriver):
        def launcher_cls(self, src, metadata):
            return lambda *given: ran.append(given[:3])

    monkeypatch.setattr(triton.runtime.driver, "_active", Recording())
    seed, alpha = torch.tensor(1), torch.tensor(5.0, dtype=torch.float64)
    for rows in (2, 3, 4):
        ids, weight = torch.zeros(rows, 3, dtype=torch.int64), torch.zeros(5, 64)
        kernels.noisy_embedding_out(ids, weight, seed, alpha, out=torch.zeros(rows, 3, 64))
    assert ran == [(3, 2, 1), (3, 3, 1), (3, 4, 1)]
    (warning,) = recwarn
    assert "triton.knobs" in str(warning.message)
