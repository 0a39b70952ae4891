"""transformers.Trainer and TRL: real batches, reference policies, rollouts, crashes, resumption;
what transformers' own hook does there.
"""

import math
import types

import pytest
import torch

from neftune_kernels import apply_neftune, neftune_noise
from neftune_kernels.schedules import linear_schedule, warmup_schedule

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from neftune_kernels.integrations.transformers import (  # noqa: E402
    NEFTuneCallback,
    patch_trainer,
    unpatch_trainer,
)

HIDDEN, WORDS = 16, 60
DOCUMENTS = [
    5,
    3,
    9,
    2,
    7,
    4,
    8,
    6,
    # lengths; all tokens of document i are the word 4 + i, so a batch shows what its tokens belong
    # to
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        "<pad>": 0,
        "<bos>": 1,
        "<eos>": 2,
        "<unk>": 3,
        **{f"w{i}": 4 + i for i in range(WORDS - 4)},
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def family(name):
    torch.manual_seed(0)
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    config = {
        "Qwen2": lambda: transformers.Qwen2Config(**tokens, **sizes),
        "Mistral": lambda: transformers.MistralConfig(**tokens, **sizes),
        "Gemma3": lambda: transformers.Gemma3TextConfig(**tokens, **sizes, head_dim=8),
        "GPT2": lambda: transformers.GPT2Config(
            **tokens, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=64
        ),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config)


def documents():
    return datasets.Dataset.from_list(
        [{"input_ids": [4 + i] * length} for i, length in enumerate(DOCUMENTS)]
    )


COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
}


class Watch:
    """Of every noisy forward of the model's embedding: ids, output without noise, output, seed
    (ours).
    """

    def __init__(self, model):
        self.calls = []
        self.embedding = model.get_input_embeddings()
        self.hook = self.embedding.register_forward_hook(self.record)

    def record(self, module, args, output):
        clean = (
            getattr(type(module), "_neftune_base", type(module)).forward(module, args[0]).detach()
        )
        site = getattr(module, "_neftune", None)
        seed = site.last.noise.seed if site is not None and site.last is not None else None
        self.calls.append(
            types.SimpleNamespace(
                ids=args[0],
                clean=clean,
                out=output.detach().clone(),
                seed=seed,
                grad=torch.is_grad_enabled(),
            )
        )


def wear_paper_noise(calls):
    """Every token has alpha/sqrt(L d) u with the length L of its own document, padding none: to the
    bit.
    """
    for call in calls:
        noise = neftune_noise(
            call.ids.shape, HIDDEN, 5.0, attention_mask=call.ids * (call.ids >= 4), seed=call.seed
        )
        assert torch.equal(call.out, call.clean + noise)


def wear_no_more_than_paper_noise(calls):
    """The same by magnitude, for any generator: |noise| < alpha/sqrt(L d) and above half of it
    somewhere, in every document.
    """
    for call in calls:
        noise = (call.out - call.clean).abs()
        for word in call.ids.unique().tolist():
            bound = 0.0 if word < 4 else 5.0 / math.sqrt(DOCUMENTS[word - 4] * HIDDEN)
            largest = float(noise[call.ids == word].max())
            assert largest <= bound * (1 + 1e-6) and largest >= bound / 2, (
                f"document of {word}: {largest} for {bound}"
            )


LAYOUTS = {
    "padded": {},
    "packing=True (bfd)": {"packing": True, "max_length": 16, "packing_strategy": "bfd"},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free, pad_to_multiple_of=8": {
        "padding_free": True,
        "max_length": None,
        "pad_to_multiple_of": 8,
    },
    "padded, pad_to_multiple_of=16": {"pad_to_multiple_of": 16},
}


