"""DeepSpeed ZeRO-3, two processes (gloo, CPU): the weight is whole only inside the embedding's own
forward, which is where the noise is.

Skips where DeepSpeed is not installed (requirements-deepspeed.txt).
"""

import warnings

import pytest
import torch
from test_distributed import VOCAB, batch, drawn_after, gathered, spawn
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, noisy_embedding

LEARNING_RATE = 0.5
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {  # partition the smallest parameter, gather none ahead, keep none
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
}


def make_llama(tied=False):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 2 * VOCAB + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)
    ).train()


def initialize(model, config=CONFIG):
    import deepspeed

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )[0]


def step(engine, ids, mask, seed):
    """A training step: the embedding's output, its weight as its forward saw it, and every gradient
    (the mean over the ranks).
    """
    from deepspeed.utils import safe_get_full_grad

    embedding, parameters, seen = (
        engine.module.get_input_embeddings(),
        dict(engine.module.named_parameters()),
        [],
    )

    def see(module, args, output):  # ahead of DeepSpeed's own hook, which lets go of the weight
        assert [name for name, parameter in parameters.items() if parameter.numel()] == [
            "model.embed_tokens.weight"
        ], "gathered for us"
        seen.append((output.detach().clone(), module.weight.detach().clone(), type(module.weight)))

    hook = embedding.register_forward_hook(see, prepend=True)
    torch.manual_seed(seed)
    loss = engine(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    hook.remove()
    assert not any(parameter.numel() for parameter in parameters.values()), (
        "not partitioned: the checks would say nothing of ZeRO-3"
    )
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters.items()}
    engine.step()
    ((out, weight, kind),) = seen
    assert kind is nn.Parameter
    return loss.detach(), out, weight, gradients


def whole_weights(model):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equals_one_process(model, reference, rank, got, seed, ids, mask, what):
    """This rank's step against a model that was never partitioned, which takes the step too."""
    loss, out, weight, gradients = got
    assert torch.equal(weight, reference.model.embed_tokens.weight), what
    expected = noisy_embedding(
        ids, weight, 5.0, attention_mask=mask, seed=drawn_after(seed), replica=rank
    )
    assert torch.equal(out, expected), what
    assert not torch.equal(*gathered(out)), f"{what}: both ranks drew one noise"
    reference.zero_grad()
    expected_loss = reference(
        inputs_embeds=noisy_embedding(
            ids,
            reference.model.embed_tokens.weight,
            5.0,
            attention_mask=mask,
            seed=drawn_after(seed),
            replica=rank,
        ),
        attention_mask=mask,
        labels=ids.masked_fill(mask == 0, -100),
    ).loss
    assert torch.equal(loss, expected_loss), what
    weights = whole_weights(model)
    for name, parameter in reference.named_parameters():
        assert gradients[name].isfinite().all() and gradients[name].any(), f"{what}: {name}"
        with torch.no_grad():
            assert not torch.equal(weights[name], parameter), f"{what}: {name} was not trained"
            parameter.copy_(weights[name])


def check_zero3(rank, folder):
    import deepspeed

    # its all-reduce in shared memory, which ZeRO does not use, would be compiled for a minute and a
    # half
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ids, mask = batch()
    ids, mask = ids + VOCAB, mask.clone()
    mask[3, :2] = 1  # a row without a token has no loss
    for order in ("before", "after", "partitioned from birth", "tied"):
        with deepspeed.zero.Init(
            config_dict_or_path={"train_batch_size": 8, **CONFIG},
            enabled=order == "partitioned from birth",
        ):
            model = make_llama(order == "tied")
        names, embedding = list(model.state_dict()), model.get_input_embeddings()
        handle = apply_neftune(model, 5.0) if order == "before" else None
        engine = initialize(model)
        assert embedding.weight.numel() == 0 and tuple(embedding.weight.ds_shape) == (
            2 * VOCAB + 1,
            32,
        )
        reference = make_llama(order == "tied")
        reference.load_state_dict(
            whole_weights(model), strict=order != "tied"
        )  # born partitioned, a model is initialised otherwise
        handle = handle or apply_neftune(model, 5.0)
        for seed in (3, 4):
            got = step(engine, ids, mask, seed)
            assert_equals_one_process(
                model, reference, rank, got, seed, ids, mask, f"{order}, seed {seed}"
            )
        assert embedding._external_params == {}
        stats = handle.stats()
        assert (stats["calls"], stats["samples"], stats["length_min"], stats["length_max"]) == (
            2,
            4,
            2,
            7,
        )
        assert 0.9 < stats["max_noise_ratio"] < 1

        engine.eval()
        state = torch.get_rng_state()
        with torch.no_grad():
            logits = engine(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(
                logits, reference.eval()(input_ids=ids, attention_mask=mask).logits
            ), order
        assert torch.equal(torch.get_rng_state(), state), "eval mode drew a seed"
        engine.train()
        handle.remove()
        assert type(embedding) is nn.Embedding and not [
            name for name in vars(embedding) if "neftune" in name
        ]
        assert list(model.state_dict()) == names
        _, out, weight, _ = step(engine, ids, mask, 5)
        assert torch.equal(out, nn.functional.embedding(ids, weight)), order
        engine.destroy()

    # the module instead of apply_neftune: nobody tells it of masks, and it works its replica out,
    # since DeepSpeed's clone of the world leaves no rank out
    model, reference = make_llama(), make_llama()
    noisy = NEFTuneEmbedding.from_embedding(model.model.embed_tokens, 5.0)
    model.set_input_embeddings(noisy)
    _, out, weight, _ = step(initialize(model), ids, mask, 3)
    assert torch.equal(weight, reference.model.embed_tokens.weight)
    assert torch.equal(out, noisy_embedding(ids, weight, 5.0, seed=drawn_after(3), replica=rank))


def test_zero3_equals_one_process(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    spawn(tmp_path, 2, check_zero3)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(2 * VOCAB + 1, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids) * 8.0)


def check_no_look_under_zero3(rank, folder):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ids, mask = batch()
    model = Scaled()
    weight = model.embed.weight.detach().clone()
    handle = apply_neftune(model, 5.0, embedding="embed")
    engine, seen = initialize(model), []
    model.embed.register_forward_hook(
        lambda module, args, out: seen.append(out.detach().clone()), prepend=True
    )
    said = []
    for factor in (1.0, 1.0, 8.0):
        if factor != 1:
            handle.embedding_multiplier = factor  # the line that was said, with the right number
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine(ids, attention_mask=mask)
        said += [str(one.message) for one in caught if "embedding_multiplier=" in str(one.message)]
        expected = noisy_embedding(
            ids, weight, 5.0 / factor, attention_mask=mask, seed=drawn_after(3), replica=rank
        )
        assert torch.equal(seen.pop(), expected) and not seen, "looked up once"
    assert len(said) == 1 and "ZeRO-3" in said[0] and "multiplier=1.0" in said[0], said
    engine.destroy()


def test_under_zero3_a_multiplier_is_to_be_said(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    spawn(tmp_path, 2, check_no_look_under_zero3)
