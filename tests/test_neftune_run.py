"""neftune-run: whatever a command starts has this package's noise, or it is said.

What is about processes runs on stubs of transformers and of this package, which start in no time;
torchrun and `trl sft` run on the real ones, under a probe in a sitecustomize of their own.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCHER = (sys.executable, "-m", "neftune_run")
PYTHON = sys.executable
pytestmark = pytest.mark.skipif(os.name != "posix", reason="neftune-run is for POSIX systems")

STUBS = {
    "transformers/__init__.py": "",
    "transformers/trainer.py": """
        def train():
            patch.on_noise()
        """,
    "neftune_kernels/__init__.py": "",
    "neftune_kernels/integrations/__init__.py": "",
    "neftune_kernels/integrations/transformers.py": """
        import types
        from transformers import trainer
        def patch_trainer(noise_alpha=None):
            trainer.patch = types.SimpleNamespace(on_noise=None)
            print("patched", noise_alpha, flush=True)
            return trainer.patch
        """,
    "litgpt/__init__.py": "import litgpt.model",
    "litgpt/model.py": "",
    "litgpt/lora.py": "import litgpt.model",
    "neftune_kernels/integrations/litgpt.py": """
        def patch_gpt(module, noise_alpha, on_noise):
            print("patched", module.__name__, noise_alpha, flush=True)
            on_noise()
        """,
    "training.py": """
        import transformers.trainer
        def train():
            transformers.trainer.train()
        if __name__ == "__main__":
            train()
        """,
    "processes.py": """
        import multiprocessing, sys
        def work():
            import training
            training.train()
        if __name__ == "__main__":
            process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
            process.start()
            process.join()
            sys.exit(process.exitcode)
        """,
}


def write(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stubs"), STUBS)


def environment(*path, **changed):
    inherited = {name: text for name, text in os.environ.items() if "NEFTUNE_RUN" not in name}
    pythonpath = os.pathsep.join(map(str, (*path, ROOT)))
    return {**inherited, "PYTHONPATH": pythonpath, "OMP_NUM_THREADS": "1", **changed}


def run(*command, options=(), path=(), launcher=LAUNCHER, folder=None, **changed):
    return subprocess.run(
        [str(part) for part in (*launcher, *options, *command)],
        capture_output=True,
        text=True,
        cwd=folder or next(iter(path), None),  # `-c` and `-m` look there first
        env=environment(*path, **changed),
        timeout=600,  # a launcher that waits for ever fails
    )


WAYS = {
    "script": (PYTHON, "{}/training.py"),
    "module": (PYTHON, "-m", "training"),
    "shell": ("sh", "-c", f"'{PYTHON}' {{}}/training.py"),
    "fork": (PYTHON, "{}/processes.py", "fork"),
    "spawn": (PYTHON, "{}/processes.py", "spawn"),
    "forkserver": (PYTHON, "{}/processes.py", "forkserver"),
    "neftune-run": (*LAUNCHER, PYTHON, "{}/training.py"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_process_is_reached(way, stubs):
    command = [part.format(stubs) for part in WAYS[way]]
    done = run(*command, options=["--strict"], path=[stubs])
    assert (done.returncode, done.stdout, done.stderr) == (0, "patched None\n", "")


def test_accelerate_launch(stubs):
    pytest.importorskip("accelerate")
    launch = (PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    script = stubs / "accelerated.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(stubs)!r}); import training as it")
    script.write_text(script.read_text() + "; it.train()")
    done = run(*launch, script, options=["--strict"])
    assert (done.returncode, done.stdout) == (0, "patched None\n"), done.stderr
    assert "neftune-run" not in done.stderr


def test_the_alpha_reaches_every_process(stubs):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'training'])"
    done = run(PYTHON, "-c", code, options=["--alpha", "2.5"], path=[stubs])
    assert (done.stdout, done.stderr) == ("patched 2.5\n", "")


def test_the_nearest_alpha_counts(stubs):
    inner = (*LAUNCHER, "--alpha", "3", PYTHON, "-m", "training")
    assert run(*inner, options=["--alpha", "2"], path=[stubs]).stdout == "patched 3.0\n"


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", "five"])
def test_a_bad_alpha_is_refused(bad):
    done = run("true", options=[f"--alpha={bad}"])
    assert done.returncode == 2 and f"must be finite and >= 0, got '{bad}'" in done.stderr


def test_no_command_is_refused():
    assert run().returncode == 2 and "no COMMAND to run" in run(options=["--"]).stderr


def test_arguments_of_the_command_are_its_own():
    code = "import sys; print(sys.argv[1:])"
    done = run(PYTHON, "-c", code, "--alpha", "-1", "--", "--strict", options=["--"])
    assert done.stdout == "['--alpha', '-1', '--', '--strict']\n" and done.returncode == 0


def test_nothing_heavy_is_imported():
    """Beyond what the same Python imports at its start without us."""
    code = "import sys; print(*sorted(sys.modules))"
    reached = set(run(PYTHON, "-c", code).stdout.split())
    plain = set(run(PYTHON, "-c", code, launcher=()).stdout.split())
    assert reached - plain <= {"sitecustomize"}
    launch = (
        "import sys, neftune_run\n"
        "try: neftune_run.main()\n"
        "except SystemExit: print(*sorted(sys.modules))"
    )
    imported = set(run(launcher=(PYTHON, "-c", launch, "true")).stdout.split())
    assert "neftune_run" in imported and not {"torch", "transformers", "neftune_kernels"} & imported


NOT_REACHED = {
    "isolated": (PYTHON, "-I"),
    "no environment": (PYTHON, "-E"),
    "no site": (PYTHON, "-S"),
    "a PYTHONPATH of its own": ("env", "PYTHONPATH=", PYTHON),
}


@pytest.mark.parametrize("way", NOT_REACHED)
def test_what_is_not_reached_is_said(way, stubs):
    code = f"import sys; sys.path.insert(0, {str(stubs)!r}); import transformers.trainer"
    command = (*NOT_REACHED[way], "-c", code)
    done = run(*command)
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.startswith("neftune-run: no noise: no process of the command reported")
    assert "-I, -E or -S, or with a PYTHONPATH of its own" in done.stderr
    assert run(*command, options=["--strict"]).returncode == 3


def test_a_command_without_a_trainer_is_said(stubs):
    done = run(PYTHON, "-c", "pass", options=["--strict"], path=[stubs])
    assert done.returncode == 3 and "reached 1, none imported transformers.trainer" in done.stderr


def test_a_trainer_without_noise_is_said(stubs):
    """The trainer that trains is out of reach, or nobody has given an alpha."""
    code = "import transformers.trainer"
    done = run(PYTHON, "-c", code, options=["--strict"], path=[stubs])
    assert done.returncode == 3 and done.stdout == "patched None\n"
    assert "no training began with a neftune_noise_alpha. Set it" in done.stderr


def test_litgpt(stubs):
    """Each of its modules that has a GPT, as soon as it is there; it has no alpha of its own."""
    command = (PYTHON, "-c", "import litgpt.lora")
    done = run(*command, options=["--strict", "--alpha", "5"], path=[stubs])
    patched = "patched litgpt.model 5.0\npatched litgpt.lora 5.0\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, patched, "")
    done = run(*command, options=["--strict"], path=[stubs])
    assert done.returncode == 3 and done.stdout == "" and "or give --alpha" in done.stderr


def test_reports_leave_nothing_behind(stubs, tmp_path):
    gone = str(tmp_path / "gone")  # of a neftune-run that has ended
    for way in ("module", "neftune-run"):
        command = [part.format(stubs) for part in WAYS[way]]
        done = run(*command, path=[stubs], TMPDIR=str(tmp_path), NEFTUNE_RUN_REPORTS=gone)
        assert (done.returncode, done.stderr) == (0, "") and not list(tmp_path.iterdir())
    run("no-such-command", TMPDIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_process_may_outlive_the_command(stubs):
    child = "input(); import training; training.train(); print('trained')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        (*LAUNCHER, PYTHON, "-c", code), cwd=stubs, env=environment(stubs), **pipe
    ) as command:
        assert command.wait() == 0
        out, _ = command.communicate("go\n")
    assert out == "patched None\ntrained\n"


def test_strict_leaves_an_exit_code_of_the_command(stubs):
    assert run("sh", "-c", "exit 7", options=["--strict"]).returncode == 7


FAILURES = {
    "not installed": ("import no_such_module", "No module named 'no_such_module'"),
    "swallowed by lazy modules": ("raise AttributeError('on purpose')", "AttributeError: on purpo"),
    "an unknown transformers": (
        "def patch_trainer(alpha):\n    raise RuntimeError('give the trainer a NEFTuneCallback')",
        "RuntimeError: give the trainer a NEFTuneCallback",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_patch_stops_the_process(failure, stubs, tmp_path):
    text, reason = FAILURES[failure]
    ours = "neftune_kernels/integrations/transformers.py"
    names = ("neftune_kernels/__init__.py", "neftune_kernels/integrations/__init__.py")
    write(tmp_path, {**dict.fromkeys(names, ""), ours: text})
    done = run(PYTHON, "-c", "import training; print('on')", path=[tmp_path, stubs])
    assert done.returncode == 1 and done.stdout == ""
    assert "ImportError: neftune-run: neftune_kernels cannot replace the noise of" in done.stderr
    assert reason in done.stderr and sys.executable in done.stderr
    assert done.stderr.splitlines()[-1].startswith("neftune-run: in 1 of its processes: neftune_k")
    # a program that goes on without its trainer is told of at the end, and tries in vain again
    code = """
    for _ in range(2):
        try: import training
        except ImportError: print("none")
    """
    done = run(PYTHON, "-c", textwrap.dedent(code), options=["--strict"], path=[tmp_path, stubs])
    assert (done.returncode, done.stdout) == (3, "none\nnone\n") and reason in done.stderr


def test_another_finder_that_asks_all_finders(stubs):
    """As those of wrapt and ddtrace, and a second copy of ours."""
    code = """
    import importlib.util, sys
    class Asking:
        inside = False
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if cls.inside:
                return None
            cls.inside = True
            try:
                return importlib.util.find_spec(name)
            finally:
                cls.inside = False
    copy = type(sys.meta_path[0])()
    sys.meta_path.insert(int(sys.argv[1]), Asking)
    sys.meta_path.insert(int(sys.argv[1]), copy)
    import training
    training.train()
    """
    for place in ("0", "1"):
        done = run(PYTHON, "-c", textwrap.dedent(code), place, path=[stubs])
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert set(done.stdout.splitlines()) == {"patched None"}


SHOW_OWN = (
    "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', None), sys.path)"
)


@pytest.mark.parametrize("where", ["PYTHONPATH", "user site"])
def test_an_own_sitecustomize_runs(where, stubs, tmp_path):
    """As without us: in this Python and its site, once, with its changes of sys.path."""
    python = getattr(sys, "_base_executable", PYTHON)  # a venv has no user site
    changed = {"PYTHONUSERBASE": str(tmp_path)}
    show = (python, "-c", "import site; print(site.getusersitepackages())")
    user_site = run(*show, launcher=(), **changed).stdout.strip()
    folder = pathlib.Path(user_site) if where == "user site" else tmp_path / "own"
    write(folder, {"sitecustomize.py": "import sys\nprint('own')\nsys.path.insert(0, 'added')\n"})
    path = [stubs] if where == "user site" else [stubs, folder]
    plain = run(python, "-c", SHOW_OWN, path=path, launcher=(), **changed)
    if str(folder) not in plain.stdout:
        pytest.skip(f"this Python has a sitecustomize of its own before user sites: {plain.stdout}")
    done = run(python, "-c", SHOW_OWN, path=path, launcher=(python, "-m", "neftune_run"), **changed)
    site = str(ROOT / "neftune_run" / "site")
    assert "own" in plain.stdout.splitlines() and site in done.stdout
    # first of the launcher's own Python
    assert done.stdout.replace(f"'{site}', ", "") == f"own\n{plain.stdout}"
    code = "import training; training.train()"
    assert "patched None" in run(python, "-c", code, path=path, **changed).stdout


@pytest.mark.parametrize("error", ["ValueError('own')", "ImportError('own', name='other')"])
def test_an_own_sitecustomize_fails_as_without_us(error, stubs, tmp_path):
    write(tmp_path, {"sitecustomize.py": f"raise {error}"})
    plain = run(PYTHON, "-c", "pass", path=[stubs, tmp_path], launcher=())
    done = run(PYTHON, "-m", "training", path=[stubs, tmp_path])
    assert "own" in plain.stderr and done.returncode == plain.returncode == 0
    # first of the launcher's own Python
    assert done.stderr == 2 * plain.stderr and done.stdout == "patched None\n"


NO_SIGWAITINFO = "import signal, neftune_run; del signal.sigwaitinfo; neftune_run.main()"  # macOS
LAUNCHERS = {"sigwaitinfo": LAUNCHER, "sigwait": (PYTHON, "-c", NO_SIGWAITINFO)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_exit_codes(launcher, tmp_path):
    def code(*command):
        return run(*command, launcher=LAUNCHERS[launcher]).returncode

    assert code("sh", "-c", "exit 7") == 7 and code("true") == 0
    assert code("sh", "-c", "kill -TERM $$") == -signal.SIGTERM  # 128 + 15 in a shell
    assert code("sh", "-c", "kill -KILL $$") == -signal.SIGKILL
    assert code("no-such-command") == 127
    assert code(write(tmp_path, {"file": ""}) / "file") == 126


def test_who_ignores_its_children_has_the_exit_code():
    """Ignored SIGCHLD is inherited, and loses what became of them."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    assert run("sh", "-c", "exit 7", launcher=(PYTHON, "-c", ignore, *LAUNCHER)).returncode == 7


