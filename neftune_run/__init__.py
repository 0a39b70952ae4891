"""neftune-run [--alpha A] [--strict] COMMAND ...: in every Python process of COMMAND,
`neftune_noise_alpha` means neftune_kernels.

It stands beside neftune_kernels, whose import takes torch's seconds. The switch is PYTHONPATH:
every Python runs site/sitecustomize.py at its start, and what hands PYTHONPATH on (torchrun,
accelerate, multiprocessing) hands the switch on.
"""

import argparse
import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
ALPHA = "NEFTUNE_RUN_ALPHA"  # --alpha
REPORTS = "NEFTUNE_RUN_REPORTS"  # the folder that processes report to
FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
NOT_REACHED = (
    "A process that starts with -I, -E or -S, or with a PYTHONPATH of its own, is not reached"
)
STRICT = 3  # --strict: the exit code of a command that ended well without noise


def alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"alpha must be finite and >= 0, got {text!r}")
    return value


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="neftune-run",
        usage="neftune-run [--alpha A] [--strict] COMMAND [ARGUMENT ...]",
        description="In every Python process of COMMAND, neftune_noise_alpha means "
        "neftune_kernels. Signals and the exit code are COMMAND's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--alpha",
        type=alpha,
        metavar="A",
        help="of trainings whose own neftune_noise_alpha is None; one that is set counts, 0 too",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help=f"exit with {STRICT} where COMMAND ends well and no training had noise",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.command[:1] == ["--"]:
        del parsed.command[0]
    if not parsed.command:
        parser.error("no COMMAND to run")
    return parsed


def environment(reports: str, noise_alpha: float | None) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    changed = {
        **os.environ,
        "PYTHONPATH": f"{SITE}{os.pathsep}{inherited}" if inherited else SITE,
        REPORTS: reports,
    }
    return changed if noise_alpha is None else {**changed, ALPHA: repr(noise_alpha)}


def wait_signal(signals: set[signal.Signals]) -> tuple[int, bool]:
    """The next signal's number, and whether a process sent it."""
    if hasattr(signal, "sigwaitinfo"):
        received = signal.sigwaitinfo(signals)
        return received.si_signo, received.si_code <= 0  # above 0: the kernel, for a terminal
    return signal.sigwait(signals), True  # macOS does not tell


def run(command: list[str], environment: dict[str, str]) -> int:
    """Runs the command with every signal that was meant for it; its exit code, or minus the signal
    that killed it.
    """
    # blocked below, so the handler never runs; but what is ignored may not be waited for
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waited = {signal.SIGCHLD, *FORWARDED}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    # Python itself ignores the two signals of setsigdef
    pid = os.posix_spawnp(
        command[0],
        command,
        environment,
        setsigmask=before,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
    )
    while True:
        number, sent = wait_signal(waited)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif sent:  # the command has Ctrl-C from the terminal, too
            os.kill(pid, number)


def verdict(reports: str) -> list[str]:
    """What is to be said of a command that has ended: nothing where a training had noise and every
    trainer could be patched.
    """
    told: dict[str, list[str]] = {"started": [], "patched": [], "noisy": [], "failed": []}
    for folder, _, names in os.walk(reports):
        for name in names:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                told[name.partition(".")[0]].append(file.read())
    if told["failed"]:
        return [
            f"in {told['failed'].count(reason)} of its processes: {reason}"
            for reason in sorted(set(told["failed"]))
        ]
    if told["noisy"]:
        return []
    if told["patched"]:
        return [
            "no noise: a trainer was there, and no training began with a "
            "neftune_noise_alpha. Set it in the command's configuration, or give --alpha. "
            f"{NOT_REACHED}"
        ]
    if told["started"]:
        reached = f"reached {len(told['started'])}, none imported transformers.trainer or litgpt"
        return [f"no noise: of the command's Python processes neftune-run {reached}. {NOT_REACHED}"]
    return [f"no noise: no process of the command reported. {NOT_REACHED}"]


def end_as(status: int) -> "NoReturn":
    """With the command's own exit code, or killed by the signal that killed it."""
    if status >= 0:
        sys.exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(-status, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
    os.kill(os.getpid(), -status)
    sys.exit(128 - status)  # the first process of a container survives its own signals


def main() -> "NoReturn":
    parsed = parse(sys.argv[1:])
    outer = os.environ.get(REPORTS)  # of a neftune-run around this one, which reads ours as well
    if outer is not None and not os.path.isdir(outer):
        outer = None
    reports = tempfile.mkdtemp(prefix="neftune-run-", dir=outer)
    try:
        status = run(parsed.command, environment(reports, parsed.alpha))
        said = verdict(reports)
    except OSError as error:
        print(f"neftune-run: {parsed.command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
    finally:
        if outer is None:
            shutil.rmtree(reports, ignore_errors=True)  # processes may outlive the command
    for line in said:
        print(f"neftune-run: {line}", file=sys.stderr)
    end_as(STRICT if parsed.strict and said and status == 0 else status)
