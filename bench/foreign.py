"""Real models of other packages, tiny, each in an environment of its own: `make foreign`.

    python -m bench.foreign            goes on where it stopped; writes bench/results/foreign.md
    python -m bench.foreign NAMES      only these

An environment is a folder below build/foreign with what bench/pins/ names, and torch beside it:
nothing else is importable. Each model is trained as its package trains, under a plain
apply_neftune, then what the error says, then what the warning says, until EXACT (bench/judge.py),
then eval, no-grad, state_dict, gradient, a step on its own loss and removal; and by hand, its
embedding replaced by NEFTuneEmbedding: initialisation, ties, strict loading, the noise, a step.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding

from . import judge
from .judge import Subject
from .resumed import ROOT, fingerprint, judged_one_by_one
from .witness import ALPHA, arrival, packed, padded

RESULT = ROOT / "bench/results/foreign.md"
BUILD = ROOT / "build/foreign"
PINS = ROOT / "bench/pins"
DONE = ROOT / "build/foreign.jsonl"
VOCAB = 30  # ids 4 to 23 are amino acids in ESM's alphabet, words elsewhere
GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(4, 24, (3, 12), generator=GENERATOR)
LENGTHS = torch.tensor([12, 7, 3])
REAL = torch.arange(12) < LENGTHS[:, None]
NEXT = nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
DOCUMENTS = [5, 4, 3]  # of a packed row


class Package(NamedTuple):
    build: Callable[[], Subject]  # `call` is a training step's forward: the package's loss first
    initialise: Callable[[Any], Any]  # as the package draws its weights
    environment: str  # bench/pins/environment.txt


def _padded(model: nn.Module, given: dict[str, Any], call: Any, **words: Tensor) -> Subject:
    words = words or {"attention_mask": REAL.long()}
    return Subject(model.train(), given, [padded(IDS, REAL)], [words], call)


def _cross_entropy(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), NEXT.flatten())


def x_transformers() -> Subject:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=1, heads=2, attn_dim_head=16)
    model = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, tie_embedding=True
    )
    given = {"x": IDS, "mask": REAL}
    return _padded(AutoregressiveWrapper(model), given, lambda model, given: model(**given))


def fair_esm() -> Subject:
    from esm.model.esm2 import ESM2

    model = ESM2(num_layers=1, embed_dim=32, attention_heads=2, alphabet="ESM-1b")
    ids = IDS.masked_fill(~REAL, 1)
    subject = _padded(model, {"tokens": ids}, _call("logits"))
    return subject._replace(sequences=[padded(ids, REAL)])


def _call(key: str | None = None) -> Any:
    """The forward and cross entropy of the next token."""

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        output = model(**given)
        logits = output if key is None else output[key]
        return _cross_entropy(logits), logits

    return call


def litgpt(name: str) -> Subject:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    small = {"n_layer": 1, "n_head": 2, "n_query_groups": 1, "n_embd": 32, "head_size": 16}
    config = Config.from_name(
        name, **small, intermediate_size=64, block_size=16, padded_vocab_size=VOCAB
    )
    model = GPT(config)
    if "Gemma" in name:
        model.lm_head.weight = model.transformer.wte.weight

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        logits = model(**given)
        return chunked_cross_entropy(logits, NEXT, chunk_size=0), logits

    return _padded(model, {"idx": IDS}, call)


def torchtune() -> Subject:
    from torchtune.models.llama3 import llama3
    from torchtune.modules.attention_utils import packed_block_causal_mask
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    model = llama3(VOCAB, 1, 2, 1, 32, max_seq_len=16, intermediate_dim=64)
    loss = CEWithChunkedOutputLoss(num_output_chunks=2)
    model.set_num_output_chunks(2)
    ids = IDS[:1]
    positions = torch.cat([torch.arange(one) for one in DOCUMENTS])[None]
    mask = packed_block_causal_mask([torch.tensor(DOCUMENTS)])
    given = {"tokens": ids, "mask": mask, "input_pos": positions}

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        logits = model(**given)
        return loss(logits, NEXT[:1]), logits

    words = [{"position_ids": positions}]
    return Subject(model.train(), given, [packed(ids, DOCUMENTS)], words, call)


def _bert(head: str) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    import transformers

    folder = tempfile.mkdtemp(prefix="bert-")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(97 + one) for one in range(VOCAB - 4))]
    vocabulary = {word: at for at, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 1
    getattr(transformers, head)(config).save_pretrained(folder)
    return folder


def sentence_transformer() -> Subject:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(_bert("BertModel"), device="cpu")
    loss = MultipleNegativesRankingLoss(model)
    sequences = [padded(IDS, REAL), padded(IDS.flip(0), REAL.flip(0))]
    masks = [REAL.long(), REAL.flip(0).long()]
    features = [
        {"input_ids": one.ids, "attention_mask": mask}
        for one, mask in zip(sequences, masks, strict=True)
    ]
    given = {"sentence_features": features, "labels": None}
    words = [{"attention_mask": mask} for mask in masks]
    return Subject(model.train(), given, sequences, words, lambda model, given: loss(**given))


def cross_encoder() -> Subject:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(_bert("BertForSequenceClassification"), num_labels=1, device="cpu")
    loss = BinaryCrossEntropyLoss(model)
    pairs = [["a b c d", "e f", "g"], ["b c d e", "f", "h"]]
    made = model.tokenizer(*pairs, padding=True, return_tensors="pt")
    sequence = padded(made["input_ids"], made["attention_mask"] > 0)
    words = [{"attention_mask": made["attention_mask"]}]
    given = {"inputs": pairs, "labels": torch.tensor([1.0, 0.0, 1.0])}
    return Subject(model.train(), given, [sequence], words, lambda model, given: loss(**given))


def olmo() -> Subject:
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    small = {"d_model": 32, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 64}
    dropped = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    config = ModelConfig(
        **small, **dropped, vocab_size=VOCAB, embedding_size=VOCAB, max_sequence_length=16,
        rope=True, weight_tying=True, init_device="cpu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        logits = model(**given).logits
        return _cross_entropy(logits), logits

    return _padded(OLMo(config), {"input_ids": IDS, "attention_mask": REAL.long()}, call)


def curated_transformers() -> Subject:
    from curated_transformers.layers import AttentionMask
    from curated_transformers.models import BERTConfig, BERTEncoder

    config = BERTConfig(
        embedding_width=32, hidden_width=32, intermediate_width=64, n_attention_heads=2,
        n_hidden_layers=1, n_pieces=VOCAB, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    given = {"piece_ids": IDS, "attention_mask": AttentionMask(REAL)}

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        states = model(**given).last_hidden_layer_state
        return states[REAL].pow(2).mean(), states

    return _padded(BERTEncoder(config), given, call)


def recbole() -> Subject:
    from recbole.data.interaction import Interaction
    from recbole.model.sequential_recommender import SASRec

    config = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length", "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": 16,
        "device": "cpu", "n_layers": 1, "n_heads": 2, "hidden_size": 32, "inner_size": 64,
        "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE",
    }  # fmt: skip
    model = SASRec(config, types.SimpleNamespace(num=lambda field: VOCAB))
    ids = IDS.masked_fill(~REAL, 0)
    last = torch.tensor([5, 6, 7])
    given = {"interaction": Interaction({"item_list": ids, "length": LENGTHS, "item": last})}
    subject = _padded(model, given, lambda model, given: model.calculate_loss(**given))
    return subject._replace(sequences=[padded(ids, REAL)])


def speechbrain() -> Subject:
    from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
    from speechbrain.nnet.losses import nll_loss

    model = TransformerLM(VOCAB, 32, 2, 1, 0, 64, dropout=0.0)
    ids = IDS.masked_fill(~REAL, 0)

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        scores = model(**given).log_softmax(-1)
        return nll_loss(scores, ids.roll(-1, 1), length=LENGTHS / 12), scores

    return _padded(model, {"src": ids}, call)._replace(sequences=[padded(ids, REAL)])


def torchscale() -> Subject:
    from torchscale.architecture.config import EncoderConfig
    from torchscale.architecture.encoder import Encoder
    from torchscale.component.embedding import TextEmbedding

    config = EncoderConfig(
        encoder_embed_dim=32, encoder_attention_heads=2, encoder_ffn_embed_dim=64,
        encoder_layers=1, vocab_size=VOCAB, no_scale_embedding=False, bert_init=True,
    )  # fmt: skip
    model = Encoder(config, embed_tokens=TextEmbedding(VOCAB, 32))
    given = {"src_tokens": IDS, "encoder_padding_mask": ~REAL}
    return _padded(model, given, _call("encoder_out"))


class NanoGPT(nn.Module):
    """nanoGPT's pattern, in code of our own: it is no package. No word of padding, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, 32), nn.Embedding(16, 32)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(32, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        states = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.block(states, torch.full((12, 12), -torch.inf).triu(1)))
        return logits, None if targets is None else _cross_entropy(logits)