def test_a_shell_sees_the_commands_exit_code():
    """Also where these tests were started in the background, which ignores interrupts."""
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heed += "os.execvp(sys.argv[1], sys.argv[1:])"
    inner = " ".join(f"'{part}'" for part in (*LAUNCHER, "sh", "-c", "kill -INT $$"))
    done = run("sh", "-c", f"{inner}; exit $?", launcher=(PYTHON, "-c", heed))
    assert done.returncode == 128 + signal.SIGINT


def test_no_command_of_that_name_is_said():
    done = run("no-such-command")
    assert done.stderr == "neftune-run: no-such-command: No such file or directory\n"


WAIT = """
import signal, sys
got = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, got)
signal.alarm(60)  # what fails leaves no process behind
print("ready", flush=True)
print(signal.Signals(signal.sigwait(got)).name, flush=True)
sys.exit(5)
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_signals_reach_the_command(name, launcher):
    command = (*LAUNCHERS[launcher], PYTHON, "-c", WAIT)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(getattr(signal, name))
        assert run.stdout.readline() == f"{name}\n" and run.wait() == 5


def test_the_command_has_the_signals_it_would_have():
    """Neither what the launcher blocks nor what Python ignores."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc here")
    show = ("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status")

    start = """
    import os, signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])
    """

    def masks(*launcher):
        shown = run(
            *show, launcher=(PYTHON, "-c", textwrap.dedent(start), *launcher)
        ).stdout.splitlines()
        found = [int(line.split()[1], 16) for line in shown]
        return [mask & ~(0b11 << 31) for mask in found]  # 32 and 33 are the C library's own

    plain = masks()
    assert len(plain) == 2 and all(plain) and masks(*LAUNCHER) == plain