def sft(model, tmp_path, callbacks=(), **options):
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **{**COMMON, "max_length": 32, **options})
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=documents(),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_batches(layout, tmp_path, proves):
    model = llama()
    watch = Watch(model)
    sft(model, tmp_path, [NEFTuneCallback(5.0)], **LAYOUTS[layout]).train()
    assert len(watch.calls) == 2 and all(len(call.ids.unique()) > 1 for call in watch.calls)
    wear_paper_noise(watch.calls)
    wear_no_more_than_paper_noise(watch.calls)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    proves("Llama", "TRL SFTTrainer", layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["padded", "packing=True (bfd)", "padding_free"])
@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Gemma3", "GPT2"])
def test_sft_batches_of_other_families(name, layout, tmp_path, proves):
    model = family(name)
    watch = Watch(model)
    sft(model, tmp_path, [NEFTuneCallback(5.0)], **LAYOUTS[layout]).train()
    assert len(watch.calls) == 2
    wear_paper_noise(watch.calls)
    proves(name, "TRL SFTTrainer", layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_batches_with_the_hook_of_transformers(layout, tmp_path):
    """The same check sees the padded or packed length in transformers' own hook (field:
    transformers issue 34659).
    """
    model = llama()
    watch = Watch(model)
    trainer = sft(model, tmp_path, neftune_noise_alpha=5.0, **LAYOUTS[layout])
    train = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (
        watch.hook.remove(),
        watch.__init__(model),
        train(*args, **kwargs),
    )[-1]  # after HF's hook
    trainer.train()
    assert watch.calls
    with pytest.raises(AssertionError, match="document of"):
        wear_no_more_than_paper_noise(watch.calls)


@pytest.mark.filterwarnings("ignore")
def test_sft_wrapped_packing_tells_no_boundaries(tmp_path, proves):
    """wrapped packing cuts one run of tokens, says nothing of documents: a row is a sample."""
    model = llama()
    watch = Watch(model)
    sft(
        model,
        tmp_path,
        [NEFTuneCallback(5.0)],
        packing=True,
        packing_strategy="wrapped",
        max_length=8,
    ).train()
    for call in watch.calls:
        assert call.ids.shape[1] == 8
        assert torch.equal(
            call.out,
            call.clean
            + neftune_noise(
                call.ids.shape, HIDDEN, 5.0, attention_mask=call.ids != 0, seed=call.seed
            ),
        )
    proves("Llama", "TRL SFTTrainer", "packing=True (wrapped)")


def preferences():
    return datasets.Dataset.from_list(
        [{"prompt": f"w{i} w1", "chosen": "w2 w3", "rejected": f"w4 w{i} w9"} for i in range(8)]
    )


def first_loss(trainer):
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def dpo(tmp_path, callbacks=(), lora=True, **options):
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), **{**COMMON, "max_steps": 1, "learning_rate": 1e-3, **options}
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    return trl.DPOTrainer(
        ref_model=None if lora else llama(),
        model=llama(),
        args=arguments,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [True, False])
