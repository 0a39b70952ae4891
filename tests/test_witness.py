"""The sweeps' judge (bench/judge.py) on models of our own, one of each kind of quirk: what arrives
at the first block is the paper's noise, or a message leads there.
"""

import contextlib
import inspect

import pytest
import torch
from torch import nn

from bench import judge, resumed, zoo_table
from bench.judge import Subject
from bench.witness import packed, padded

VOCAB, HIDDEN = 64, 32
ROWS, COLUMNS = 3, 16
IDS = torch.randint(1, VOCAB, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(2))
RIGHT = torch.arange(COLUMNS) < torch.tensor([[16], [9], [4]])
DOCUMENTS = [7, 5, 4]


class Plain(nn.Module):
    """Adds positions to the lookup, as most do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.places = nn.Embedding(COLUMNS, HIDDEN)
        self.block = nn.Linear(HIDDEN, HIDDEN)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.block(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])))


class Rows(nn.Embedding):
    """A class of somebody's own, with a factor inside its forward."""

    def forward(self, input):
        return super().forward(input) * 3.0


class Inside(Plain):
    def __init__(self):
        super().__init__()
        self.embed = Rows(VOCAB, HIDDEN)


class Turned(Plain):
    """Its first block takes (T, B, d)."""

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids).transpose(0, 1))


