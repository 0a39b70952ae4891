"""Factors that models apply after their lookup, and other facts read from their source.

All of it is to be replaced by a table and by values; nothing is to be added here.
"""

import dis
import inspect
import re
import warnings
from typing import Any

import torch
from torch import nn

from .find import Found, ancestors_of

SCALED_BY_ATTRIBUTE = re.compile(
    r"(?:self\.\w+\(input_ids\)|\binputs_embeds)\s*\*=?\s*self\.(\w+)\b(?![.(\[])"
)


SCALED_BY_EXPRESSION = re.compile(
    r"self\.\w+\(input_ids\)\s*\*\s*(?!\s|self\.\w+\b(?![.(\[]))|\bhidden_states\s*\*=?\s*\(?self\.config\.|"
    r"\binputs_embeds\s*\*=?\s*(?!\s|\*|self\.\w+\b(?![.(\[]))|\bhidden_states\s*\*\s*normalizer\b"
)


LOOKS_UP_INSIDE = re.compile(
    r"get_input_embeddings\(\)\(|self\.\w+(\.\w+)*\.(embed_tokens|word_embeddings)\("
)


def _source_of_forward(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        return ""


def factor_of_embeddings(model: nn.Module) -> str | None:
    """The attribute by which a model multiplies embeddings after looking them up (Marian's
    embed_scale, Granite's embedding_multiplier).
    """
    match = SCALED_BY_ATTRIBUTE.search(_source_of_forward(model))
    if (
        match is None
        or not isinstance(getattr(model, match[1], None), (int, float))
        or getattr(model, match[1]) == 1
    ):
        return None
    return match[1]


TWO_THREADS = (
    "{name} multiplies embeddings by its {factor}, which NEFTune takes over while it runs, and it "
    "is running in another thread without noise: give every thread a model of its own"
)


class Lent:
    """A model's factor: 1 on the model while the site has taken it over, for all its threads.

    No lock: an interrupt could leave it held.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.value = float(getattr(model, name))
        self.taken = self.plain = 0  # running forwards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "taken": 0, "plain": 0}

    def enter(self, model: nn.Module, noisy: bool, has_embeds: bool) -> float:
        """The factor that the site is to apply in this forward."""
        if torch.compiler.is_compiling():  # one thread traces, and a count would be a guard
            if getattr(model, self.name) != 1:
                self.value = float(getattr(model, self.name))
            setattr(model, self.name, 1.0 if noisy else self.value)
            return self.value if noisy else 1.0
        if not self.taken and getattr(model, self.name) != 1:
            self.value = float(getattr(model, self.name))
        if (noisy and self.plain) or (self.taken and has_embeds):
            raise RuntimeError(TWO_THREADS.format(name=type(model).__name__, factor=self.name))
        if not noisy and not self.taken:
            self.plain += 1
            setattr(model, self.name, self.value)
            return 1.0
        self.taken += 1
        setattr(model, self.name, 1.0)
        return self.value

    def leave(self, model: nn.Module, scale: float) -> None:
        if torch.compiler.is_compiling():
            setattr(model, self.name, self.value)
            return
        if scale == 1:
            self.plain = max(0, self.plain - 1)
        else:
            self.taken = max(0, self.taken - 1)
        if not self.taken:
            setattr(model, self.name, self.value)

    def restore(self, model: nn.Module) -> None:
        """Whatever was running is over."""
        self.taken = self.plain = 0
        setattr(model, self.name, self.value)


def may_call_embedding(model: nn.Module) -> bool:
    package = type(model).__module__.split(".")[0]
    if package == "transformers":
        return LOOKS_UP_INSIDE.search(
            _source_of_forward(model)
        ) is not None or not _passes_on_its_mask(model)
    return package != "peft" or bool(
        getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    )


def _passes_on_its_mask(model: nn.Module) -> bool:
    forward = inspect.unwrap(type(model).forward)
    names = {
        step.argval for step in dis.get_instructions(forward) if step.opname.startswith("LOAD")
    }
    return "attention_mask" not in inspect.signature(forward).parameters or "attention_mask" in {
        n for name in names for n in _flat(name)
    }


def _flat(name: Any) -> tuple[Any, ...]:
    return (
        name if isinstance(name, tuple) else (name,)
    )  # Python 3.12 and later load two names at once


def check_surroundings(model: nn.Module, found: list[Found]) -> None:
    """Models that multiply embeddings afterwards by something we cannot take over."""
    targets = {one.site for one in found}
    for name, module in model.named_modules():
        if module in targets:
            for parent, _ in ancestors_of(model, name):
                if SCALED_BY_EXPRESSION.search(_source_of_forward(parent)):
                    warnings.warn(
                        f"{type(parent).__name__} may multiply embeddings after looking them up, "
                        f"and with them NEFTune's noise: divide "
                        "noise_alpha by the factor if so",
                        stacklevel=3,
                    )
