"""What both trainers' callbacks share: keywords, errors that name the callback, pickles; and the
schedules they follow.
"""

import inspect
import pickle
import subprocess
import sys

import pytest
import torch

from neftune_kernels import apply_neftune
from neftune_kernels.schedules import (
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    warmup_schedule,
)

SCHEDULES = {
    "linear": linear_schedule(10.0, 0.0, num_steps=4),
    "cosine": cosine_schedule(10.0, 2.0, num_steps=4),
    "warmup": warmup_schedule(2, linear_schedule(5.0, 0.0, num_steps=4)),
    "constant": constant_schedule(5.0),
}


def callback_class(trainer):
    if trainer == "transformers":
        return pytest.importorskip("neftune_kernels.integrations.transformers").NEFTuneCallback
    pytest.importorskip("pytorch_lightning")
    from neftune_kernels.integrations.lightning import NEFTuneCallback

    return NEFTuneCallback


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_pickle(name):
    schedule = SCHEDULES[name]
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(step) for step in range(8)] == [schedule(step) for step in range(8)]
    assert len({schedule(step) for step in range(8)}) > (name != "constant")


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_every_option_is_a_keyword(trainer):
    """Command line parsers read signatures, and cannot see through **options."""
    taken = inspect.signature(callback_class(trainer).__init__).parameters
    for name, option in inspect.signature(apply_neftune).parameters.items():
        if name not in ("model", "unknown"):
            assert taken[name].default == option.default, name


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_unknown_keywords(trainer):
    with pytest.raises(TypeError, match=r"NEFTuneCallback\(\) got .* argument 'sampels'"):
        callback_class(trainer)(5.0, sampels=None)


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_errors_name_the_callback(trainer):
    """A user of a trainer wrote no apply_neftune."""
    callback = callback_class(trainer)(5.0)
    with pytest.raises(ValueError, match=r"embedding=.*\. In a trainer .* NEFTuneCallback\("):
        callback.attach(torch.nn.Linear(2, 2), 0)


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_pickles_while_noise_is_on(trainer):
    """The copy has the settings, and no handle on this process's model."""
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2))
    schedule = SCHEDULES["linear"]
    callback = callback_class(trainer)(schedule, embedding="0", replica=3, backend="reference")
    callback.attach(model, 1)
    again = pickle.loads(pickle.dumps(callback))
    assert again.handle is None and again.lent is None
    assert again.options == callback.options and again.alpha_at(2) == 5.0
    callback.detach()
    assert type(model[0]) is torch.nn.Embedding


CRASH = """
import pickle, sys, tempfile
callback = pickle.loads(bytes.fromhex(sys.argv[1]))
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Crash(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyError("on purpose")

sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
)
rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 4
try:
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback, Crash()]).train()
except KeyError:
    embedding = model.model.embed_tokens
    assert callback.handle is None and type(embedding) is torch.nn.Embedding
    print("clean")
"""


def test_unpickled_callback_cleans_up_after_a_crash():
    """In a process that never made one: spawned workers, Ray."""
    sent = pickle.dumps(callback_class("transformers")(5.0)).hex()
    done = subprocess.run([sys.executable, "-c", CRASH, sent], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["clean"], done.stderr[-2000:]
