"""Whole training steps, and what noise adds to one: forward, loss, backward and AdamW in float32,
on ragged batches with an attention_mask.

A difference of two steps is smaller than their spread. So what noise adds is measured where it
arises, at the lookup in a model without layers, forward and backward, and divided by the step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune

from neftune_kernels import apply_neftune

from . import calls
from .cases import BASE, HOOK, NOISE_ALPHA, OURS, RAGGED, Case, Inputs
from .interleaved import Runs, Sample

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 4, 128


class Training(NamedTuple):
    name: str
    config: dict[str, Any]
    lora: bool


SMALL_LLAMA = Training("Llama of 4 layers, d = 512, full", SMALL, False)
TRAININGS = [
    Training("SmolLM2-135M, LoRA", SMOLLM2, True),
    Training("SmolLM2-135M, full", SMOLLM2, False),
    SMALL_LLAMA,
]


def case_of(training: Training) -> Case:
    sizes = training.config["hidden_size"], training.config["vocab_size"]
    return Case("step", training.name, *BATCH, *sizes, torch.float32, RAGGED)


def make_model(training: Training) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**training.config))
    if training.lora:
        import peft

        config = peft.LoraConfig(r=16, target_modules=LORA_MODULES, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return model.train()


@contextmanager
def noise_by(way: str, model: Any) -> Iterator[None]:
    if way == OURS:
        with apply_neftune(model, NOISE_ALPHA):
            yield
        return
    hook = activate_neftune(model, NOISE_ALPHA) if way == HOOK else None
    yield
    if hook is not None:
        hook.remove()
        del model.get_input_embeddings().neftune_noise_alpha


def step_of(model: nn.Module) -> Callable[[Inputs], object]:
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(inputs: Inputs) -> object:
        optimizer.zero_grad(set_to_none=True)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        loss: Tensor = model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            labels=labels,
            use_cache=False,
        ).loss
        loss.backward()
        optimizer.step()
        return loss

    return step


def time_steps(training: Training, inputs: list[Inputs], rounds: int) -> dict[str, list[Sample]]:
    model = make_model(training)
    step, few = step_of(model), torch.zeros(1, 2, dtype=torch.int64)
    taken: dict[str, list[Sample]] = {name: [] for name in (BASE, OURS, HOOK)}
    names, order = list(taken), torch.Generator().manual_seed(0)
    step(inputs[0])
    for number in range(rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            with noise_by(names[i], model):
                with torch.no_grad():
                    model(input_ids=few, attention_mask=torch.ones_like(few))
                start = time.perf_counter()
                step(inputs[number % len(inputs)])
                taken[names[i]].append(Sample(time.perf_counter() - start, 0.0))
    return taken


def lookup_runs(weight: Tensor, lora: bool) -> Runs:
    """Forward and backward of a model without layers: what stands around the lookup, and no more.

    Under LoRA the table is frozen and nothing goes backward to it.
    """
    runs: Runs = {}
    for name in (BASE, OURS, HOOK):
        model = calls.llama(weight)
        model.get_input_embeddings().weight.requires_grad_(not lora)
        if name == OURS:
            apply_neftune(model, NOISE_ALPHA)
        elif name == HOOK:
            calls.hooked(model.get_input_embeddings())
        runs[name] = run_of(model)
    return runs


def run_of(model: Any) -> Callable[[Inputs], object]:
    weight = model.get_input_embeddings().weight

    def run(inputs: Inputs) -> object:
        weight.grad = None
        output = model(input_ids=inputs.input_ids, use_cache=False, **inputs.told)
        output.last_hidden_state.backward(inputs.out)
        return None

    return run
