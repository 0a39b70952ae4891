"""Judges noise by what arrives behind a lookup, in every Python that has this folder on its
PYTHONPATH. By torch's global module hooks alone; it shares no code with neftune_kernels.

A line of PROBE/RANK.PID for each forward of an embedding: whether it had grad, and of every row its
length, and how far its real tokens and its padding are from the table's rows.
"""

import json
import os
import sys

if "PROBE" in os.environ:
    import torch
    from torch.nn.modules.module import (
        register_module_forward_hook,
        register_module_forward_pre_hook,
    )

    PAD = 0  # of the tiny tokenizer, which means it nowhere else
    looked_up = []  # [(ids, rows of the table)] that have not arrived yet

    def after(module, args, output):
        if isinstance(module, torch.nn.Embedding) and args and args[0].dim() == 2:
            looked_up[:] = [(args[0], module.weight.detach()[args[0]].float())]

    def before(module, args):
        """The first module that is called with the embeddings: noise has been added by then."""
        for ids, clean in looked_up:
            for value in args:
                if torch.is_tensor(value) and value.shape == clean.shape:
                    looked_up.clear()
                    tell(ids, (value.detach().float() - clean).abs())
                    return

    def tell(ids, noise):
        rows = []
        for real, row in zip(ids != PAD, noise, strict=True):
            here, padding = row[real], row[~real]
            rows.append(
                {
                    "length": int(real.sum()),
                    "largest": float(here.max()) if len(here) else 0.0,
                    "square": float(here.square().mean()) if len(here) else 0.0,
                    "padding": float(padding.max()) if len(padding) else 0.0,
                }
            )
        line = {"grad": torch.is_grad_enabled(), "columns": ids.shape[1], "dim": noise.shape[-1]}
        name = f"{os.environ.get('RANK', 0)}.{os.getpid()}"
        with open(os.path.join(os.environ["PROBE"], name), "a") as file:
            print(json.dumps({**line, "rows": rows}), file=file)

    register_module_forward_hook(after)
    register_module_forward_pre_hook(before)

# An environment's own sitecustomize, which this one hides.
this = sys.modules.pop(__name__)
sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
try:
    import sitecustomize  # noqa: F401
except ImportError:
    sys.modules[__name__] = this