def test_dpo_reference_is_clean(lora, tmp_path, proves):
    """Reference log-probs in train mode, also with PEFT's adapters disabled, are eval mode's, bit
    for bit; the policy is noised.
    """
    trainer = dpo(tmp_path, [NEFTuneCallback(5.0)], lora=lora)
    watch = Watch(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.train()
    clean = [call for call in watch.calls if torch.equal(call.out, call.clean)]
    noisy = [call for call in watch.calls if not torch.equal(call.out, call.clean)]
    assert noisy and all(call.grad for call in noisy) and not any(call.grad for call in clean)
    assert not lora or clean, "with PEFT the reference is the model itself, its adapters disabled"
    for call in noisy:
        mask = call.ids != 0
        assert torch.equal(
            call.out,
            call.clean
            + neftune_noise(call.ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=call.seed),
        )
    assert not hasattr(model.get_input_embeddings(), "_neftune")
    proves("Llama", "TRL DPOTrainer", "padded")


@pytest.mark.filterwarnings("ignore")
def test_dpo_reference_under_the_hook_of_transformers_is_noised(tmp_path):
    """At the first step policy and reference agree, so the loss is ln 2 unless one of them is
    noised and the other differently.
    """
    assert first_loss(dpo(tmp_path)) == pytest.approx(math.log(2), abs=1e-6)
    trainer = dpo(tmp_path, neftune_noise_alpha=15.0)
    watch = []
    trainer.train_dataset  # noqa: B018
    original = transformers.integrations.neftune.neftune_post_forward_hook
    assert original is not None
    embedding = trainer.model.get_input_embeddings()
    train = trainer.training_step

    def step(*args, **kwargs):
        embedding.register_forward_hook(
            lambda module, inputs, output: watch.append(
                (
                    torch.is_grad_enabled(),
                    torch.equal(output, torch.nn.functional.embedding(inputs[0], module.weight)),
                )
            )
        )
        return train(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    assert (False, False) in watch, "a forward without grad was noised"


@pytest.mark.filterwarnings("ignore")
def test_kto_and_reward(tmp_path, proves):
    trainer_class = getattr(trl, "KTOTrainer", None)
    rows = [{"prompt": f"w{i} w1", "completion": f"w2 w{i}", "label": i % 2 == 0} for i in range(8)]
    arguments = trl.KTOConfig(output_dir=str(tmp_path), **{**COMMON, "max_steps": 1})
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trainer = trainer_class(
        model=llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=[NEFTuneCallback(5.0)],
    )
    watch = Watch(trainer.model)
    trainer.train()
    noisy = [call.grad for call in watch.calls if not torch.equal(call.out, call.clean)]
    clean = [call.grad for call in watch.calls if torch.equal(call.out, call.clean)]
    assert noisy and all(noisy) and clean and not any(clean)
    proves("Llama", "TRL KTOTrainer", "padded")

    config = llama().config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    arguments = trl.RewardConfig(output_dir=str(tmp_path), **{**COMMON, "max_steps": 1})
    pairs = datasets.Dataset.from_list(
        [{"chosen": f"w{i} w2 w3", "rejected": f"w{i} w4"} for i in range(8)]
    )
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer(),
        callbacks=[NEFTuneCallback(5.0)],
    )
    watch = Watch(trainer.model)
    trainer.train()
    assert watch.calls
    for call in watch.calls:
        assert torch.equal(
            call.out,
            call.clean
            + neftune_noise(
                call.ids.shape, HIDDEN, 5.0, attention_mask=call.ids != 0, seed=call.seed
            ),
        )
    proves("Llama", "TRL RewardTrainer", "padded")


@pytest.mark.filterwarnings("ignore")
def test_grpo_rollouts_are_clean(tmp_path, proves):
    """Rollouts and old log-probs run without grad in train mode: no noise.

    The policy's own forward of the loss has it.
    """
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        **{**COMMON, "max_steps": 1},
        num_generations=2,
        max_completion_length=4,
        num_iterations=2,
        steps_per_generation=1,
    )
    prompts = datasets.Dataset.from_list([{"prompt": f"w{i} w1"} for i in range(8)])
    trainer = trl.GRPOTrainer(
        model=llama(),
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer(),
        callbacks=[NEFTuneCallback(5.0)],
        reward_funcs=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
    )
    watch = Watch(trainer.model)
    trainer.train()
    noisy = [call for call in watch.calls if not torch.equal(call.out, call.clean)]
    clean = [call for call in watch.calls if torch.equal(call.out, call.clean)]
    assert len(clean) >= 4 and not any(call.grad for call in clean), (
        "four decoding steps and the old log-probs"
    )
    assert noisy and all(call.grad for call in noisy)
    proves("Llama", "TRL GRPOTrainer", "rollouts and policy")


