"""What Python runs at its start under neftune-run: waits for transformers.trainer and for LitGPT's
models, and lets the environment's own sitecustomize run.

A command may start any Python, so nothing newer than 3.6 stands here; and many, so nothing is
imported that is not there anyway.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))
TRAINER = "transformers.trainer"
LITGPT = ("litgpt.model", "litgpt.lora", "litgpt.adapter", "litgpt.adapter_v2")  # each has a GPT


def report(event: str, said: str = "") -> None:
    """A file of this process, which neftune-run reads when the command has ended."""
    try:
        folder = os.environ["NEFTUNE_RUN_REPORTS"]
        with open(os.path.join(folder, f"{event}.{os.getpid()}"), "wb") as file:
            file.write(said.encode("utf-8", "backslashreplace"))
    except (KeyError, OSError):  # the command has ended, or was started from another machine
        pass


def report_noise() -> None:
    report("noisy")


def patch(module: "ModuleType") -> None:
    """transformers passes a failure on as it is only where it is an ImportError; an AttributeError
    it takes for a name that is not there.
    """
    text = os.environ.get("NEFTUNE_RUN_ALPHA")
    try:
        alpha = None if text is None else float(text)
        if module.__name__ == TRAINER:
            from neftune_kernels.integrations.transformers import patch_trainer

            patch_trainer(alpha).on_noise = report_noise
        elif alpha is not None:  # LitGPT has no setting of its own
            from neftune_kernels.integrations.litgpt import patch_gpt

            patch_gpt(module, alpha, report_noise)
    except Exception as error:
        said = (
            f"neftune_kernels cannot replace the noise of {module.__name__}: "
            f"{type(error).__name__}: {error}. Install a neftune_kernels that knows this "
            f"{module.__name__.partition('.')[0]} for {sys.executable}, or leave out neftune-run"
        )
        report("failed", said)
        raise ImportError(f"neftune-run: {said}") from error
    report("patched")


class TrainerFinder:
    """First on sys.meta_path: whoever finds a module that is waited for, it is patched when it has
    run.
    """

    def __init__(self) -> None:
        # threads, and what for; another finder may ask us again
        self.searching = set()  # type: set[tuple[int, str]]

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> "ModuleSpec | None":
        search = _thread.get_ident(), name
        if name not in (TRAINER, *LITGPT) or search in self.searching:
            return None
        self.searching.add(search)
        try:
            found = (
                finder.find_spec(name, path, target)  # type: ignore[arg-type]
                for finder in sys.meta_path
                if hasattr(finder, "find_spec")
            )
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self.searching.discard(search)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def run_own() -> None:
    """The sitecustomize that Python would have run; it takes this one's place."""
    this = sys.modules.pop(__name__)
    ours = [entry for entry in sys.path if os.path.abspath(entry) == HERE]
    sys.path[:] = [entry for entry in sys.path if entry not in ours]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = this
    finally:
        sys.path[:0] = ours  # who makes a PYTHONPATH of sys.path hands us on, too


report("started")
sys.meta_path.insert(0, TrainerFinder())
run_own()