CTRL_C = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
signal.alarm(60)
# the terminal's is taken before the launcher could send one, since two pending ones are one
os.kill(os.getppid(), signal.SIGSTOP)
print("ready", flush=True)
signal.sigwait({signal.SIGINT})
# the launcher sends this back after any SIGINT: lower numbers are taken first
os.kill(os.getppid(), signal.SIGUSR1)
os.kill(os.getppid(), signal.SIGCONT)
signal.sigwait({signal.SIGUSR1})
print("again" if signal.SIGINT in signal.sigpending() else "once", flush=True)
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
os.kill(os.getpid(), signal.SIGINT)
"""
TERMINAL = """
import os, pty, sys
print("ended", os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])), flush=True)
"""


def test_ctrl_c_reaches_the_command_once():
    if not hasattr(signal, "sigwaitinfo"):
        pytest.skip("this system does not tell who sent a signal")
    command = (PYTHON, "-c", TERMINAL, *LAUNCHER, PYTHON, "-c", CTRL_C)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment()) as terminal:
        assert terminal.stdout.readline().strip() == b"ready"
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        out = terminal.stdout.read().decode()
    assert "once" in out and "again" not in out and f"ended {-signal.SIGINT}" in out


# ---- the real trainers

# what is only installed beside them is hidden, to start in half the time
PROBE = """
import os, sys
if "NEFTUNE_RUN_REPORTS" in os.environ:  # not in the launcher's own Python
    sys.modules.update(dict.fromkeys(("bitsandbytes", "deepspeed", "peft", "torchao")))
    import probe
