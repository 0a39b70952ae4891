"""bench.first_gpu without a GPU: every line of it, on tiny shapes, with all that costs stubbed.

The steps run in this process, their commands as the driver makes them; the device, NVIDIA's tools,
the build and the GPU tests are stubs. Processes, limits, signals and crashes are real, of programs
without torch. The last test sees to it that no line of the driver or a step was left out.
"""

import contextlib
import dis
import inspect
import io
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from importlib import import_module

import pytest
import torch
from conftest import require_native

from bench import first_gpu
from bench.gpu import (
    build,
    clock,
    debug,
    machine,
    ncu,
    process,
    program,
    providers,
    report,
    sanitizers,
    smoke,
    step,
    tests,
    times,
    training,
)

ROOT = pathlib.Path(__file__).parent.parent
STEP_MODULES = (
    build,
    clock,
    debug,
    machine,
    ncu,
    process,
    program,
    providers,
    report,
    sanitizers,
    smoke,
    step,
    tests,
    times,
    training,
)
FAKE_TOOLS = {
    "nvidia-smi": """
case "$*" in --query-gpu=*--format=csv,noheader) echo "580.1, 1980 MHz" ;; *) exit 3 ;; esac
""",
    "nvcc": 'echo "Cuda compilation tools, release 13.0, V13.0.88"',
    "g++": 'echo "g++ (fake) 12.2.0"',
    "ncu": """
case "$*" in
  *"--clock-control none"*"-m bench.gpu.program profiled --device cpu") ;;
  *) exit 3 ;;
esac
echo '==PROF== Connected to process'
echo '"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","noisy_rows","(512, 8, 1)","GPU Speed Of Light Throughput","Duration","us","18.2"'
echo '"0","noisy_rows","(512, 8, 1)","GPU Speed Of Light Throughput","DRAM Throughput","%","91.5"'
echo '"0","noisy_rows","(512, 8, 1)","SpeedOfLight","","","","a rule, with advice"'
echo '==PROF== Disconnected'
""",
    "compute-sanitizer": """
case "$*" in *"kns=noisy"*"-m bench.gpu.program checked --device cpu") ;; *) exit 3 ;; esac
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 4
echo '========= ERROR SUMMARY: 0 errors'
""",
}
SETUP = """
import os, pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"], sys.argv
folder = pathlib.Path("neftune_kernels")
folder.mkdir(exist_ok=True)
with pathlib.Path("builds").open("a") as file:
    file.write(os.environ["NEFTUNE_BUILD_CUDA"] + os.environ.get("NEFTUNE_CUDA_ARCHS", "") + " ")
if os.environ["NEFTUNE_BUILD_CUDA"] == "1" and os.path.exists("no-nvcc"):
    (folder / "_build_error_cuda.txt").write_text("no CUDA toolkit")
    sys.exit("NEFTUNE_BUILD_CUDA=1, but there is no nvcc")
(folder / "_C.abi3.so").write_text("library")
if os.environ["NEFTUNE_BUILD_CUDA"] == "1":
    (folder / "_C_cuda.abi3.so").write_text("library")
"""
GPU_TESTS = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("i", range(5))
def test_passes(i): pass
def test_skips(): pytest.skip("needs two GPUs")
"""
GPU_MARK = "[pytest]\nmarkers = gpu: needs a GPU\n"


# ---- which lines ran


AT_IMPORT = {"first_gpu.py module", "first_gpu.py times"}  # make the table of steps


def functions(code):
    """The code objects of all functions within, lambdas and comprehensions among them."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & inspect.CO_NEWLOCALS:  # no body of a class
                yield constant
            yield from functions(constant)


class Lines:
    """Executed lines of the files under test, by sys.settrace: no package is needed."""

    def __init__(self):
        modules = (first_gpu, *STEP_MODULES)
        self.files = {str(pathlib.Path(module.__file__).resolve()) for module in modules}
        self.seen = set()

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def missing(self):
        missing = []
        for file in sorted(self.files):
            path = pathlib.Path(file)
            for code in functions(compile(path.read_text(), file, "exec")):
                if f"{path.name} {code.co_name}" in AT_IMPORT:
                    continue
                lines = {line for _, line in dis.findlinestarts(code)} - {None, code.co_firstlineno}
                found = [line for line in sorted(lines) if (file, line) not in self.seen]
                missing += [f"{path.name}:{line}" for line in found]
        return missing


LINES = Lines()


@pytest.fixture(autouse=True)
def traced():
    before = sys.gettrace()
    sys.settrace(LINES.trace)
    threading.settrace(LINES.trace)
    yield
    sys.settrace(before)
    threading.settrace(None)


@pytest.fixture(scope="module")
def llama():
    """Imported before lines are counted, which would make it slow."""
    assert pytest.importorskip("transformers").LlamaForCausalLM
    import_module("transformers.integrations.neftune")
    import_module("neftune_kernels.integrations")


# ---- a repository to be in, and steps without processes


