"""Device launches of a noisy lookup in a padding-free batch, as transformers'
DataCollatorWithFlattening makes it, beside the same batch told by hand: `python -m bench.launches`.

Without a device: every operator that is no view counts as a launch, on the meta device, where
nothing that only a CPU can afford is asked. An operator of ours is one launch by its schema; what
the Triton kernels really launch is tests/test_triton.py's subject.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_kernels import NEFTuneHandle, apply_neftune

LENGTHS = (5, 3, 9, 2)
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")
MOST = 3  # launches more than by hand; the specification of this command


class Launches(TorchDispatchMode):
    """Names of the operators that would launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16, device="meta")

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
    ) -> Tensor:
        embedded: Tensor = self.embed(input_ids)
        return embedded


def batch() -> dict[str, Tensor]:
    """DataCollatorWithFlattening's, with return_flash_attn_kwargs=True."""
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(torch.int32)
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    given = {
        "input_ids": torch.ones_like(places),
        "position_ids": places,
        "cu_seq_lens_q": bounds,
    }
    return {name: value.to("meta") for name, value in given.items()}


def launches(model: nn.Module, given: dict[str, Tensor]) -> list[str]:
    with Launches() as counted:
        model(**given)
    return counted.names


def by_hand(model: nn.Module, handle: NEFTuneHandle, word: str) -> list[str]:
    """The same noise where the user says the samples himself."""
    given = batch()
    said = given["cu_seq_lens_q" if word == "cu_seqlens" else word]
    with handle.told(**{word: said}):
        return launches(model, {"input_ids": given["input_ids"]})


def counts(pad_token: int | None = None) -> dict[str, tuple[list[str], list[str]]]:
    """By what the batch carries: what is launched, and what is by hand."""
    model: Any = Model().train()
    model.config = type("Config", (), {"pad_token_id": pad_token, "eos_token_id": 2})()
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0, replica=0)
    given = batch()
    found = {}
    for name, word in (("position_ids", "position_ids"), ("cu_seq_lens_q", "cu_seqlens")):
        carried = {"input_ids": given["input_ids"], name: given[name]}
        found[name] = launches(model, carried), by_hand(model, handle, word)
    found["both"] = launches(model, given), found["cu_seq_lens_q"][1]
    return found


def main() -> None:
    print("| batch | pad_token_id | launches | by hand | more | at most |")
    print("|---|---|---:|---:|---:|---:|")
    for pad in (None, 0, 2):
        for name, (ours, hand) in counts(pad).items():
            print(
                f"| {name} | {pad} | {len(ours)} | {len(hand)} | {len(ours) - len(hand)} | {MOST} |"
            )


if __name__ == "__main__":
    main()
