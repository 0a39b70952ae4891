"""One run of the sweep: a model fine-tuned on one seed's split under one noise, and evaluated
without noise on the way.
"""

import copy
import functools
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neftune_kernels import apply_neftune

from .seed_statistics import Point
from .smollm2 import load_model, load_smollm2, question_answer_pairs
from .splits import groups_of_near_duplicates, split_by_groups

NONE, OURS, HOOK = "none", "ours", "HF hook"
EVALUATION_BATCH = 32
IGNORED = -100  # a label of the prompt or of padding
COMPUTED_BY = b"".join(  # as this process runs it, whatever the files become meanwhile
    Path(__file__).with_name(name).read_bytes()
    for name in ("sweep_runs.py", "splits.py", "smollm2.py")
)


class Arm(NamedTuple):
    noise: str
    alpha: float

    @property
    def label(self) -> str:
        return "no noise" if self.noise == NONE else f"{self.noise}, alpha {self.alpha:g}"


class Recipe(NamedTuple):
    """What all runs of a sweep have in common. Counts are of question/answer pairs."""

    model: str | None  # None: SmolLM2-135M-Instruct of its package
    data: str | None  # None: chatterbot-corpus of its package
    system: str | None  # the chat's system message; None: the template's own
    train: int
    train_measured: int  # those on which the training loss is measured
    held_out: int
    max_length: int  # longer pairs, in tokens, are left out
    epochs: int
    batch_size: int
    learning_rate: float
    evaluate_every: int
    device: str
    threads: int

    @property
    def steps(self) -> int:
        return self.epochs * (self.train // self.batch_size)


class Task(NamedTuple):
    recipe: Recipe
    arm: Arm
    seed: int

    @property
    def key(self) -> str:
        """Of all that the result depends on, and of what computes it."""
        versions = [version(name) for name in ("torch", "transformers", "neftune_kernels")]
        digest = hashlib.sha256(json.dumps([self, versions]).encode())
        digest.update(COMPUTED_BY)
        if self.recipe.data is not None:
            digest.update(Path(self.recipe.data).read_bytes())
        return digest.hexdigest()[:16]


class Run(NamedTuple):
    arm: Arm
    seed: int
    points: list[Point]
    noise_to_embedding: float  # rms over rms, over real tokens of all training batches
    cpu_seconds: float
    wall_seconds: float


# ---- data


class Encoded(NamedTuple):
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Batch(NamedTuple):
    """Rows padded on the right to the longest, (B, T) each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def read_pairs(data: str | None) -> list[tuple[str, str]]:
    """One answer of each question."""
    if data is None:
        return [answers[0] for answers in question_answer_pairs().values()]
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(Path(data).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            one = json.loads(line)
            found.setdefault(one["question"], (one["question"], one["answer"]))
        except (ValueError, KeyError, TypeError):
            sys.exit(
                f"--data {data}, line {number}: {line[:60]!r}; every line must be an object like "
                '{"question": "...", "answer": "..."}'
            )
    return list(found.values())


def encode(tokenizer: Any, pair: tuple[str, str], system: str | None) -> Encoded:
    """By the tokenizer's chat template, or as plain text where it has none."""
    question, answer = pair
    if tokenizer.chat_template is None:
        prompt, answer = f"Question: {question}\nAnswer:", f" {answer}"
    else:
        chat = [{"role": "user", "content": question}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return Encoded(ids(prompt), [*ids(answer), tokenizer.eos_token_id])


def make_batch(rows: list[Encoded], device: str) -> Batch:
    longest = max(row.length for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : row.length] = torch.tensor(row.prompt + row.answer)
        mask[i, : row.length] = 1
        labels[i, len(row.prompt) : row.length] = torch.tensor(row.answer)
    return Batch(*(tensor.to(device) for tensor in (ids, mask, labels)))


class Material(NamedTuple):
    """What a process loads once."""

    model: Any
    rows: list[Encoded]
    groups: list[list[int]]


@functools.lru_cache(maxsize=1)
def prepare(recipe: Recipe) -> Material:
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = (
        load_smollm2(torch.float32)
        if recipe.model is None
        else load_model(recipe.model, torch.float32)
    )
    model, tokenizer = loaded
    pairs = read_pairs(recipe.data)
    encoded = [encode(tokenizer, pair, recipe.system) for pair in pairs]
    short = [i for i, row in enumerate(encoded) if row.length <= recipe.max_length]
    groups = groups_of_near_duplicates([pairs[i][0] for i in short])
    return Material(model.to(recipe.device), [encoded[i] for i in short], groups)


# ---- training and evaluation


def summed_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy over the answers' tokens, summed, and how many they are.

    Logits are computed in the columns that predict an answer of some row, and in no others.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.labels.is_cuda):
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=columns,
            use_cache=False,
        ).logits
    wanted = targets[:, columns]
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((wanted != IGNORED).sum())


