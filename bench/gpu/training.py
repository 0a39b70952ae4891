"""A training step of a small Llama: no noise, ours, HF's own hook: `python -m bench.gpu.training`.

Random weights, a padded batch; the three take turns on one model, every round in another order.
A round's time is that of a few steps.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.interleaved import spread
from neftune_kernels import apply_neftune

from .clock import Clock, clock_of
from .report import table
from .step import FAILED, PASSED, Setting, parser_of, setting_of

NOISE_ALPHA = 5.0
SIZES = (32000, 1024, 2816, 8, 16)  # V, d, inner width, layers, heads: 123 M parameters
TINY_SIZES = (64, 32, 64, 1, 2)
VARIANTS = ("no noise", "ours", "HF hook")
SPARE = 5.0


def make_model(setting: Setting) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary, width, inner, layers, heads = TINY_SIZES if setting.tiny else SIZES
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device=setting.device, dtype=torch.bfloat16).train()


def make_batch(setting: Setting, vocabulary: int) -> dict[str, Tensor]:
    """Rows of half the columns and more, padded on the right."""
    rows, columns = (2, 8) if setting.tiny else (8, 512)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, columns), generator=generator)
    lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    labels = torch.where(mask == 1, ids, -100)
    return {
        name: value.to(setting.device)
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


@contextlib.contextmanager
def noise(model: Any, variant: str) -> Iterator[None]:
    if variant == "ours":
        handle = apply_neftune(model, noise_alpha=NOISE_ALPHA)
        try:
            yield
        finally:
            handle.remove()
    elif variant == "HF hook":
        from transformers.integrations.neftune import activate_neftune, deactivate_neftune

        hook = activate_neftune(model, NOISE_ALPHA)
        try:
            yield
        finally:
            deactivate_neftune(model, hook)
    else:
        yield


def step(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def changes(model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Each variant's loss with the same weights: noise that changes nothing is not measured."""
    losses = {}
    for variant in VARIANTS:
        with noise(model, variant):
            losses[variant] = float(model(**batch).loss.detach())
    return losses


def timed_round(
    clock: Clock,
    model: Any,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    variant: str,
    steps: int,
) -> float:
    with noise(model, variant):
        step(model, batch, optimizer)  # whatever the change of hooks costs
        clock.synchronise()
        start = time.perf_counter()
        for _ in range(steps):
            step(model, batch, optimizer)
        clock.synchronise()
        return (time.perf_counter() - start) / steps


def training(setting: Setting) -> int:
    clock, model = clock_of(setting.device), make_model(setting)
    batch = make_batch(setting, model.config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setting.device == "cuda")
    losses = changes(model, batch)
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    print(f"Losses of the first forward: {said}\n")
    failed = False
    for variant in VARIANTS[1:]:
        if losses[variant] == losses["no noise"]:
            failed = True
            setting.write(variant, "failed", note="its loss is that without noise")
            print(f"- **{variant}** changes nothing")
    rounds, steps = (2, 1) if setting.tiny else (15, 5)
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0)
    order = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        if setting.left < SPARE and all(taken.values()):
            print(f"Stopped after {len(taken['ours'])} rounds")
            break
        for i in torch.randperm(len(VARIANTS), generator=order).tolist():
            variant = VARIANTS[i]
            clock.peak_bytes()
            taken[variant].append(timed_round(clock, model, batch, optimizer, variant, steps))
            peaks[variant] = max(peaks[variant], clock.peak_bytes())
    lines = []
    shape = str((*batch["input_ids"].shape, model.config.hidden_size))
    for variant, values in taken.items():
        median, low, high = spread(values)
        ratio = spread([a / b for a, b in zip(values, taken["no noise"], strict=True)])[0]
        times = {"device_us": median * 1e6, "p10_us": low * 1e6, "p90_us": high * 1e6}
        note = f"a whole step; peak {peaks[variant]} bytes; first loss {losses[variant]:.4f}"
        fields: dict[str, Any] = {"shape": shape, "dtype": "bfloat16", "layout": "int64 mask"}
        fields |= {"ratio": ratio, "ratio_to": "no noise", "note": note}
        setting.write(variant, "passed", **times, **fields)
        milliseconds = [f"{value * 1e3:.4g}" for value in (median, low, high)]
        lines.append((variant, *milliseconds, f"{ratio:.4f}", f"{peaks[variant] / 2**20:.0f}"))
    print(table(("noise", "ms per step", "p10", "p90", "over no noise", "peak MiB"), lines))
    return FAILED if failed else PASSED


def main(arguments: list[str] | None = None) -> int:
    return training(setting_of(parser_of(__doc__, "training"), arguments))


if __name__ == "__main__":
    sys.exit(main())