def nanogpt() -> Subject:
    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        logits, loss = model(**given)
        return loss, logits

    given = {"idx": IDS, "targets": IDS.roll(-1, 1)}
    whole = padded(IDS, torch.ones_like(REAL))  # it trains on blocks cut out of one long text
    return Subject(NanoGPT().train(), given, [whole], [{}], call)


class Transformer(nn.Module):
    """torch's own encoder behind an embedding, in either order of axes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        embedded = self.embed(src)
        return self.head(self.encoder(embedded, src_key_padding_mask=src_key_padding_mask))


def torch_transformer(batch_first: bool) -> Subject:
    ids = IDS if batch_first else IDS.t().contiguous()
    given = {"src": ids, "src_key_padding_mask": ~REAL}

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        logits = model(**given)
        return _cross_entropy(logits if batch_first else logits.transpose(0, 1)), logits

    return _padded(Transformer(batch_first), given, call, key_padding_mask=~REAL)


def own_initialisation(model: nn.Module) -> None:
    """Of packages whose weights are drawn by their modules' constructors."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()


def _applied(model: Any) -> None:
    model.apply(model._init_weights)


def _bert_initialised(model: nn.Module) -> None:
    from torchscale.architecture.utils import init_bert_params

    model.apply(init_bert_params)


PACKAGES: dict[str, Package] = {
    "ai2-olmo": Package(olmo, lambda model: model.reset_parameters(), "ai2-olmo"),
    "curated-transformers": Package(
        curated_transformers, own_initialisation, "curated-transformers"
    ),
    "fair-esm": Package(fair_esm, own_initialisation, "fair-esm"),
    "litgpt Llama": Package(lambda: litgpt("Llama-2-7b-hf"), _applied, "litgpt"),
    "litgpt Gemma": Package(lambda: litgpt("Gemma-2b"), _applied, "litgpt"),
    "nanoGPT's pattern": Package(nanogpt, _applied, "torch"),
    "recbole SASRec": Package(recbole, _applied, "recbole"),
    "sentence-transformers SentenceTransformer": Package(
        sentence_transformer, lambda model: _applied(model[0].auto_model), "sentence-transformers"
    ),
    "sentence-transformers CrossEncoder": Package(
        cross_encoder, lambda model: _applied(model.model), "sentence-transformers"
    ),
    "speechbrain TransformerLM": Package(
        speechbrain, lambda model: model._reset_params(), "speechbrain"
    ),
    "torchscale Encoder": Package(torchscale, _bert_initialised, "torchscale"),
    "torch nn.Transformer, batch first": Package(
        lambda: torch_transformer(True), own_initialisation, "torch"
    ),
    "torch nn.Transformer, time first": Package(
        lambda: torch_transformer(False), own_initialisation, "torch"
    ),
    "torchtune Llama 3": Package(torchtune, own_initialisation, "torchtune"),
    "x-transformers": Package(x_transformers, lambda model: model.net.init_(), "x-transformers"),
}
# Nothing is sent anywhere, nothing is looked for.
SILENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "NEFTUNE_SELF_CHECK": "0",
}
# Compiled for CUDA, which a torch for the CPU cannot load; the package does without.
WITHOUT = {"speechbrain": ("torchaudio/lib",)}