def patched(name, tmp_path):
    """A trainer of TRL that only the configuration tells of NEFTune."""
    told = {"neftune_noise_alpha": 5.0, "output_dir": str(tmp_path), **COMMON, "max_steps": 1}
    if name == "RLOO":
        arguments = trl.RLOOConfig(**told, num_generations=2, max_completion_length=4, beta=0.0)
        return trl.RLOOTrainer(
            model=llama(),
            args=arguments,
            train_dataset=preferences().remove_columns(["chosen", "rejected"]),
            processing_class=tokenizer(),
            reward_funcs=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
        )
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    kind, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    more = {"max_new_tokens": 4} if name == "GKD" else {}
    dataset = preferences()
    if name == "GKD":
        turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w4 w5"}]
        dataset = datasets.Dataset.from_list([{"messages": turns}] * 4)
        more["lmbda"] = 1.0  # it generates
    arguments = config(**told, max_length=32, **more)
    models = {"teacher_model": llama()} if name == "GKD" else {}
    return kind(
        model=llama(),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer(),
        **models,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["RLOO", "ORPO", "CPO", "GKD"])
def test_patched_trainers_of_trl(name, tmp_path, proves):
    """The policy's forward has the paper's noise, to the bit; rollouts have none."""
    patch_trainer()
    try:
        trainer = patched(name, tmp_path)
        watch = Watch(trainer.model)
        trainer.train()
    finally:
        unpatch_trainer()
    noisy = [call for call in watch.calls if call.grad]
    assert len(noisy) == 1
    for call in noisy:
        mask = call.ids != 0
        noise = neftune_noise(call.ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=call.seed)
        assert torch.equal(call.out, call.clean + noise) and bool(noise.any())
    rollouts = [call for call in watch.calls if not call.grad]
    assert all(torch.equal(call.out, call.clean) for call in rollouts)
    assert bool(rollouts) == (name in ("RLOO", "GKD"))
    proves("Llama", f"TRL {name}Trainer", "patch_trainer()")


class Interrupt(transformers.TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **_):
        raise self.error


def fingerprint(model):
    """Class, hooks and NEFTune's traces of every module; Trainer leaves traces of its own."""
    return {
        name: (
            type(module),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            [key for key in vars(module) if "neftune" in key],
        )
        for name, module in model.named_modules()
    }


def plain_trainer(model, tmp_path, callbacks=(), **options):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **{**COMMON, **options})
    rows = [
        {"input_ids": [4 + i] * length, "labels": [4 + i] * length}
        for i, length in enumerate(DOCUMENTS)
    ]
    collator = transformers.DataCollatorForTokenClassification(tokenizer())
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "error", [ValueError("crash"), KeyboardInterrupt(), torch.OutOfMemoryError("oom")]
)
@pytest.mark.parametrize("way", ["callback", "added callback", "configuration"])
def test_nothing_is_left_after_a_crash(error, way, tmp_path):
    model = llama()
    before = fingerprint(model)
    if way == "configuration":
        undo = patch_trainer().undo
        trainer = plain_trainer(model, tmp_path, [Interrupt(error)], neftune_noise_alpha=5.0)
    else:
        trainer = plain_trainer(
            model,
            tmp_path,
            [Interrupt(error)] + ([NEFTuneCallback(5.0)] if way == "callback" else []),
        )
        if way == "added callback":
            trainer.add_callback(NEFTuneCallback(5.0))
    with pytest.raises(type(error)):
        trainer.train()
    assert fingerprint(model) == before
    if way == "configuration":
        undo()


@pytest.mark.filterwarnings("ignore")
def test_the_hook_of_transformers_is_left_after_a_crash(tmp_path):
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="crash"):
        plain_trainer(
            model, tmp_path, [Interrupt(ValueError("crash"))], neftune_noise_alpha=5.0
        ).train()
    assert fingerprint(model) != before


@pytest.mark.filterwarnings("ignore")
def test_configuration_uses_ours(tmp_path, proves):
    """axolotl, LLaMA-Factory and others only set TrainingArguments.neftune_noise_alpha: one call
    makes that exact.
    """
    model = llama()
    before = fingerprint(model)
    patch = patch_trainer()
    assert patch_trainer() is patch and patch.last_stats is None
    try:
        watch = Watch(model)
        plain_trainer(model, tmp_path, neftune_noise_alpha=5.0).train()
        watch.hook.remove()
        wear_paper_noise(watch.calls)
        assert len(watch.calls) == 2 and fingerprint(model) == before
        watch = Watch(model)
        plain_trainer(
            model, tmp_path, [NEFTuneCallback(5.0)], neftune_noise_alpha=5.0
        ).train()  # both: one noise
        watch.hook.remove()
        wear_paper_noise(watch.calls)
        assert fingerprint(model) == before
    finally:
        unpatch_trainer()
    assert (
        transformers.trainer.activate_neftune is transformers.integrations.neftune.activate_neftune
    )
    proves("Llama", "TrainingArguments(neftune_noise_alpha=)", "padded")