class Unnamed(nn.Module):
    """No get_input_embeddings()."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.block = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids))


def layouts():
    mask = RIGHT.long()
    positions = torch.cat([torch.arange(one) for one in DOCUMENTS])[None]
    row = IDS[:1]
    return {
        "right": ({"input_ids": IDS, "attention_mask": mask}, padded(IDS, RIGHT)),
        "left": ({"input_ids": IDS, "attention_mask": mask.flip(1)}, padded(IDS, RIGHT.flip(1))),
        "packed": ({"input_ids": row, "position_ids": positions}, packed(row, DOCUMENTS)),
        "none": ({"input_ids": IDS}, padded(IDS, torch.ones_like(RIGHT))),
    }


def subject(model, layout):
    given, sequence = layouts()[layout]
    words = {name: value for name, value in given.items() if name != "input_ids"}
    return Subject(model.train(), given, [sequence], [words])


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("kind", [Plain, Inside, Turned], ids=lambda kind: kind.__name__)
def test_exact(kind, layout):
    if layout == "packed" and "position_ids" not in inspect.signature(kind.forward).parameters:
        return
    one = subject(kind(), layout)
    state = judge.State(one.model)
    expected = judge.expectation(one, state)
    verdict = judge.judge(one, state, expected)
    assert (verdict.word, verdict.detail, verdict.message) == ("EXACT", "", "")
    assert not judge.around(one, state, expected, {})


class Multiplied(Plain):
    """By a number that float32 has not: noise by hand is rounded otherwise than ours."""

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids) * 0.88).pow(2)


@pytest.mark.parametrize("constant", [True, False])
def test_a_gradient_is_that_of_constant_noise(constant):
    one = subject(Multiplied(), "right")
    state = judge.State(one.model)
    expected = judge.expectation(one, state)

    def varying(module, args, output):
        noisy = "_neftune" in vars(module) and not constant
        return output + (output - output.detach()) if noisy else None

    one.model.embed.register_forward_hook(varying)
    options = {"embedding_multiplier": lambda given: torch.full((ROWS,), 0.88)}
    assert judge.around(one, state, expected, options) == ([] if constant else ["gradient"])


def double(module, args, output):
    return output * 2


FAULTS = {  # done to the model under apply_neftune, in eval mode too
    "state_dict": lambda model: model.register_buffer("ours", torch.zeros(1)),
    "eval": lambda model: model.register_forward_hook(double),
    "removal leaves something": lambda model: setattr(model, "ours", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_else_must_hold_is_seen_not_to(fault, monkeypatch):
    one = subject(Plain(), "right")
    state = judge.State(one.model)
    expected = judge.expectation(one, state)
    applied = judge.applied

    @contextlib.contextmanager
    def broken(subject, options):
        with applied(subject, options):
            FAULTS[fault](subject.model)
            yield

    monkeypatch.setattr(judge, "applied", broken)
    assert fault in judge.around(one, state, expected, {})


def test_refused_with_a_remedy_that_ends_exact():
    one = subject(Unnamed(), "right")
    state = judge.State(one.model)
    verdict = judge.judge(one, state, judge.expectation(one, state))
    assert verdict.word == "REFUSED"
    assert verdict.remedy == 'embedding="embed"'


@pytest.mark.parametrize("layout", ["right", "left", "none"])
def test_noise_of_another_length_is_seen(layout):
    """The judge is told other lengths than the model: it must not call that exact."""
    one = subject(Plain(), layout)
    shorter = RIGHT.clone()
    shorter[0, -1] = False
    one = one._replace(sequences=[padded(IDS, shorter)])
    state = judge.State(one.model)
    verdict = judge.judge(one, state, judge.expectation(one, state))
    assert verdict.word == "SILENT WRONG"


def test_a_factor_that_only_the_noise_sees_is_seen():
    """The noise is twice as loud behind our back: by a hook in front of the first block."""
    one = subject(Plain(), "right")
    state = judge.State(one.model)
    expected = judge.expectation(one, state)
    clean = one.model.embed.weight.detach().clone()

    def louder(module, args, output):
        rows = nn.functional.embedding(args[0], clean)
        return rows + 2 * (output - rows)

    one.model.embed.register_forward_hook(louder)
    verdict = judge.judge(one, state, expected)
    assert verdict.word == "SILENT WRONG"
    assert "2 times" in verdict.detail


@pytest.mark.parametrize("word", zoo_table.WORST_FIRST)
def test_an_entry_that_needs_a_row_and_has_none_fails(word):
    """Without its row a factor is silently wrong, and `make zoo` ends with an error."""
    fine = {"name": "fine", "head": {"class": "A", "layouts": {"right": {"word": "EXACT"}}}}
    other = {"name": "other", "head": {"class": "B", "layouts": {"none": {"word": word}}}}
    unbuilt = {"name": "unbuilt", "head": {"class": "C", "unbuilt": "too large"}}
    entries = [fine, other, unbuilt]
    assert zoo_table.is_faulty(entries) is (word not in ("WARNED", "REFUSED", "EXACT"))
    fine["head"]["around"] = ["gradient"]
    assert zoo_table.is_faulty(entries)


@pytest.mark.parametrize(
    ("message", "true"),
    [
        ("Plain multiplies its embeddings by 3 after looking them up", False),
        ("Plain multiplies its embeddings by 1.0 after looking them up", True),
        ("no forward around the embedding takes an attention_mask", False),
        ("it is not known whether Plain multiplies", True),
        ("something else", False),
    ],
)
def test_a_warning_over_exact_noise_is_true_or_a_false_alarm(message, true):
    one = subject(Plain(), "right")
    expected = judge.expectation(one, judge.State(one.model))
    assert judge.is_true(message, one, expected) is true


def test_a_sweep_goes_on_with_what_it_judged_on_these_sources(tmp_path, capsys):
    file = tmp_path / "build" / "zoo.jsonl"
    assert resumed.before_now(file, "now") == {}
    for sources, name, word in [("old", "a", 1), ("now", "b", 2), ("now", "b", 3), ("now", "c", 4)]:
        resumed.keep(file, sources, {"name": name, "word": word})
    kept = resumed.before_now(file, "now")
    assert {name: one["word"] for name, one in kept.items()} == {"b": 3, "c": 4}
    resumed.Bar(total=4, before=2).show(3, "d")
    assert "3 of 4" in capsys.readouterr().out


def test_sources_are_the_packages_and_the_judges():
    one = resumed.fingerprint(["judge.py"])
    assert resumed.fingerprint(["judge.py"]) == one != resumed.fingerprint(["witness.py"])