def environment(name: str) -> pathlib.Path:
    folder = BUILD / name
    pins = PINS / f"{name}.txt"
    ready = folder / ".ready"
    if not ready.exists() or ready.read_text() != pins.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), "-r", str(pins)], check=True)
        for part in WITHOUT.get(name, ()):
            shutil.rmtree(folder / part)
        ready.write_text(pins.read_text())
    return folder


def judged(name: str) -> dict[str, Any]:
    """In the package's environment."""
    torch.manual_seed(0)
    package = PACKAGES[name]
    subject = package.build()
    state = judge.State(subject.model)
    expected = judge.expectation(subject, state)
    verdict = judge.judge(subject, state, expected)._asdict()
    options = verdict.pop("options")
    around = ["not tried"]
    if options is not None:
        around = judge.around(subject, state, expected, options)
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        with judge.applied(subject, options):
            ran = judge.run(subject, state, expected.targets)
            around += [] if stepped(subject.model, ran, expected.targets) else ["a step"]
        subject.model.load_state_dict(before)
    wrong = by_hand(package, subject, state, expected)
    return {**verdict, "around": ", ".join(around), "by hand": ", ".join(wrong)}


def stepped(model: nn.Module, ran: judge.Ran, tables: set[Any]) -> bool:
    """Whether a step on its loss, the output's first, trains the tables."""
    before = [one.weight.detach().clone() for one in tables]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = next(judge.tensors_of(ran.output))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    trained = not any(torch.equal(a.weight, b) for a, b in zip(tables, before, strict=True))
    return bool(loss.isfinite()) and trained