@pytest.mark.filterwarnings("ignore")
def test_two_noises_are_refused(tmp_path):
    model = llama()
    with pytest.raises(RuntimeError, match="two noises.*neftune_noise_alpha=None"):
        plain_trainer(model, tmp_path, [NEFTuneCallback(5.0)], neftune_noise_alpha=5.0).train()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(
        RuntimeError, match="two noises"
    ):  # of which transformers' would never run: said before any step all the same
        plain_trainer(
            transformers.T5ForConditionalGeneration(config),
            tmp_path,
            [NEFTuneCallback(5.0)],
            neftune_noise_alpha=5.0,
        ).train()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
def test_log_and_schedule(tmp_path, proves):
    schedule = warmup_schedule(1, linear_schedule(10.0, 0.0, 3))
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    trainer = plain_trainer(
        llama(), tmp_path, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    trainer.add_callback(Reporter())
    trainer.add_callback(NEFTuneCallback(schedule))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (
        [entry["neftune/noise_alpha"] for entry in entries]
        == [schedule(step) for step in range(4)]
        == [0.0, 10.0, pytest.approx(20 / 3), pytest.approx(10 / 3)]
    )
    assert [entry["neftune/calls"] for entry in entries] == [0, 2, 4, 6], (
        "two micro-batches per step"
    )
    assert entries[-1]["neftune/skipped/noise_alpha is 0"] == 2
    for entry in entries[1:]:
        assert entry["neftune/length_min"] in DOCUMENTS and entry["neftune/length_max"] in DOCUMENTS
        assert 0.9 < entry["neftune/max_noise_ratio"] < 1
        assert entry["neftune/magnitude_max"] == pytest.approx(
            entry["neftune/noise_alpha"] / math.sqrt(entry["neftune/length_min"] * HIDDEN)
        )
    assert [logs["neftune/noise_alpha"] for logs in seen if "loss" in logs] == [
        entry["neftune/noise_alpha"] for entry in entries
    ]
    assert "neftune/noise_alpha" not in trainer.state.log_history[-1]
    proves("Llama", "transformers.Trainer", "padded")


@pytest.mark.filterwarnings("ignore")
def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    whole = plain_trainer(
        llama(), tmp_path / "whole", [NEFTuneCallback(linear_schedule(10.0, 1.0, 4))], **options
    )
    whole.train()
    part = plain_trainer(
        llama(), tmp_path / "part", [NEFTuneCallback(linear_schedule(10.0, 1.0, 4))], **options
    )
    with pytest.raises(KeyboardInterrupt):

        class Stop(transformers.TrainerCallback):
            def on_save(self, args, state, control, **_):
                raise KeyboardInterrupt

        part.add_callback(Stop())
        part.train()
    rest = plain_trainer(
        llama(), tmp_path / "part", [NEFTuneCallback(linear_schedule(10.0, 1.0, 4))], **options
    )
    rest.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert all(
        torch.equal(value, rest.model.state_dict()[name])
        for name, value in whole.model.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore")
def test_compiled_trainer(tmp_path, proves):
    """torch_compile=True: the noise of eager mode."""
    torch._dynamo.reset()
    eager = plain_trainer(llama(), tmp_path, [NEFTuneCallback(5.0)], per_device_train_batch_size=8)
    eager.train()
    compiled = plain_trainer(
        llama(),
        tmp_path,
        [NEFTuneCallback(5.0)],
        torch_compile=True,
        torch_compile_backend="aot_eager",
        per_device_train_batch_size=8,
    )
    compiled.train()
    logged = [entry for entry in compiled.state.log_history if "loss" in entry]
    assert all(
        entry["neftune/noise_alpha"] == 5.0 and "neftune/calls" not in entry for entry in logged
    )
    quiet = plain_trainer(llama(), tmp_path, per_device_train_batch_size=8)
    quiet.train()
    assert losses(compiled) == pytest.approx(
        losses(eager), rel=1e-6
    )  # printed figures of the same float32 sums in another order
    assert losses(quiet) != pytest.approx(losses(eager), rel=1e-6)
    proves("Llama", "transformers.Trainer", "torch_compile=True")


@pytest.mark.filterwarnings("ignore")
def test_seq2seq_trainer(tmp_path, proves):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    rows = [
        {"input_ids": [4 + i] * length, "labels": [4 + i] * (12 - length)}
        for i, length in enumerate(DOCUMENTS)
    ]
    arguments = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), **COMMON)
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), model=model),
        callbacks=[NEFTuneCallback(5.0)],
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["neftune/calls"] == 2
    assert entry["neftune/length_min"] < entry["neftune/length_max"]
    proves("T5", "transformers.Seq2SeqTrainer", "padded")


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_noise_warns(tmp_path):
    class Clean(transformers.Trainer):
        def compute_loss(self, model, inputs, **_):
            embeds = torch.nn.functional.embedding(
                inputs["input_ids"], model.get_input_embeddings().weight
            )
            return model(
                inputs_embeds=embeds,
                attention_mask=inputs["attention_mask"],
                labels=inputs["labels"],
            ).loss

    trainer = plain_trainer(llama(), tmp_path, [NEFTuneCallback(5.0)])
    trainer.__class__ = Clean
    with pytest.warns(
        UserWarning, match="ended without one noisy forward although noise_alpha was 5.0"
    ):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_what_was_applied_before_goes_on_after_the_callback(tmp_path):
    model = llama()
    handle = apply_neftune(model, 3.0, replica=7)
    watch = Watch(model)
    plain_trainer(model, tmp_path, [NEFTuneCallback(5.0)]).train()
    assert len(watch.calls) == 2 and handle.noise_alpha == 3.0 and handle.replica == 7
    handle.remove()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_and_nested_trainings(tmp_path):
    model = llama()
    plain_trainer(model, tmp_path, [NEFTuneCallback(5.0), NEFTuneCallback(1.0)]).train()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    shared = NEFTuneCallback(5.0)

    class Nested(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            plain_trainer(llama(), tmp_path, [shared]).train()

    with pytest.raises(RuntimeError, match="in use by another training.*one of its own"):
        plain_trainer(model, tmp_path, [shared, Nested()]).train()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    plain_trainer(llama(), tmp_path, [shared]).train()


def test_bad_arguments_of_the_callback():
    with pytest.raises(TypeError, match=r"NEFTuneCallback\(\) takes no stream=: .* is replica="):
        NEFTuneCallback(5.0, stream=0)
    with pytest.raises(ValueError, match="finite and >= 0, got -1.0"):
        NEFTuneCallback(-1.0)
    with pytest.raises(
        TypeError,
        match=r"NEFTuneCallback.* unexpected keyword argument 'alpha': its name is noise_alpha",
    ):
        NEFTuneCallback(5.0, alpha=3)
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        linear_schedule(1.0, 0.0, 0)
    with pytest.raises(ValueError, match="finite and >= 0, got -2.0"):
        warmup_schedule(2, -2.0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_alphas_that_transformers_accepts_are_refused(bad, tmp_path):
    """A negative, infinite or undefined alpha goes through TrainingArguments and its own hook's
    activation; ours says so.
    """
    model = llama()
    handle = transformers.integrations.neftune.activate_neftune(model, bad)
    transformers.integrations.neftune.deactivate_neftune(model, handle)
    with pytest.raises(ValueError, match="finite and >= 0"):
        apply_neftune(model, bad)
