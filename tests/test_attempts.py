"""What people tried with NEFTune by hand, and what must train with ours: LoRA on frozen embeddings
or all weights, either kind of gradient checkpointing, float32, bfloat16 and float16 with a scaler.
What cannot work is shown beside its remedy.
"""

import copy
import functools
import math
import pickle
import tempfile

import pytest
import torch
from torch import nn

from neftune_kernels import add_noise, apply_neftune, neftune_noise, noisy_embedding

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from neftune_kernels.integrations.transformers import NEFTuneCallback, patch_trainer  # noqa: E402

VOCAB, HIDDEN, STEPS, ALPHA = 64, 32, 3, 5.0
TRAINED = ("lora", "full")
CHECKPOINTING = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "none": None,
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


def make_model(trained, layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    if trained == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        model.enable_input_require_grads()
        assert not model.get_input_embeddings().weight.requires_grad
    return model.train()


def make_rows(rows=STEPS * 4):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (rows, 10), generator=generator)
    lengths = torch.randint(3, 11, (rows, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    ids = ids * mask
    return [
        {"input_ids": i, "attention_mask": m, "labels": torch.where(m == 1, i, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


class LayerInputs:
    """What the first decoder layer is given: in the forward, and again when a checkpoint runs it
    once more in backward.
    """

    def __init__(self, model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.forward, self.again = [], []
        base.model.layers[0].input_layernorm.register_forward_pre_hook(
            self.take
        )  # a layer's own hooks run outside its checkpoint

    def take(self, module, args):
        seen = self.again if torch._C._current_graph_task_id() != -1 else self.forward
        seen.append(args[0].detach().clone())


def noisy_embeds(model, inputs):
    inputs = dict(inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return {
        **inputs,
        "inputs_embeds": add_noise(embeds, ALPHA, attention_mask=inputs["attention_mask"]),
    }


class Recorder(transformers.TrainerCallback):
    """The gradients as the optimizer is about to use them."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {
                name: value.grad.clone()
                for name, value in model.named_parameters()
                if value.requires_grad
            }
        )


class RecordingTrainer(transformers.Trainer):
    by_hand = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.masks.append(inputs["attention_mask"])
        loss = super().compute_loss(
            model, noisy_embeds(model, inputs) if self.by_hand else inputs, *args, **kwargs
        )
        self.needed_grad.append(loss.requires_grad)
        return loss


@functools.cache
def kept_gradients(train, *case):
    """Those of the same training without checkpointing."""
    return train(*case)[4]


def train_with_trainer(attempt, trained, checkpointing, bf16):
    model, recorder = make_model(trained), Recorder()
    inputs = LayerInputs(model)
    options = (
        {}
        if checkpointing is None
        else {"activation_checkpointing": True, "activation_checkpointing_kwargs": checkpointing}
    )
    if attempt == "neftune_noise_alpha":
        options["neftune_noise_alpha"] = ALPHA
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=bf16,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        callbacks = [recorder, *([NEFTuneCallback(ALPHA)] if attempt == "NEFTuneCallback" else [])]
        trainer = RecordingTrainer(model, arguments, train_dataset=make_rows(), callbacks=callbacks)
        trainer.by_hand, trainer.masks, trainer.needed_grad = attempt == "compute_loss", [], []
        handle = apply_neftune(model, ALPHA) if attempt == "apply_neftune" else None
        undo = patch_trainer().undo if attempt == "neftune_noise_alpha" else lambda: None
        try:
            trainer.train()
        finally:
            undo()
    if handle is not None:
        assert (
            handle.stats()["calls"] == STEPS
        )  # a recomputation does not look the embedding up again
        handle.remove()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, inputs, trainer.masks, trainer.needed_grad, recorder.gradients, losses


def train_by_hand(attempt, trained, checkpointing):
    """A loop of one's own in float16 with a gradient scaler."""
    model = make_model(trained)
    inputs = LayerInputs(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad], lr=1e-2
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    handle = apply_neftune(model, ALPHA) if attempt == "apply_neftune" else None
    rows, masks, needed_grad, gradients, losses = make_rows(), [], [], [], []
    for step in range(STEPS):
        batch = {
            name: torch.stack([row[name] for row in rows[4 * step : 4 * step + 4]])
            for name in rows[0]
        }
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(
                **(noisy_embeds(model, batch) if attempt == "compute_loss" else batch)
            ).loss
        masks.append(batch["attention_mask"])
        needed_grad.append(loss.requires_grad)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(
            {
                name: value.grad.clone()
                for name, value in model.named_parameters()
                if value.requires_grad
            }
        )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**8  # no step was skipped for an overflow
    if handle is not None:
        assert handle.stats()["calls"] == STEPS
        handle.remove()
    return model, inputs, masks, needed_grad, gradients, losses


def check_training(trained, checkpointing, outcome):
    model, inputs, masks, needed_grad, gradients, losses = outcome
    assert needed_grad == [True] * STEPS and len(gradients) == STEPS
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    for step, found in enumerate(gradients):
        assert found and all(gradient.isfinite().all() for gradient in found.values())
        zero = [name for name, gradient in found.items() if not gradient.any()]
        assert (
            zero == [] if trained == "full" or step > 0 else all("lora_A" in name for name in zero)
        )  # B begins as zeros
    started = dict(make_model(trained).named_parameters())
    changed = {
        name for name, value in model.named_parameters() if not torch.equal(value, started[name])
    }
    assert changed == set(gradients[0])
    assert [len(inputs.forward), len(inputs.again)] == [STEPS, STEPS if checkpointing else 0]
    assert all(
        torch.equal(one, other)
        for one, other in zip(inputs.forward, inputs.again, strict=bool(checkpointing))
    )
    weight = started[
        "base_model.model.model.embed_tokens.weight"
        if trained == "lora"
        else "model.embed_tokens.weight"
    ]
    first, mask = inputs.forward[0], masks[0]
    nearest = torch.cdist(first.float(), weight.float().expand(len(first), -1, -1)).amin(
        -1
    )  # of the table's rows, from each token
    assert torch.all(
        (nearest > 1e-3) == (mask == 1)
    )  # real tokens moved off their row, padding did not
    assert torch.all(
        nearest <= ALPHA / mask.sum(1, keepdim=True).sqrt()
    )  # √d times the largest noise


@pytest.mark.parametrize(
    "bf16, checkpointing",
    [
        pytest.param(False, "reentrant", id="fp32-reentrant"),
        pytest.param(True, "non-reentrant", id="bf16-non-reentrant"),
        pytest.param(False, "non-reentrant", id="fp32-non-reentrant", marks=pytest.mark.long),
        pytest.param(True, "reentrant", id="bf16-reentrant", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(
    "attempt", ("apply_neftune", "compute_loss", "neftune_noise_alpha", "NEFTuneCallback")
)
def test_attempts_train(attempt, trained, bf16, checkpointing):
    options = CHECKPOINTING[checkpointing]
    outcome = train_with_trainer(attempt, trained, options, bf16)
    check_training(trained, options, outcome)
    for checkpointed, kept in zip(
        outcome[4], kept_gradients(train_with_trainer, attempt, trained, None, bf16), strict=True
    ):
        assert all(torch.equal(checkpointed[name], gradient) for name, gradient in kept.items())


@pytest.mark.parametrize("checkpointing", ("reentrant", "non-reentrant"))
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("attempt", ("apply_neftune", "compute_loss"))
def test_attempts_train_in_fp16_with_a_scaler(attempt, trained, checkpointing):
    options = CHECKPOINTING[checkpointing]
    outcome = train_by_hand(attempt, trained, options)
    check_training(trained, options, outcome)
    for checkpointed, kept in zip(
        outcome[4], kept_gradients(train_by_hand, attempt, trained, None), strict=True
    ):
        assert all(torch.equal(checkpointed[name], gradient) for name, gradient in kept.items())


def test_all_attempts_train_the_same_weights():
    models = [
        train_with_trainer(attempt, "full", {"use_reentrant": True}, False)[0]
        for attempt in ("apply_neftune", "NEFTuneCallback", "neftune_noise_alpha")
    ]
    for other in models[1:]:
        assert all(
            torch.equal(one, two)
            for one, two in zip(models[0].parameters(), other.parameters(), strict=True)
        )


def frozen_and_checkpointed(use_reentrant=True):
    model = make_model("lora")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = {
        name: torch.stack([row[name] for row in make_rows(4)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    ids = batch.pop("input_ids")
    return model, model.get_input_embeddings(), ids, batch


def lora_gradients(model, loss):
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if "lora_B" in name}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_embed_forward_skips_the_hook_that_lets_gradients_through():
    """The blog's loss: documented in examples/compute_loss.py, remedied by calling the module."""
    model, embed, ids, batch = frozen_and_checkpointed()
    mask = batch["attention_mask"]
    blogs = add_noise(embed.forward(ids), ALPHA, attention_mask=mask)
    loss = model(inputs_embeds=blogs, **batch).loss
    assert loss.requires_grad is False
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    loss = model(inputs_embeds=add_noise(embed(ids), ALPHA, attention_mask=mask), **batch).loss
    assert loss.requires_grad
    assert all(gradient.any() for gradient in lora_gradients(model, loss).values())
    model, embed, ids, batch = frozen_and_checkpointed(use_reentrant=False)  # needs no hook
    loss = model(
        inputs_embeds=add_noise(embed.forward(ids), ALPHA, attention_mask=mask), **batch
    ).loss
    assert all(gradient.any() for gradient in lora_gradients(model, loss).values())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_functional_call_on_a_frozen_weight():
    """No module is called, so no hook runs: requires_grad_() on the result, or add_noise on the
    called embedding.
    """
    model, embed, ids, batch = frozen_and_checkpointed()
    options = {"attention_mask": batch["attention_mask"], "seed": 3}
    embeds = noisy_embedding(ids, embed.weight, ALPHA, **options)
    assert not embeds.requires_grad
    assert model(inputs_embeds=embeds, **batch).loss.requires_grad is False
    remedied = lora_gradients(model, model(inputs_embeds=embeds.requires_grad_(), **batch).loss)
    assert all(gradient.any() for gradient in remedied.values())
    other, embed, ids, batch = frozen_and_checkpointed()
    also = lora_gradients(
        other, other(inputs_embeds=add_noise(embed(ids), ALPHA, **options), **batch).loss
    )
    assert all(torch.equal(remedied[name], gradient) for name, gradient in also.items())


def test_noise_inside_a_checkpointed_segment_is_recomputed():
    """Lookup and noise within the checkpoint: both kinds restore the generator, so the noise is
    drawn again as it was.
    """
    weight = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)))
    ids = torch.stack([row["input_ids"] for row in make_rows(4)])
    mask = (ids != 0).long()
    segments = {
        "add_noise": lambda scale: (
            add_noise(nn.functional.embedding(ids, weight), ALPHA, attention_mask=mask).square()
            * scale
        ),
        "noisy_embedding": lambda scale: (
            noisy_embedding(ids, weight, ALPHA, attention_mask=mask).square() * scale
        ),
    }
    for segment in segments.values():
        found = []
        for options in CHECKPOINTING.values():
            weight.grad, scale = None, torch.ones((), requires_grad=True)
            torch.manual_seed(5)
            out = (
                segment(scale)
                if options is None
                else torch.utils.checkpoint.checkpoint(segment, scale, **options)
            )
            out.sum().backward()
            found.append(weight.grad)
        assert all(torch.equal(gradient, found[0]) for gradient in found[1:])


def test_forward_put_on_the_embedding_recurses_and_apply_neftune_does_not():
    """emb.forward = closure(emb): the closure calls the module, whose forward is the closure."""

    def closure(embedding):
        return lambda ids: add_noise(embedding(ids), ALPHA)

    ids = torch.arange(1, 9)[None]
    embedding = nn.Embedding(VOCAB, HIDDEN)
    embedding.forward = closure(embedding)
    for mode in (True, False):
        with pytest.raises(RecursionError):
            embedding.train(mode)(ids)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(embedding)

    model = make_model("full")
    mask = torch.ones_like(ids)
    clean = model.get_input_embeddings()(ids).detach()
    handle = apply_neftune(model, ALPHA)
    torch.manual_seed(3)
    drawn = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=drawn)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inputs = LayerInputs(other)
        torch.manual_seed(3)
        other(ids, attention_mask=mask, labels=ids).loss.backward()
        other.eval()(ids, attention_mask=mask)
        assert torch.equal(inputs.forward[0], clean + noise) and torch.equal(
            inputs.forward[1], clean
        )
        assert other.get_input_embeddings().weight.grad.isfinite().all()
    assert handle.stats()["calls"] == 1
    handle.remove()
    assert type(model.get_input_embeddings()) is nn.Embedding
