"""Real models of other packages, tiny, each in an environment of its own: `make foreign`.

    python -m bench.foreign [NAMES]    writes bench/results/foreign.md

An environment is a folder below build/foreign with exactly the pinned files; torch is this one's.
Each model is put under a plain apply_neftune, then what the error says, then what the warning says,
until EXACT (bench/judge.py); and by hand, its embedding replaced by NEFTuneEmbedding.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding

from . import judge
from .judge import Subject
from .witness import ALPHA, Sequence, arrival, padded

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "bench/results/foreign.md"
BUILD = ROOT / "build/foreign"
VOCAB = 30  # ids 4 to 23 are amino acids in ESM's alphabet, words elsewhere
GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(4, 24, (3, 12), generator=GENERATOR)
REAL = torch.arange(12) < torch.tensor([[12], [7], [3]])


class Package(NamedTuple):
    pins: tuple[str, ...]
    build: Callable[[], Subject]
    silent: Mapping[str, str] = MappingProxyType(
        {}
    )  # environment variables, so that nothing is sent anywhere


def _told(model: nn.Module, given: dict[str, Any], sequence: Sequence) -> Subject:
    mask = (sequence.length > 0).view(sequence.ids.shape).long()
    words = [{"attention_mask": mask}]
    return Subject(model.train(), given, [sequence], words)


def x_transformers() -> Subject:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=1, heads=2, attn_dim_head=16)
    model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers)
    return _told(model, {"x": IDS, "mask": REAL}, padded(IDS, REAL))


def fair_esm() -> Subject:
    from esm.model.esm2 import ESM2

    model = ESM2(num_layers=1, embed_dim=32, attention_heads=2, alphabet="ESM-1b")
    ids = IDS.masked_fill(~REAL, 1)
    return _told(model, {"tokens": ids}, padded(ids, REAL))


class Transformer(nn.Module):
    """torch's own encoder behind an embedding, in either order of axes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        embedded = self.embed(src)
        return self.encoder(embedded, src_key_padding_mask=src_key_padding_mask)


def torch_batch_first() -> Subject:
    given = {"src": IDS, "src_key_padding_mask": ~REAL}
    return _told(Transformer(True), given, padded(IDS, REAL))


def torch_time_first() -> Subject:
    given = {"src": IDS.t().contiguous(), "src_key_padding_mask": ~REAL}
    return _told(Transformer(False), given, padded(IDS, REAL))


EINOPS = (
    "einops==0.8.2",
    "einx==0.4.3",
    "loguru==0.7.3",
    "frozendict==2.5.1",
    "torch-einops-utils==0.2.0",
)
PACKAGES: dict[str, Package] = {
    "fair-esm": Package(("fair-esm==2.0.0",), fair_esm),
    "torch-batch-first": Package((), torch_batch_first),
    "torch-time-first": Package((), torch_time_first),
    "x-transformers": Package(("x-transformers==2.31.10", *EINOPS), x_transformers),
}


def environment(name: str) -> pathlib.Path:
    folder = BUILD / name
    ready = folder / ".ready"
    pins = PACKAGES[name].pins
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if pins:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*command, "--target", str(folder), *pins], check=True)
        ready.touch()
    return folder


def judged(name: str) -> dict[str, Any]:
    """In the package's environment."""
    torch.manual_seed(0)
    subject = PACKAGES[name].build()
    for module in subject.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    state = judge.State(subject.model)
    expected = judge.expectation(subject, state)
    verdict = judge.judge(subject, state, expected)
    wrong = by_hand(subject, state, expected)
    return {"name": name, **verdict._asdict(), "by hand": ", ".join(wrong) or "holds"}


def by_hand(subject: Subject, state: judge.State, expected: judge.Expected) -> list[str]:
    """What does not hold where NEFTuneEmbedding stands in the embedding's place."""
    model = subject.model
    (table,) = expected.targets
    assert isinstance(table, nn.Embedding)
    path = next(name for name, one in model.named_modules() if one is table)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noisy = NEFTuneEmbedding.from_embedding(table, ALPHA)
    model.set_submodule(path, noisy)
    wrong = [] if noisy.weight is table.weight else ["the Parameter"]
    model.load_state_dict(before, strict=True)
    if (expected.noisy.watched.lookups[0].place.diff() != 1).any():
        return ["not tried: ids are (T, B)"]
    real = torch.ones_like(REAL) if table.padding_idx is None else REAL
    sequence = padded(subject.sequences[0].ids, real)
    subject = subject._replace(sequences=[sequence])
    ran = judge.run(subject, state, {noisy})
    found = arrival(expected.clean.watched, ran.watched, 0, [sequence])
    factor = next(iter(expected.factors.values()))
    if not (found.error <= 1 and abs(found.factor / factor - 1) < 1e-5):
        wrong.append(f"noise {found.factor:.4g} times, the factor is {factor:.4g}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(one.pow(2).mean() for one in judge.tensors_of(ran.output)).backward()  # type: ignore[union-attr]
    optimizer.step()
    if torch.equal(noisy.weight, before[f"{path}.weight"]):
        wrong.append("a step leaves the table as it was")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=", ".join(PACKAGES))
    parser.add_argument("--inside", action="store_true", help="judge here, print JSON")
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(judged(arguments.names[0])))
        return 0
    lines = ["# Models of other packages", "", __doc__.split("\n\n")[-1].strip(), ""]
    lines += [
        "| package | pins | verdict | message | done | by hand |",
        "|---|---|---|---|---|---|",
    ]
    for name in arguments.names or PACKAGES:
        package = PACKAGES[name]
        path = os.pathsep.join([str(environment(name)), str(ROOT)])
        inside = [sys.executable, "-m", "bench.foreign", "--inside", name]
        variables = {**os.environ, **package.silent, "PYTHONPATH": path}
        done = subprocess.run(inside, env=variables, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            found = {"word": "CRASH", "message": done.stderr.strip().rsplit("\n", 1)[-1]}
        else:
            found = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
        said, detail = found.get("message", ""), found.get("detail", "")
        told = " ".join(f"{said[:110]}; then: {detail}".split()) if detail else said[:150]
        row = (
            name,
            " ".join(package.pins),
            found["word"],
            " ".join(told.replace("|", "/").split()),
        )
        cells = (*row, found.get("remedy", ""), found.get("by hand", ""))
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", "NO WAY OUT: following the messages does not end EXACT.", ""]
    lines += [f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}; `make foreign`."]
    RESULT.write_text("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