def write_tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working directory: a build, tests and tools that cost nothing."""
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "pytest.ini").write_text(GPU_MARK)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(GPU_TESTS)
    (tmp_path / "bin").mkdir()
    for name, text in FAKE_TOOLS.items():
        write_tool(tmp_path / "bin", name, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(report.DEVICE_VARIABLE, "a device")
    monkeypatch.delenv("NEFTUNE_SELF_CHECK", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # theirs cost more than the tests
    # Compiling takes longer than everything else here, and is nothing of ours.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return tmp_path


def setting(root, name, seconds=100.0, again=False, device="cpu", **rest):
    return step.Setting(
        name, root, device, time.monotonic() + seconds, again, types.SimpleNamespace(**rest)
    )


def rows(root, step_name):
    return [row for row in report.read_rows(root / report.TABLE) if row["step"] == step_name]


def outcomes(root, step_name):
    return {row["what"]: row["outcome"] for row in rows(root, step_name)}


RUN = process.run


def run_here(command, limit, log, on_line=None, env=None):
    """process.run, but modules of bench.gpu and programs with -c run in this process, where their
    lines are seen."""
    module = command[1] == "-m" and command[2].startswith("bench.gpu.")
    if not module and command[1] != "-c":
        return RUN(command, limit, log, on_line, env)
    out, errors, begin = io.StringIO(), io.StringIO(), time.monotonic()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", command[2:])
        try:
            if module:
                code = import_module(command[2]).main(command[3:])
            else:
                exec(command[2], {"__name__": "__main__"})
                code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except Exception:
            traceback.print_exc()
            code = 1
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(errors.getvalue() + ("" if on_line else out.getvalue()))
    for line in out.getvalue().splitlines() if on_line else ():
        on_line(line)
    return process.Ended(code, time.monotonic() - begin)


MEASURED = [
    *(("ours", layout) for layout in ("nothing", "lengths", "int64 mask", "bool mask")),
    *(("ours", layout) for layout in ("cu_seqlens", "position_ids")),
    *(("ours, by default", layout) for layout in ("nothing", "int64 mask")),
    *(("numbering alone", layout) for layout in ("int64 mask", "position_ids")),
    *((what, "") for what in ("F.embedding", "copy", "HF hook", "official")),
    *((what, "") for what in ("HF hook, compiled", "official, compiled")),
]


def test_the_whole_hour(llama, root, monkeypatch, capsys):
    """Every step's command as the driver makes it; then nothing is left to do; then the plots."""
    require_native()
    monkeypatch.setattr(process, "run", run_here)
    own_check = ("-c", "print('every backend equals the reference')")
    steps = [
        one._replace(command=own_check) if one.name == "check" else one for one in first_gpu.STEPS
    ]
    monkeypatch.setattr(first_gpu, "STEPS", steps)
    arguments = ["--device", "cpu", "--out", "out", "--commit", "abc"]
    assert first_gpu.main(arguments) == step.PASSED
    out = root / "out"
    text = (out / report.REPORT).read_text()
    places = [text.index(f"\n## {one.name}: ") for one in steps]
    assert places == sorted(places)
    assert "| commit | abc |" in text and "| torch |" in text
    assert "every backend equals the reference" in text
    everything = report.read_rows(out / report.TABLE)
    assert all(row["device"].endswith("checks the program") for row in everything)
    last = {row["step"]: row["outcome"] for row in everything if row["what"] == report.ENDED}
    assert last == dict.fromkeys([one.name for one in steps], "passed")
    notes = [row["note"] for row in rows(out, "smoke") if row["what"] == smoke.WHAT]
    assert notes == ["18 of 18 calls equal"] * 6
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        timed = [row for row in rows(out, f"times-{dtype}") if row["shape"] == "(2, 8, 1024)"]
        assert sorted((row["what"], row["layout"]) for row in timed) == sorted(MEASURED)
        for row in timed:
            assert float(row["p10_us"]) <= float(row["device_us"]) <= float(row["p90_us"])
            assert float(row["host_us"]) > 0 and row["dtype"] == dtype
        (lookup,) = [row for row in timed if row["what"] == "F.embedding"]
        assert float(lookup["ratio"]) == 1
        assert int(lookup["bytes"]) == 2 * 16 * 1024 * size + 8 * 16
    assert {"no noise", "ours", "HF hook"} <= outcomes(out, "training").keys()
    assert {"a good call", "a bad call"} <= outcomes(out, "debug").keys()
    (launch,) = [row for row in rows(out, "ncu") if row["what"].startswith("0 ")]
    assert launch["what"] == "0 noisy_rows (512, 8, 1)"
    assert launch["note"] == "took 18.2 us, DRAM 91.5 %"
    assert set(sanitizers.TOOLS) <= outcomes(out, "sanitizers").keys()
    assert (root / "builds").read_text() == "0 "

    capsys.readouterr()
    assert first_gpu.main(arguments) == step.PASSED
    assert len(report.read_rows(out / report.TABLE)) == len(everything)
    assert first_gpu.main([*arguments, "--list"]) == step.PASSED
    assert capsys.readouterr().out.count("| passed |") == 2 * len(first_gpu.STEPS)

    pytest.importorskip("matplotlib")
    assert first_gpu.main(["--plot", str(out / report.TABLE)]) == step.PASSED
    (drawn,) = out.glob("*.png")
    assert f"wrote {drawn}" in capsys.readouterr().out
    assert first_gpu.main(["--plot", str(root / "none.csv")]) == step.PASSED
    assert "no times" in capsys.readouterr().out


