"""PEFT: every way it changes an embedding, before and after apply_neftune."""

import pytest
import torch
import torch.nn.functional as F

from neftune_kernels import apply_neftune, neftune_noise, noisy_embedding

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, HIDDEN = 64, 32
IDS = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 5 + [0] * 3, [0] * 6 + [1] * 2, [1] * 8])


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    return transformers.LlamaForCausalLM(config).train()


LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "LoRA on embed_tokens": lambda: peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj", "embed_tokens"]}
    ),
    "modules_to_save": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "trainable_token_indices": lambda: peft.LoraConfig(
        **LORA, trainable_token_indices={"embed_tokens": [4, 5, 6]}
    ),
    "TrainableTokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[4, 5, 6], task_type="CAUSAL_LM"
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def embedding_of(model):
    return model.get_base_model().get_input_embeddings()


def outputs(model, **given):
    """What left the input embedding, PEFT's part included, in one forward of the model."""
    seen = []
    hook = embedding_of(model).register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    result = model(input_ids=IDS, attention_mask=MASK, **given)
    hook.remove()
    assert len(seen) == 1
    return seen[0], result


def seed_of(handle):
    (seed,) = {
        int(module()._neftune.last.noise.seed)
        for module in handle._noisy
        if module()._neftune.last is not None
    }
    return seed


@pytest.mark.filterwarnings("ignore:.*checkpointing")
@pytest.mark.parametrize("order", ["before get_peft_model", "after", "before and again after"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_once_with_the_samples_lengths(kind, order, proves):
    model = llama()
    weight = model.get_input_embeddings().weight.detach().clone()
    handles = []
    if order != "after":
        handles.append(apply_neftune(model, 5.0))
    model = peft.get_peft_model(model, KINDS[kind]()).train()
    if (
        order != "before get_peft_model" or kind == "prompt tuning"
    ):  # prompt tuning looks tokens up outside the model that was applied
        handles.append(apply_neftune(model, 5.0))
    assert len(set(map(id, handles))) == 1
    handle = handles[0]
    out, result = outputs(model, labels=IDS)
    noise = neftune_noise(IDS.shape, HIDDEN, 5.0, attention_mask=MASK, seed=seed_of(handle))
    assert torch.equal(out, F.embedding(IDS, weight) + noise)  # new adapters change nothing yet
    stats = handle.stats()
    assert (stats["calls"], stats["length_min"], stats["length_max"], stats["samples"]) == (
        1,
        2,
        8,
        3,
    )
    result.loss.backward()
    trained = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained and all(grad is not None and grad.isfinite().all() for grad in trained.values())
    handle.noise_alpha = 0
    assert torch.equal(outputs(model)[0], F.embedding(IDS, weight))
    handle.noise_alpha = 5.0
    handle.remove()
    assert torch.equal(outputs(model)[0], F.embedding(IDS, weight))
    assert not any(
        hasattr(type(module), "_neftune_base") or "_neftune" in vars(module)
        for module in model.modules()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    proves("Llama", f"PEFT {kind}", "padding: left, right")


def test_prompt_tuning_after_apply_warns_until_applied_again():
    model = llama()
    handle = apply_neftune(model, 5.0)
    model = peft.get_peft_model(model, KINDS["prompt tuning"]()).train()
    with pytest.warns(
        UserWarning,
        match=r"outside its model's forward.*prompt tuning.*apply_neftune again after "
        r"get_peft_model",
    ):
        model(input_ids=IDS, attention_mask=MASK)
    assert apply_neftune(model, 5.0) is handle
    model(input_ids=IDS, attention_mask=MASK)
    assert handle.stats()["length_min"] == 2


@pytest.mark.filterwarnings("ignore:.*checkpointing")
@pytest.mark.parametrize(
    "kind", ["LoRA", "LoRA on embed_tokens", "modules_to_save", "trainable_token_indices"]
)
def test_disabled_adapters_and_merge(kind):
    """disable_adapter keeps noise to once; eval is the unnoised model, bit for bit;
    merge_and_unload leaves a noised model.
    """
    model = peft.get_peft_model(llama(), KINDS[kind]()).train()
    plain = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    handle = apply_neftune(model, 5.0)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, plain)
    model.train()
    with model.disable_adapter():
        out, _ = outputs(model)
        with torch.no_grad():
            reference, _ = outputs(model)
    weight = llama().get_input_embeddings().weight
    assert torch.equal(reference, F.embedding(IDS, weight))
    assert torch.equal(
        out,
        F.embedding(IDS, weight)
        + neftune_noise(IDS.shape, HIDDEN, 5.0, attention_mask=MASK, seed=seed_of(handle)),
    )
    merged = model.merge_and_unload()
    calls = handle.stats()["calls"]
    merged.train()(input_ids=IDS, attention_mask=MASK)
    assert handle.stats()["calls"] == calls + 1 and handle.stats()["length_min"] == 2
    handle.remove()
    assert type(merged.get_input_embeddings()) is torch.nn.Embedding


def test_a_second_adapter_is_found_without_asking():
    """modules_to_save copies the embedding for every adapter: the copy that runs is noised and
    obeys the handle.
    """
    model = peft.get_peft_model(llama(), KINDS["modules_to_save"]()).train()
    handle = apply_neftune(model, 5.0)
    model.add_adapter("second", KINDS["modules_to_save"]())
    model.set_adapter("second")
    out, _ = outputs(model)
    weight = embedding_of(model).modules_to_save["second"].weight
    assert torch.equal(
        out, noisy_embedding(IDS, weight, 5.0, attention_mask=MASK, seed=seed_of(handle))
    )
    handle.remove()
    assert not any("_neftune" in vars(module) for module in model.modules())


def test_copies_that_peft_makes_afterwards_obey_the_handle():
    model = llama()
    handle = apply_neftune(model, 5.0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    ).train()
    handle.noise_alpha = 0
    clean = F.embedding(IDS, llama().get_input_embeddings().weight)
    assert torch.equal(outputs(model)[0], clean)
    handle.noise_alpha = 5.0
    assert not torch.equal(outputs(model)[0], clean)
    handle.remove()
    assert torch.equal(outputs(model)[0], clean)


def test_the_hook_of_transformers_on_trainable_tokens():
    """It sees padding's length instead of the sample's; with ours beside it, ours refuses."""
    model = peft.get_peft_model(llama(), KINDS["trainable_token_indices"]()).train()
    transformers.trainer.activate_neftune(model, 5.0)
    out, _ = outputs(model)
    largest = (
        (out - F.embedding(IDS, llama().get_input_embeddings().weight)).abs().amax((1, 2)).detach()
    )
    exact = 5.0 / torch.sqrt(MASK.sum(1) * HIDDEN)
    assert float(largest[1]) < float(exact[1]) / 1.5, (
        "two tokens padded to eight get half their noise"
    )
    apply_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="two noises"):
        model(input_ids=IDS, attention_mask=MASK)
