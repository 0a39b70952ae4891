from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from neftune_kernels import apply_neftune


@HOOKS.register_module()
class NEFTuneHook(Hook):
    """Noise from the first iteration to the last; every option of apply_neftune is one here."""

    def __init__(self, noise_alpha=5.0, **options):
        self.noise_alpha, self.options = noise_alpha, options

    def before_train(self, runner):
        model = getattr(runner.model, "module", runner.model)  # of DistributedDataParallel
        model = getattr(model, "llm", model)  # where XTuner's SupervisedFinetune has it
        self.handle = apply_neftune(model, self.noise_alpha, **self.options)

    def after_train(self, runner):
        runner.logger.info(f"noise: {self.handle.stats()}")
        self.handle.remove()