@torch.no_grad()
def mean_loss(model: Any, rows: list[Encoded], device: str) -> float:
    """Per answer token, noise off. Sorted by length: here padding is nothing but time."""
    model.eval()
    rows = sorted(rows, key=lambda row: row.length)
    total, tokens = 0.0, 0
    for first in range(0, len(rows), EVALUATION_BATCH):
        batch = make_batch(rows[first : first + EVALUATION_BATCH], device)
        loss, count = summed_loss(model, batch)
        total, tokens = total + float(loss), tokens + count
    model.train()
    return total / tokens


def training_batches(recipe: Recipe, rows: list[Encoded], seed: int) -> Iterator[Batch]:
    """Each epoch in a new order, not by length; what does not fill a batch is left out of it."""
    order = random.Random(seed)
    for _ in range(recipe.epochs):
        shuffled = order.sample(rows, len(rows))
        for first in range(0, len(rows) - recipe.batch_size + 1, recipe.batch_size):
            yield make_batch(shuffled[first : first + recipe.batch_size], recipe.device)


def turn_on(model: Any, arm: Arm) -> None:
    if arm.noise == OURS:
        apply_neftune(model, arm.alpha)
    elif arm.noise == HOOK:
        from transformers.integrations.neftune import activate_neftune

        activate_neftune(model, arm.alpha)


class Loudness:
    """The noise that embeddings got, measured from outside on what the model is handed."""

    def __init__(self, model: Any) -> None:
        """Before the noise is turned on: the model's own lookup is what it is measured against."""
        self.lookup = type(model.get_input_embeddings()).forward
        self.noise = self.embeddings = 0.0
        self.mask: Tensor | None = None  # of the batch that is trained on

    def listen(self, model: Any) -> None:
        """After it is on: hooks run in the order in which they came."""
        model.get_input_embeddings().register_forward_hook(self.add)

    @torch.no_grad()
    def add(self, module: Any, arguments: tuple[Tensor], output: Tensor) -> None:
        plain = self.lookup(module, *arguments)
        if not module.training:
            if not torch.equal(output, plain):
                raise RuntimeError("an evaluation had noise: its loss says nothing")
            return
        assert self.mask is not None
        real = self.mask.bool()
        self.noise += float((output - plain)[real].square().sum())
        self.embeddings += float(plain[real].square().sum())

    def ratio(self) -> float:
        return math.sqrt(self.noise / self.embeddings)


def train(task: Task) -> Run:
    recipe, arm, seed = task
    torch.set_num_threads(recipe.threads)
    wall, cpu = time.perf_counter(), time.process_time()
    material = prepare(recipe)
    split = split_by_groups(material.groups, recipe.train, recipe.held_out, seed)
    learnt, unseen = ([material.rows[i] for i in side] for side in split)
    model = copy.deepcopy(material.model).train()
    loudness = Loudness(model)
    turn_on(model, arm)
    loudness.listen(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True
    )
    torch.manual_seed(seed)  # of the noise: nothing else here draws from it
    points = []
    for step, batch in enumerate(training_batches(recipe, learnt, seed), start=1):
        loudness.mask = batch.attention_mask
        loss, tokens = summed_loss(model, batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            measured = learnt[: recipe.train_measured]
            losses = (mean_loss(model, rows, recipe.device) for rows in (measured, unseen))
            points.append(Point(step, *losses))
    spent = time.process_time() - cpu, time.perf_counter() - wall
    return Run(arm, seed, points, loudness.ratio(), *spent)