"""
JUDGE = """
import json, os
import torch
from torch.nn.modules.module import register_module_forward_hook

alphas = os.environ["PROBE_ALPHAS"].split()
rank = int(os.environ.get("RANK", 0))

def judge(module, args, output):
    if not isinstance(module, torch.nn.Embedding) or not torch.is_grad_enabled():
        return
    from neftune_kernels import neftune_noise
    ids, site = args[0], vars(module).get("_neftune")
    clean = torch.nn.functional.embedding(ids, module.weight)
    noise = neftune_noise(
        ids.shape, module.embedding_dim, float(alphas.pop(0)),
        attention_mask=ids != 0, seed=site and site.last.noise.seed, replica=rank,
    )
    line = {
        "exact": torch.equal(output, clean + noise),
        "noisy": not torch.equal(output, clean),
        "lengths": (ids != 0).sum(1).tolist(),
        "columns": ids.shape[1],
    }
    with open(os.path.join(os.environ["PROBE"], str(rank)), "a") as file:
        print(json.dumps(line), file=file)

register_module_forward_hook(judge)
"""
TRAIN = """
import ast, sys
import torch, transformers

def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids}

for alpha in map(ast.literal_eval, sys.argv[2:]):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )
    transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=transformers.TrainingArguments(
            output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, neftune_noise_alpha=alpha,
        ),
        train_dataset=[{"input_ids": [4 + i] * length} for i, length in enumerate([5, 3, 7, 2])],
        data_collator=collate,
    ).train()
