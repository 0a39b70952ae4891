"""patch_trainer(): TrainingArguments(neftune_noise_alpha=...) with every transformers that we name,
from 4.55 on. `make test-transformers4` runs this file where nothing but transformers is installed.
"""

import types

import pytest
import torch

from neftune_kernels import neftune_noise

transformers = pytest.importorskip("transformers")

from neftune_kernels.integrations import transformers as integration  # noqa: E402
from neftune_kernels.integrations.transformers import (  # noqa: E402
    NEFTuneCallback,
    patch_trainer,
    unpatch_trainer,
)

HIDDEN, LENGTHS = 16, [5, 3, 7, 2]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def patch():
    yield patch_trainer()
    unpatch_trainer()


def llama(*_):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row["input_ids"]) for row in rows], batch_first=True
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids}


class Watch(transformers.TrainerCallback):
    """Every training forward's ids, clean and noisy embeddings, and the seed of its noise.

    The look at a model whose transformers the table of multipliers does not know has no grad.
    """

    def __init__(self):
        self.calls = []

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.hook = model.get_input_embeddings().register_forward_hook(self.record)

    def on_train_end(self, *_, **__):
        self.hook.remove()

    def record(self, module, args, output):
        if not torch.is_grad_enabled():
            return
        clean = torch.nn.functional.embedding(args[0], module.weight).detach()
        site = module.__dict__.get("_neftune")
        seed = None if site is None or site.last is None else site.last.noise.seed
        call = types.SimpleNamespace(ids=args[0], clean=clean, out=output.detach(), seed=seed)
        self.calls.append(call)


def trainer(folder, callbacks=(), model=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        model=model,
        model_init=llama if model is None else None,
        args=arguments,
        train_dataset=[{"input_ids": [4 + i] * length} for i, length in enumerate(LENGTHS)],
        data_collator=collate,
        callbacks=list(callbacks),
    )


def wears(call, alpha):
    noise = neftune_noise(
        call.ids.shape, HIDDEN, alpha, attention_mask=call.ids != 0, seed=call.seed
    )
    return torch.equal(call.out, call.clean + noise) and bool(noise.any())


def test_the_argument_is_ours(patch, tmp_path, capsys):
    model, watch = llama(), Watch()
    ours = trainer(tmp_path, [watch], model, neftune_noise_alpha=5.0)
    ours.train()
    assert len(watch.calls) == 2 and all(wears(call, 5.0) for call in watch.calls)
    embedding = model.get_input_embeddings()
    assert type(embedding) is torch.nn.Embedding and "_neftune" not in vars(embedding)
    assert not hasattr(embedding, "neftune_noise_alpha")
    printed = [line for line in capsys.readouterr().out.splitlines() if "neftune_kernels" in line]
    assert len(printed) == 1 and printed[0].startswith(
        "noise by neftune_kernels, alpha 5, replica 0, backend "
    )
    assert printed[0].endswith(", fused")  # not "off" where the model is in eval mode before
    entry = next(entry for entry in ours.state.log_history if "loss" in entry)
    assert entry["neftune/noise_alpha"] == 5.0 and entry["neftune/calls"] == 1
    assert entry["neftune/length_min"] == 2 and entry["neftune/length_max"] == 7
    assert patch.last_stats["calls"] == 2 and patch.last_stats["length_max"] == 7
    assert not [one for one in ours.callback_handler.callbacks if isinstance(one, NEFTuneCallback)]


def test_undo_gives_the_hook_of_transformers_back(tmp_path):
    patch_trainer().undo()
    watch = Watch()
    trainer(tmp_path, [watch], llama(), neftune_noise_alpha=5.0).train()
    assert len(watch.calls) == 2 and all(call.seed is None for call in watch.calls)
    assert all(not torch.equal(call.out, call.clean) for call in watch.calls)


def test_a_trainer_without_the_argument_is_left_alone(patch, tmp_path, capsys):
    watch = Watch()
    trainer(tmp_path, [watch], llama()).train()
    assert len(watch.calls) == 2
    assert all(torch.equal(call.out, call.clean) for call in watch.calls)
    assert patch.last_stats is None and "neftune" not in capsys.readouterr().out


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_trial_trains_with_its_own_alpha(before, patch, tmp_path, monkeypatch):
    """A hyperparameter search sets it on the arguments inside train(), and makes a new model."""
    searches = transformers.integrations.integration_utils
    monkeypatch.setattr(searches, "is_wandb_available", lambda: True)  # whose trials are dicts
    watch = Watch()
    ours = trainer(tmp_path, [watch], neftune_noise_alpha=before)
    ours.hp_search_backend = transformers.trainer_utils.HPSearchBackend.WANDB
    ours._get_output_dir = lambda trial: str(tmp_path)  # asks the search's own package
    for alpha in (3.0, 7.0):
        ours.train(trial={"neftune_noise_alpha": alpha})
        assert all(wears(call, alpha) for call in watch.calls) and len(watch.calls) == 2
        watch.calls.clear()


@pytest.mark.parametrize("own, alpha", [(None, 3.0), (7.0, 7.0), (0.0, 0.0)])
def test_the_alpha_of_trainings_that_say_none(own, alpha, patch, tmp_path):
    told = []
    assert patch_trainer(3.0) is patch and patch_trainer() is patch  # the second changes nothing
    patch.on_noise = lambda: told.append("noise")
    watch = Watch()
    trainer(tmp_path, [watch], llama(), neftune_noise_alpha=own).train()
    assert len(watch.calls) == 2 and told == ["noise"]
    if alpha:
        assert all(wears(call, alpha) for call in watch.calls)
    else:
        assert all(torch.equal(call.out, call.clean) for call in watch.calls)


def test_a_bad_alpha_of_trainings_that_say_none():
    with pytest.raises(ValueError, match="finite and >= 0, got -1"):
        patch_trainer(-1.0)
    assert not integration._patches


def test_a_callback_beside_it_is_alone(patch, tmp_path):
    watch = Watch()
    trainer(tmp_path, [watch, NEFTuneCallback(2.0)], llama(), neftune_noise_alpha=5.0).train()
    assert len(watch.calls) == 2 and all(wears(call, 2.0) for call in watch.calls)


def test_nothing_is_left_after_a_crash(patch, tmp_path):
    class Crash(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyError("on purpose")

    model = llama()
    ours = trainer(tmp_path, [Crash()], model, neftune_noise_alpha=5.0)
    with pytest.raises(KeyError, match="on purpose"):
        ours.train()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert patch.last_stats["calls"] == 1


def test_a_bad_alpha(patch, tmp_path):
    with pytest.raises(ValueError, match="finite and >= 0, got -1"):
        trainer(tmp_path, (), llama(), neftune_noise_alpha=-1.0).train()


def test_an_unknown_transformers_is_refused(monkeypatch):
    for where, name in (
        (transformers.trainer, "activate_neftune"),
        (transformers.Trainer, "_activate_neftune"),
    ):
        monkeypatch.delattr(where, name, raising=False)
    with pytest.raises(RuntimeError, match="does not know: give the trainer a NEFTuneCallback"):
        patch_trainer()
