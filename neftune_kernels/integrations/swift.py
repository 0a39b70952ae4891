"""NEFTune in ms-swift: imported by a file of one's own that `external_plugins` names.

swift imports such a file in every process, before the trainer is made. From then on its own
`neftune_noise_alpha` means this package, and `callbacks: neftune` names the callback.
"""

from typing import Any

# swift imports a file by its path, and puts that one's folder before all others
if not __package__:
    raise ImportError(
        f"external_plugins names {__file__}: name a file of your own there, with the one line "
        "`import neftune_kernels.integrations.swift`"
    )

try:
    from swift.callbacks import callbacks_map
except ImportError as error:
    raise ImportError(
        "neftune_kernels.integrations.swift is for ms-swift 4, whose environment it needs: "
        "pip install 'neftune_kernels[swift]'"
    ) from error

from .transformers import AnnouncedCallback, NEFTuneCallback, patch_trainer


def make_callback(args: Any, trainer: Any) -> NEFTuneCallback:
    """`callbacks: neftune`: refuses to train without an alpha.

    Args:
        args, trainer: swift's TrainingArguments and its trainer.

    Raises:
        ValueError: no `neftune_noise_alpha`.
    """
    if args.neftune_noise_alpha is None:
        raise ValueError(
            "callbacks: neftune, but no neftune_noise_alpha: set it (neftune_noise_alpha: 5), or "
            "take the callback out"
        )
    return AnnouncedCallback(args.neftune_noise_alpha)


patch_trainer()
callbacks_map["neftune"] = make_callback