"""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture
def probed(tmp_path):
    """run, under a probe that looks at every embedding's training forward; its lines by rank."""
    write(tmp_path / "own", {"sitecustomize.py": PROBE, "probe.py": JUDGE, "train.py": TRAIN})
    (tmp_path / "probe").mkdir()
    changed = {**QUIET, "PROBE": str(tmp_path / "probe"), "HF_HOME": str(tmp_path / "home")}

    def go(*command, **options):
        done = run(*command, path=[tmp_path / "own"], folder=tmp_path, **changed, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted((tmp_path / "probe").iterdir())
        ]
        return done, lines

    return go


def said(done):
    return [line for line in done.stdout.splitlines() if "noise by neftune_kernels" in line]


def padded(line):
    return min(line["lengths"]) < line["columns"]


def test_torchrun(probed, tmp_path):
    """Two trainings: --alpha counts where the arguments have none. Every rank has noise of its own,
    and rank 0 says so.
    """
    pytest.importorskip("transformers")
    torchrun = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, tmp_path / "own" / "train.py", tmp_path / "out", "None", "5")
    done, ranks = probed(*command, options=["--strict", "--alpha", "3"], PROBE_ALPHAS="3 3 5 5")
    assert len(ranks) == 2 and "neftune-run" not in done.stderr
    for lines in ranks:
        assert len(lines) == 4 and all(line["exact"] and line["noisy"] for line in lines)
        assert any(map(padded, lines))
    by_us = "noise by neftune_kernels, alpha {}, replica 0, backend "
    told = said(done)
    assert len(told) == 2
    assert told[0].startswith(by_us.format(3)) and told[1].startswith(by_us.format(5))