def test_real_processes(root):
    """The driver and a step as a user starts them."""
    require_native()
    options = ("--device", "cpu", "--steps", "smoke", "--out", "out")
    command = [sys.executable, "-m", "bench.first_gpu", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == step.PASSED, done.stdout + done.stderr
    assert (root / "out" / report.REPORT).read_text().strip() == done.stdout.strip()
    assert outcomes(root / "out", "smoke")[report.ENDED] == "passed"


def test_without_a_gpu(root, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(process, "run", run_here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_gpu.main(["--out", "out"]) == step.NO_DEVICE
    said = capsys.readouterr().out
    assert "sees no CUDA device" in said
    for one in first_gpu.STEPS:
        assert f"| {one.name} | {one.limit} s | not yet |" in said
    assert not (root / "out" / report.REPORT).exists()


def test_the_limits():
    assert all(one.limit <= 480 for one in first_gpu.STEPS)
    assert sum(one.limit for one in first_gpu.STEPS) <= first_gpu.BUDGET == 2400


# ---- the driver, with steps of a line


def fake(name, text, limit=20, least=1, **options):
    return first_gpu.Step(name, limit, least, f"step {name}", ("-c", text), ours=False, **options)


@pytest.fixture
def drive(root, monkeypatch):
    """drive(steps, *arguments) → exit status and report of one call with these steps."""
    monkeypatch.setattr(first_gpu, "ask_machine", lambda device, folder: {"device": "a device"})

    def drive(steps, *arguments):
        monkeypatch.setattr(first_gpu, "STEPS", tuple(steps))
        code = first_gpu.main(["--out", "out", "--device", "cpu", *arguments])
        return code, (root / "out" / report.REPORT).read_text()

    return drive


def ended(root, steps):
    return {one.name: outcomes(root / "out", one.name).get(report.ENDED) for one in steps}


def test_a_failing_step_spoils_only_itself(root, drive):
    """It crashes, hangs or is not there; the report has its exit status and its last lines."""
    steps = [
        fake("raises", "print('as far as this'); raise ValueError('the reason why')"),
        fake("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        fake(
            "hangs",
            "import sys, time; print('still at it', file=sys.stderr, flush=True); time.sleep(60)",
            3,
        ),
        fake("not-here", "import sys; sys.exit(4)"),
        fake("works", "print('fine')"),
    ]
    code, text = drive(steps)
    assert code == step.FAILED
    assert ended(root, steps) == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "timed out",
        "not-here": "not here",
        "works": "passed",
    }
    places = [
        text.index(said)
        for said in (
            *("as far as this", "exit status 1 after", "ValueError: the reason why"),
            *("exit status -11 after", "ended at its limit", "\nstill at it\n", "\nfine\n"),
        )
    ]
    assert places == sorted(places)
    before = report.read_rows(root / "out" / report.TABLE)
    assert drive(steps)[0] == step.FAILED
    assert report.read_rows(root / "out" / report.TABLE) == before
    assert drive(steps, "--again", "--steps", "works")[0] == step.PASSED
    assert len(rows(root / "out", "works")) == 4 and len(rows(root / "out", "raises")) == 2


def test_the_budget(root, drive):
    """No step begins without room for it; what is cut off runs again, behind what never ran."""
    steps = [
        fake("wants", "print()", 20, least=15),
        fake("long", "import time; time.sleep(60)", 20),
        fake("short", "print('short ran')"),
    ]
    code, text = drive(steps, "--budget", "2")
    assert code == step.PARTIAL
    assert ended(root, steps) == {"wants": None, "long": "cut off", "short": None}
    assert "wants does not begin: " in text and "of the budget are left, it wants 15" in text
    steps[1] = fake("long", "print('the second time')")
    code, text = drive(steps)
    assert code == step.PASSED
    assert text.index("short ran") < text.index("the second time")


def test_another_device_starts_anew(root, drive, monkeypatch):
    steps = [fake("one", "print('ran')")]
    assert drive(steps)[1].count("\nran\n") == 1 and drive(steps)[1].count("\nran\n") == 1
    other = {"device": "another device"}
    monkeypatch.setattr(first_gpu, "ask_machine", lambda device, folder: other)
    assert drive(steps)[1].count("\nran\n") == 2
    assert {row["device"] for row in rows(root / "out", "one")} == {"a device", "another device"}


CRASHES = """
import pathlib, sys, os
from bench.gpu import report
out = pathlib.Path("out")
done = [row for row in report.rows_of(out, "times") if row["what"].startswith("row")]
if len(done) == 3:
    sys.exit(0)
report.write_row(out, "times", f"row {len(done)}", "passed")
os.abort()
"""


def test_a_crash_restarts_behind_the_row(root, drive):
    """As often as a row crashes, but not without end."""
    (one,) = steps = [fake("times", CRASHES, restarts=True)]
    code, text = drive(steps)
    assert code == step.PASSED and text.count("The process crashed (exit status -6") == 3
    found = [row["what"] for row in rows(root / "out", "times")]
    assert found == ["begun", "row 0", "row 1", "row 2", "ended"]
    steps = [one._replace(name="endless", command=("-c", "import os; os.abort()"))]
    assert drive(steps)[0] == step.FAILED and ended(root, steps) == {"endless": "failed"}
    steps = [one._replace(name="once", command=("-c", "import os; os.abort()"), restarts=False)]
    code, text = drive(steps)
    assert text.count("The process crashed") == 3 + first_gpu.MOST_RESTARTS


DRIVER = """
import sys
from bench import first_gpu
first_gpu.ask_machine = lambda device, folder: {"device": "a device"}
first_gpu.STEPS = tuple(
    first_gpu.Step(name, 60, 1, "a step", ("-c", text), ours=False)
    for name, text in (
        ("first", "print('first done')"),
        ("second", sys.argv[1]),
        ("third", "print('third done')"),
    )
)
sys.exit(first_gpu.main(["--out", "out", "--device", "cpu"]))
"""
SLOW = """
import os, pathlib, time
from bench.gpu import report
report.write_row(pathlib.Path("out"), "second", "a row", "passed")
print("process", os.getpid(), flush=True)
if not pathlib.Path("quick").exists():
    time.sleep(60)
"""


def alive(number):
    """Whether the process runs; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{number}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("half a minute was not enough")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM), ids=lambda number: number.name)
def test_cut_off_from_outside(root, how):
    """What was measured is on the disk, the step does not live on, and the next call goes on."""
    (root / "driver.py").write_text(DRIVER)
    out, command = root / "out", [sys.executable, "driver.py", SLOW]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def said():
        return (out / report.REPORT).read_text() if (out / report.REPORT).exists() else ""

    wait_until(lambda: re.search(r"\nprocess \d+\n", said()))
    number = int(said().split("\nprocess ")[1].split()[0])
    os.kill(driver.pid, how)
    code = driver.wait(timeout=30)
    wait_until(lambda: not alive(number))
    assert outcomes(out, "first")[report.ENDED] == "passed"
    assert outcomes(out, "second")["a row"] == "passed"
    assert "first done" in said() and "third done" not in said()
    if how == signal.SIGTERM:
        assert code == step.PARTIAL
        assert "**Stopped by SIGTERM.**" in said() and "second: cut off" in said()
        assert outcomes(out, "second")[report.ENDED] == "cut off"
    else:
        assert code == -how and report.ENDED not in outcomes(out, "second")
    (root / "quick").touch()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == step.PASSED, done.stdout + done.stderr
    assert said().count("first done") == 1 and said().count("\nprocess ") == 2
    # What never began comes first.
    assert said().index("third done") < said().rindex("\nprocess ")


def test_signals_stop_a_call(root, drive):
    """As above, within this process."""
    text = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM)\nimport time; time.sleep(60)"
    steps = [fake("stops", text), fake("later", "print('never')")]
    code, text = drive(steps)
    assert code == step.PARTIAL and ended(root, steps) == {"stops": "cut off", "later": None}
    assert "**Stopped by SIGTERM.**" in text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_which_state_it_was(root, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    assert first_gpu.commit() == "no git here"
    nothing = first_gpu.sources()
    (root / "neftune_kernels").mkdir()
    (root / "neftune_kernels" / "a.py").write_text("a")
    assert first_gpu.sources() != nothing
    for arguments in (["init", "-q"], ["add", "setup.py"]):
        subprocess.run(["git", *arguments], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-q", "--no-verify", "-m", "one"], check=True)
    assert re.fullmatch("[0-9a-f]{12} with changes", first_gpu.commit())
    (root / ".gitignore").write_text("*\n")
    assert re.fullmatch("[0-9a-f]{12}", first_gpu.commit())


# ---- report, processes, device


def test_lines_that_were_cut_off(root):
    """They spoil no other, and count as never written."""
    report.write_row(root, "one", "whole", "passed", note="a, b\nc", device_us=1.23456789)
    path = root / report.TABLE
    path.write_text(path.read_text() + "a device,one,cut")
    report.write_row(root, "one", "after", "failed")
    whole, after = report.rows_of(root, "one")
    assert (whole["what"], whole["note"], whole["device_us"]) == ("whole", "a, b c", "1.2346")
    assert (after["what"], after["outcome"], after["note"]) == ("after", "failed", "")
    assert report.rows_of(root, "two") == []
    with pytest.raises(ValueError, match="no such column: colour"):
        report.write_row(root, "one", "whole", "passed", colour="red")


def test_processes(root, monkeypatch):
    log = root / "logs" / "a.log"
    assert process.tail(log) == ""
    program_ = "import sys; print('out'); sys.stderr.write('err\\n'); sys.exit(7)"
    assert process.run([sys.executable, "-c", program_], 20, log).code == 7
    assert process.tail(log).splitlines()[-2:] in (["out", "err"], ["err", "out"])
    children = (
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    lines = []
    assert process.run([sys.executable, "-c", children], 3, log, lines.append).code is None
    wait_until(lambda: not alive(int(lines[0])))
    asked = []
    libc = types.SimpleNamespace(prctl=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(process, "LIBC", libc)
    process.end_with_parent()
    assert asked == [(1, signal.SIGKILL)]


class Recorder:
    """torch.cuda of a machine that does not exist: what is called, in order."""

    def __init__(self, monkeypatch):
        self.calls, self.now = [], 0.0
        recorder = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = recorder.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                recorder.calls.append("replay")
                recorder.now += 6.0  # milliseconds

        @contextlib.contextmanager
        def within(name):
            self.calls.append(f"{name} begins")
            yield
            self.calls.append(f"{name} ends")

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: within("stream"),
            "CUDAGraph": Graph,
            "graph": lambda _: within("capture"),
            "synchronize": lambda: self.calls.append("synchronize"),
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "max_memory_allocated": lambda: 17,
            "reset_peak_memory_stats": lambda: self.calls.append("reset"),
            "is_available": lambda: True,
            "get_device_capability": lambda device: (9, 0),
            "get_device_properties": lambda device: types.SimpleNamespace(
                name="NVIDIA H100",
                major=9,
                minor=0,
                total_memory=80 << 30,
                multi_processor_count=132,
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def fake_cuda(monkeypatch):
    return Recorder(monkeypatch)


def test_graph_replay(fake_cuda):
    """Warmed up on a side stream, captured once; only the replay lies between the events."""
    ours, calls = clock.clock_of("cuda"), fake_cuda.calls
    replay = ours.record([lambda i=i: calls.append(f"run {i}") for i in range(3)])
    assert calls == [
        *("stream begins", "run 0", "run 1", "stream ends", "synchronize"),
        *("capture begins", "run 0", "run 1", "run 2", "capture ends", "replay"),
    ]
    assert replay() == pytest.approx(2e-3) and calls[-2:] == ["replay", "synchronize"]
    ours.release_memory()
    assert ours.peak_bytes() == 17 and calls[-2:] == ["empty_cache", "reset"]
    calls.clear()
    assert clock.host_seconds(lambda: calls.append("run"), ours, samples=2) > 0
    assert calls == ["run", "synchronize", *["run"] * ours.host_calls, "synchronize"] * 2


def test_a_gpu_described(root, fake_cuda, monkeypatch):
    found = machine.describe("cuda")
    assert (found["device"], found["capability"]) == ("NVIDIA H100", "9.0")
    assert found["memory"] == "80 GiB"
    assert found["nvidia-smi"].endswith(": 580.1, 1980 MHz") and found["nvcc"] == "13.0.88"
    assert times.state("cuda").endswith("580.1, 1980 MHz")
    assert machine.version("no-such-package") == "none"
    assert machine.ask(["no-such-tool"]) == "no no-such-tool here"
    write_tool(root / "bin", "nvidia-smi", "exit 9")
    assert machine.ask(["nvidia-smi"], "(absent)") == "nvidia-smi exit status 9"
    write_tool(root / "bin", "nvidia-smi", "sleep 60")
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: real(command, **(options | {"timeout": 0.2}))
    )
    assert machine.ask(["nvidia-smi"]) == "nvidia-smi failed: TimeoutExpired"


def test_shapes_of_a_gpu():
    """All that were asked for; and enough inputs to go round its caches."""
    tokens, widths = (8, 64, 512, 4096, 16384), (576, 2048, 4096, 8192)
    found = [(rows_ * columns, width) for rows_, columns, width in providers.shapes(False)]
    assert sorted(found) == sorted([*itertools.product(tokens, widths), (65536, 1024)])
    for shape, count in (((8, 512, 4096), 4), ((1, 8, 576), 64), ((8, 2048, 8192), 2)):
        case = providers.case_of(shape, torch.bfloat16, False)
        assert providers.rotation(case, "cuda") == count


# ---- the steps when something is wrong


def test_build_fails(root, fake_cuda, capsys):
    assert build.build(setting(root, "build", device="cuda")) == step.PASSED
    assert (root / "builds").read_text() == "190 "
    for path in (root / "neftune_kernels").iterdir():
        path.unlink()
    (root / "no-nvcc").touch()
    assert build.build(setting(root, "build", device="cuda")) == step.FAILED
    # The last one without CUDA, for the C++ kernel.
    assert (root / "builds").read_text() == "190 190 0 "
    found = {(row["backend"], row["outcome"], row["note"]) for row in rows(root, "build")[2:]}
    assert found == {
        ("cpp", "passed", "neftune_kernels/_C.abi3.so, 7 bytes"),
        ("cuda", "failed", "no CUDA toolkit"),
    }
    assert "but there is no nvcc" in capsys.readouterr().out
    (root / "neftune_kernels" / "_build_error_cuda.txt").unlink()
    (root / "setup.py").write_text("")
    assert build.build(setting(root, "build", device="cuda")) == step.FAILED
    assert rows(root, "build")[-1]["note"] == "not built"


def test_wrong_bits_are_seen(root, monkeypatch, capsys):
    require_native()
    real, calls = smoke.noisy_embedding, []

    def wrong(ids, weight, alpha, **given):
        out = real(ids, weight, alpha, **given)
        if given["backend"] == "cpp" and out.dtype == torch.float16 and out.shape[-1] == 20:
            calls.append(given)
            if "cu_seqlens" in given:
                raise RuntimeError("no kernel image")
            if "lengths" in given and len(calls) % 2 == 0:  # the fast launch alone
                out[1, 2, 3] = 7
        return out

    monkeypatch.setattr(smoke, "noisy_embedding", wrong)
    assert smoke.smoke(setting(root, "smoke")) == step.FAILED
    failed = [
        (row["layout"], row["what"], row["note"])
        for row in rows(root, "smoke")
        if row["outcome"] == "failed" and row["layout"]
    ]
    assert {(layout, call) for layout, call, _ in failed} == {
        *(("cu_seqlens", call) for call in smoke.CALLS),
        *((layout, smoke.CALLS[1]) for layout in ("lengths", "embed_scale")),
    }
    notes = sorted(note.split(" instead of ")[0] for *_, note in failed)
    one_element = "1 of 6160 elements differ, first at (1, 2, 3): 7.0"
    assert notes == [one_element] * 2 + ["RuntimeError: no kernel image"] * 2
    assert "14 of 18 calls equal" in capsys.readouterr().out
    reasons = {"cpp": "built by another torch"}
    monkeypatch.setattr(smoke, "available_backends", lambda device: reasons)
    assert smoke.smoke(setting(root, "smoke")) == step.FAILED
    assert rows(root, "smoke")[-1]["note"] == "built by another torch"
    assert smoke.difference(torch.zeros(2), torch.zeros(3)) == "shape (2,) instead of (3,)"
    only_sign = smoke.difference(torch.tensor([-0.0]), torch.tensor([0.0]))
    assert only_sign == "differs in the sign of zeros or in NaN alone"


def write_tests(root, **files):
    for path in (root / "tests").glob("*.py"):
        path.unlink()
    for name, text in files.items():
        (root / "tests" / f"test_{name}.py").write_text(
            f"import pytest\npytestmark = pytest.mark.gpu\n{text}"
        )


@pytest.fixture
def soon_cut_off(monkeypatch):
    """Commands that say "hang" have a short limit, whatever else this machine is doing."""

    def run(command, limit, *arguments, **options):
        short = any("hang" in word for word in command)
        return RUN(command, 1.0 if short else limit, *arguments, **options)

    monkeypatch.setattr(process, "run", run)


def test_gpu_tests_that_fail(root, soon_cut_off, monkeypatch, capsys):
    """Fail, crash, hang, skip, cannot be imported: each costs its own part alone."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    write_tests(
        root,
        bad="def test_a(): assert 1 == 2\ndef test_b(): pass\n",
        broken="import no_such_package\n",
        crash="import os\ndef test_c(): os.abort()\n",
        hang="import time\ndef test_d(): time.sleep(60)\n",
        skip="def test_e(): pytest.skip('no second GPU')\n",
    )
    assert tests.tests(setting(root, "tests")) == step.FAILED
    said = capsys.readouterr().out
    assert outcomes(root, "tests") == {
        "collection": "failed",
        "tests/test_bad.py": "failed",
        "tests/test_crash.py": "failed",
        "tests/test_hang.py": "cut off",
        "tests/test_skip.py": "skipped",
    }
    assert "no_such_package" in said and "assert 1 == 2" in said
    assert "1 skipped: no second GPU" in said
    notes = {row["what"]: row["note"] for row in rows(root, "tests")}
    assert notes["tests/test_bad.py"] == "1 passed, 1 failed, 0 skipped"
    assert notes["tests/test_crash.py"].startswith("exit status -6 after ")
    assert notes["tests/test_hang.py"].startswith("ended at its limit after 1 s, no result of 1 ")


def test_gpu_tests_that_were_cut_off_run_again(root, soon_cut_off):
    hangs = "import time\ndef test_d(): time.sleep(60)\n"
    write_tests(root, hang=hangs, fine="def test_e(): pass\n")
    assert tests.tests(setting(root, "tests")) == step.PARTIAL
    before = len(rows(root, "tests"))
    assert tests.tests(setting(root, "tests")) == step.PARTIAL
    new = [row["what"] for row in rows(root, "tests")[before:]]
    assert new == ["collection", "tests/test_hang.py"]
    write_tests(root, skip="def test_f(): pytest.skip('no GPU')\n")
    assert tests.tests(setting(root, "tests")) == step.FAILED  # no test passed
    write_tests(root)
    assert tests.tests(setting(root, "tests")) == step.FAILED  # no test at all


def test_files_are_dealt_out():
    """Neighbours stay together, no part is larger than its share, and every test is in one."""
    found = [f"a.py::test[{i}]" for i in range(10)] + ["b.py::test"]
    parts = tests.parts_of(found, 3)
    assert [part.name for part in parts] == ["a.py 1 of 3", "a.py 2 of 3", "a.py 3 of 3", "b.py"]
    assert [len(part.tests) for part in parts] == [4, 4, 2, 1]
    assert [test for part in parts for test in part.tests] == found
    assert tests.parts_of([], 3) == []


def time_setting(root, seconds=100.0, again=False):
    return setting(root, "times-float32", seconds, again, dtype="float32")


@pytest.fixture
def one_shape(root, monkeypatch):
    require_native()
    monkeypatch.setattr(times, "shapes", lambda tiny: [(2, 8, 1024)])


def test_times_of_wrong_results(root, one_shape, monkeypatch):
    """What differs from the reference is not timed, nor tried again by the next process."""
    real, name = providers.noisy_embedding, "times-float32"

    def wrong(ids, weight, alpha, **given):
        out = real(ids, weight, alpha, **given)
        return out.neg() if given.get("backend") != "reference" and "lengths" in given else out

    with monkeypatch.context() as broken:
        broken.setattr(providers, "noisy_embedding", wrong)
        broken.setattr(providers.Numbering, "run", lambda self, inputs: 1 / 0)
        assert times.times(time_setting(root)) == step.FAILED
        failed = [row for row in rows(root, name) if row["outcome"] == "failed"]
        assert {(row["what"], row["layout"], row["note"]) for row in failed} == {
            ("ours", "lengths", f"AssertionError: {providers.DIFFERENT}"),
            ("numbering alone", "int64 mask", "ZeroDivisionError: division by zero"),
            ("numbering alone", "position_ids", "ZeroDivisionError: division by zero"),
        }
        count = len(rows(root, name))
        assert count == len(MEASURED) and not list(root.glob("*.doing"))
        assert times.times(time_setting(root)) == step.FAILED
        assert len(rows(root, name)) == count
    report.write_row(root, name, report.BEGUN, "")
    assert times.times(time_setting(root, again=True)) == step.PASSED
    assert len(rows(root, name)) == 2 * count + 1


def test_times_after_a_crash(root, one_shape, monkeypatch):
    """A lost device ends the process with a status of its own; the next leaves out the row."""
    arguments = ["--device", "cpu", "--out", str(root), "--dtype", "float32"]
    with monkeypatch.context() as broken:
        broken.setattr(clock.CpuClock, "synchronise", lambda self: 1 / 0)
        assert times.main(arguments) == step.CRASHED
    assert outcomes(root, "times-float32") == {"F.embedding": "failed"}
    times.Doing(time_setting(root)).begin("(2, 8, 1024)", "official", "", "")
    assert times.main(arguments) == step.FAILED
    found = {row["what"]: row for row in rows(root, "times-float32")}
    assert found["official"]["note"] == "the process ended while it measured this"
    assert found["official"]["outcome"] == "failed"
    # F.embedding failed once and has no second row; for the ratio it is timed.
    assert found["F.embedding"]["outcome"] == "failed"
    assert found["copy"]["outcome"] == "passed" and float(found["copy"]["ratio"]) > 0


def test_times_stop_by_themselves(root, one_shape, capsys):
    assert times.times(time_setting(root, seconds=10)) == step.PARTIAL
    assert "Stopped before (2, 8, 1024)" in capsys.readouterr().out
    assert not rows(root, "times-float32")


def test_checks_of_the_measured():
    """They see other numbers, a seed of one's own and documents that are numbered otherwise."""
    require_native()
    case = providers.case_of((2, 8, 64), torch.float32, True)
    told, (inputs, _) = providers.layouts(case, "cpu"), providers.make_inputs(case, "cpu")
    for one in providers.make_ours(told, ["cpp"]) + providers.make_numbering(told, ["cpp"]):
        assert one.check(inputs) == ""
    ours = providers.Ours(told)
    real = ours.run_by_default
    ours.run_by_default = lambda layout, inputs: real(layout, inputs) + 1
    assert ours.check_by_default("nothing", inputs) == providers.DIFFERENT
    numbering = providers.Numbering(told["int64 mask"], "cpp")
    operator = numbering._operator
    for word in (1, 2, 3):  # of the first row: where its run begins, how long it is, its number

        def wrong(*given, word=word):
            found = operator(*given).clone()
            found[word] += 1
            return found

        numbering._operator = wrong
        assert numbering.check(inputs) == "numbers otherwise than the reference"


def test_training_without_noise_is_no_measurement(llama, root, monkeypatch, capsys):
    handle = types.SimpleNamespace(remove=lambda: None)
    monkeypatch.setattr(training, "apply_neftune", lambda model, noise_alpha: handle)
    assert training.training(setting(root, "training")) == step.FAILED
    assert rows(root, "training")[0]["note"] == "its loss is that without noise"
    assert "**ours** changes nothing" in capsys.readouterr().out
    assert training.training(setting(root, "training", seconds=0)) == step.FAILED
    assert "Stopped after 1 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ("good", "bad"))
def test_debug_that_does_not_work(root, monkeypatch, capsys, kind):
    """Good calls that die, bad ones that pass or die of something else."""
    programs = {
        "good": "import sys; sys.exit('device-side assert triggered')",
        "bad": "print('every call passed')",
    }
    monkeypatch.setattr(debug, "PROGRAM", programs[kind])
    assert debug.debug(setting(root, "debug")) == step.FAILED
    failed = [row["what"] for row in rows(root, "debug") if row["outcome"] == "failed"]
    assert failed == (["a good call", "a bad call"] if kind == "good" else ["a bad call"])
    assert "expected an exit status that is not 0" in rows(root, "debug")[1]["note"]
    assert "A bad call:" in capsys.readouterr().out


def test_tools_that_are_not_there(root, monkeypatch):
    for name in ("ncu", "compute-sanitizer"):
        (root / "bin" / name).unlink()
    monkeypatch.setenv("PATH", str(root / "bin"))
    monkeypatch.setattr(step, "TOOL_FOLDERS", (str(root / "elsewhere"),))
    assert ncu.ncu(setting(root, "ncu")) == step.NOT_HERE
    assert sanitizers.sanitizers(setting(root, "sanitizers")) == step.NOT_HERE
    (root / "elsewhere").mkdir()
    write_tool(root / "elsewhere", "ncu", "echo no permission; exit 1")
    assert ncu.ncu(setting(root, "ncu")) == step.FAILED


SANITIZER = """
case "$*" in
  *memcheck*) echo '===== Invalid __global__ read'; echo '===== ERROR SUMMARY: 3 errors'; exit 9 ;;
  *racecheck*) sleep 60 ;;
  *initcheck*) exit 0 ;;
  *) echo '===== ERROR SUMMARY: 0 errors' ;;
esac
"""


def test_sanitizers_that_find_something(root, monkeypatch, capsys):
    def run(command, limit, *arguments, **options):
        return RUN(command, 0.5 if "racecheck" in command else limit, *arguments, **options)

    monkeypatch.setattr(process, "run", run)
    write_tool(root / "bin", "compute-sanitizer", SANITIZER)
    assert sanitizers.sanitizers(setting(root, "sanitizers")) == step.FAILED
    assert outcomes(root, "sanitizers") == {
        "memcheck": "failed",
        "racecheck": "cut off",
        "initcheck": "failed",  # without a summary it checked nothing
        "synccheck": "passed",
    }
    assert "Invalid __global__ read" in capsys.readouterr().out
    note = rows(root, "sanitizers")[0]["note"]
    assert note.startswith("ERROR SUMMARY: 3 errors; exit status 9")
    before = len(rows(root, "sanitizers"))
    assert sanitizers.sanitizers(setting(root, "sanitizers")) == step.FAILED
    assert [row["what"] for row in rows(root, "sanitizers")[before:]] == ["racecheck"]
    for name in ("memcheck", "initcheck"):
        report.write_row(root, "sanitizers", name, "passed")
    assert sanitizers.sanitizers(setting(root, "sanitizers")) == step.PARTIAL


def test_the_program_for_the_tools(fake_cuda, monkeypatch, capsys):
    require_native()
    for kind, calls in (("checked", 18), ("profiled", 2)):
        assert program.main([kind, "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"cpp: {calls} calls\n"
    monkeypatch.setattr(
        program, "available_backends", lambda device: {"triton": "no triton", "cuda": "not built"}
    )
    assert program.main(["checked"]) == 0
    assert (
        capsys.readouterr().out == "triton: no triton\ncuda: not built\n"
        and fake_cuda.calls == ["synchronize"]
    )


def test_every_line_ran(request):
    """Whatever is added to the driver or a step is executed here, or this fails."""
    here = {item.originalname for item in request.session.items if item.path == request.path}
    if (
        here != {name for name in globals() if name.startswith("test_")}
        or request.session.testsfailed
    ):
        pytest.skip("only where all tests of this file ran and passed")
    assert LINES.missing() == []