def ties(model: nn.Module) -> list[set[str]]:
    """The names of every shared Parameter."""
    names: dict[int, set[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(one), set()).add(name)
    return sorted((one for one in names.values() if len(one) > 1), key=min)


def drawn(model: nn.Module, package: Package) -> dict[str, Tensor]:
    torch.manual_seed(1)
    package.initialise(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def by_hand(
    package: Package, subject: Subject, state: judge.State, expected: judge.Expected
) -> list[str]:
    """What does not hold where NEFTuneEmbedding stands in the embedding's place."""
    model = subject.model
    (table,) = expected.targets
    assert isinstance(table, nn.Embedding)
    path = next(name for name, one in model.named_modules() if one is table)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs, tied = drawn(model, package), ties(model)
    time_first = bool((expected.noisy.watched.lookups[0].place.diff() != 1).any())
    noisy = NEFTuneEmbedding.from_embedding(table, ALPHA, batch_first=not time_first)
    model.set_submodule(path, noisy)
    wrong = [] if same(drawn(model, package), theirs) else ["initialisation"]
    if ties(model) != tied:
        wrong.append("ties")
    model.load_state_dict(before, strict=True)
    if not same(dict(model.state_dict()), before):
        wrong.append("strict loading")
    padding = -1 if table.padding_idx is None else table.padding_idx  # all it can know
    told = [padded(one.ids, one.ids != padding) for one in subject.sequences]
    ran = judge.run(subject._replace(sequences=told), state, {noisy})
    for number, lookup in enumerate(ran.watched.lookups):
        found = arrival(expected.clean.watched, ran.watched, number, told)
        factor = expected.factors[lookup.sequence]
        if not (found.error <= 1 and abs(found.factor / factor - 1) < 1e-5):
            wrong.append(f"noise {found.factor:.4g} times, the factor is {factor:.4g}")
    if not stepped(model, ran, {noisy}):
        wrong.append("a step on its loss")
    if ties(model) != tied:
        wrong.append("ties after a step")
    return wrong


def run(name: str) -> dict[str, Any]:
    """The verdict, from a Python that sees torch, the package's pins and this project alone."""
    folders = [environment(PACKAGES[name].environment), environment("torch"), ROOT]
    variables = {**os.environ, **SILENT, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    python: str = sys._base_executable  # type: ignore[attr-defined]
    inside = [python, "-S", "-m", "bench.foreign", "--inside", name]
    done = subprocess.run(inside, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"word": "CRASH", "message": done.stderr.strip().rsplit("\n", 1)[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=", ".join(PACKAGES))
    parser.add_argument("--inside", action="store_true", help="judge here, print JSON")
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(judged(arguments.names[0])))
        return 0
    names = arguments.names or list(PACKAGES)
    pins = {f"pins/{one.environment}.txt" for one in PACKAGES.values()}
    sources = fingerprint(["foreign.py", "judge.py", "witness.py", *pins])
    done = judged_one_by_one(names, DONE, sources, run, anew=bool(arguments.names))
    if arguments.names:
        print(json.dumps(done, indent=1))
        return 0
    entries = [done[name] for name in names]
    RESULT.write_text(written(entries))
    return int(any(is_faulty(one) for one in entries))


def is_faulty(found: dict[str, Any]) -> bool:
    return found["word"] not in judge.FINE or bool(found["around"] or found["by hand"])


def written(entries: list[dict[str, Any]]) -> str:
    lines = ["# Models of other packages", "", __doc__.split("\n\n")[-1].strip(), ""]
    lines += [
        "| model | pins | verdict | message | done | eval to removal | by hand |",
        "|---|---|---|---|---|---|---|",
    ]
    totals = Counter(found["word"] for found in entries)
    for found in entries:
        said, detail = found.get("message", ""), found.get("detail", "")
        told = f"{said[:110]}; then: {detail}" if detail else said[:150]
        told = " ".join(told.replace("|", "/").split())
        pins = PINS / f"{PACKAGES[found['name']].environment}.txt"
        own, *others = pins.read_text().split()
        cells = [found["name"], f"{own} and {len(others)} more" if others else own]
        cells += [found["word"], told, found.get("remedy", "")]
        cells += [found.get(how, "not tried") or "holds" for how in ("around", "by hand")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "; ".join(f"{word}: {count}" for word, count in totals.items()) + "."]
    lines += ["", "NO WAY OUT: following the messages does not end EXACT.", ""]
    lines += [f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}; `make foreign`."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