TINY = """
per_device_train_batch_size: 4
max_steps: 2
learning_rate: 1.0e-3
logging_steps: 1
report_to: none
save_strategy: "no"
use_cpu: true
bf16: false
gradient_checkpointing: false
dtype: float32
"""


def test_trl_sft(probed, tmp_path):
    """The file and the command of docs/neftune_run.md, and the line that it promises."""
    pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 11)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    model, data = tmp_path / "model", tmp_path / "data"
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(model)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    texts = [" ".join([f"w{3 + i}"] * length) for i, length in enumerate([9, 5, 3, 2, 8, 4, 6, 7])]
    write(data, {"train.jsonl": "\n".join(json.dumps({"text": text}) for text in texts)})
    file = tmp_path / "sft.yaml"
    page = (ROOT / "docs" / "neftune_run.md").read_text()
    config = re.search(r"```yaml\n(.*?)```", page, flags=re.S)[1]
    ours = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "out"}
    for key, value in ours.items():
        config, replaced = re.subn(f"^{key}: .*$", f"{key}: {value}", config, flags=re.M)
        assert replaced == 1
    file.write_text(config + TINY)
    assert "neftune-run trl sft --config sft.yaml\n" in page
    command = (PYTHON, "-m", "trl.cli.main", "sft", "--config", file)
    done, (lines,) = probed(*command, options=["--strict"], PROBE_ALPHAS="5 5")
    assert len(lines) == 2 and all(line["exact"] and line["noisy"] for line in lines)
    assert all(map(padded, lines)) and "neftune-run" not in done.stderr
    (line,) = said(done)
    promised = re.search(r"^noise by neftune_kernels, .* backend ", page, flags=re.M)[0]
    assert line.startswith(promised) and "neftune/length_min" in done.stdout


def test_the_lazy_module_of_transformers_passes_a_failure_on(stubs, tmp_path):
    """Around a trainer.py that takes no seconds; an AttributeError it would swallow."""
    pytest.importorskip("transformers")
    names = ("neftune_kernels/__init__.py", "neftune_kernels/integrations/__init__.py")
    ours = {"neftune_kernels/integrations/transformers.py": "raise AttributeError('on purpose')"}
    write(tmp_path, {**dict.fromkeys(names, ""), **ours})
    code = f"""
    import importlib.util, sys, transformers
    class Trainer:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "transformers.trainer":
                return importlib.util.spec_from_file_location(name, {str(stubs / "trainer.py")!r})
    sys.meta_path.insert(1, Trainer)
    from transformers import Trainer
    """
    (stubs / "trainer.py").write_text("class Trainer: pass")
    done = run(PYTHON, "-c", textwrap.dedent(code), path=[tmp_path], **QUIET)
    assert done.returncode == 1 and "ImportError: neftune-run: neftune_kernels" in done.stderr
    assert "AttributeError: on purpose" in done.stderr.splitlines()[-1]
