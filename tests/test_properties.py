"""What hypothesis draws, against the oracle: calls one by one, and the specification's algebra, in
which padding, packing, splitting, sharding and micro-batching change no token's noise.

`make test` runs a few hundred cases of each; `make fuzz` (bench/fuzz.py) hundreds of thousands.
"""

import numpy as np
import oracle
import pytest
import torch
from conftest import KERNELS, equals_oracle, running, same_bits

pytest.importorskip("hypothesis")

from drawn_calls import BACKENDS, SEEDS, WORDS, Case, cases, noise_of, wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neftune_kernels import NEFTuneEmbedding, add_noise, neftune_noise, noisy_embedding

# Fixtures are the same for every case; nothing is timed here.
ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
QUICK = settings(max_examples=250, deadline=None, database=None, suppress_health_check=ALLOWED)


def check_call(case: Case) -> None:
    """Every function, the module, and the gradient of one case."""
    name = str(case.dtype).removeprefix("torch.")
    with running(case.backend) as backend:
        said = {**case.layout, **case.offsets, "seed": case.seed, "noise_mask": case.noise_mask}
        said |= {**case.variant, "backend": backend}
        noise = neftune_noise(case.shape, case.embedding_dim, case.alpha, **said)
        assert noise.shape == (*case.shape, case.embedding_dim)
        assert equals_oracle(noise, noise_of(case, by_ids=False))

        embeds, noise = case.weight[case.input_ids.long()], noise_of(case, by_ids=False)
        rows = wide(embeds).reshape(noise.shape)
        truth = oracle.embedded_with_noise(rows, noise, name)
        assert equals_oracle(add_noise(embeds, case.alpha, **said), truth)

        weight = case.weight.detach().requires_grad_(case.requires_grad)
        said |= {"embed_scale": case.embed_scale, "padding_idx": case.padding_idx}
        out = noisy_embedding(case.input_ids, weight, case.alpha, **said)
        noise = noise_of(case, by_ids=True)
        truth = oracle.embedded_with_noise(rows, noise, name, case.embed_scale)
        assert out.dtype == case.dtype and out.shape == (*case.shape, case.embedding_dim)
        assert equals_oracle(out.detach(), truth)

        kind = {key: case.variant[key] for key in ("distribution", "equal_variance")}
        module = NEFTuneEmbedding.from_pretrained(
            case.weight,
            freeze=not case.requires_grad,
            padding_idx=case.padding_idx,
            noise_alpha=case.alpha,
            embed_scale=case.embed_scale,
            backend=backend,
            **kind,
        )
        own = {**case.layout, **case.offsets, "noise_mask": case.noise_mask}
        own["seed"] = torch.tensor(case.seed - 2**64 if case.seed >= 2**63 else case.seed)
        again = module(case.input_ids, sign=case.variant["sign"], **own)
        assert same_bits(again.detach(), out.detach())
    if case.requires_grad:
        assert_gradient(case, out, weight)


def assert_gradient(case: Case, out: torch.Tensor, weight: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    (found,) = torch.autograd.grad(out, weight, grad)
    truth = oracle.embedding_gradient(
        grad.double().reshape(-1, case.embedding_dim).numpy()
        if grad.numel()
        else np.zeros((case.input_ids.numel(), case.embedding_dim)),
        case.input_ids.flatten().tolist(),
        case.weight.shape[0],
        str(case.dtype).removeprefix("torch."),
        case.padding_idx,
        case.embed_scale,
    )
    assert np.array_equal(found.double().numpy(), truth)


@QUICK
@given(cases())
def test_calls_equal_the_oracle(case):
    check_call(case)


# ---- threads: large enough to be shared out


def check_threads(rows: int, width: int, level: str, seed: int) -> None:
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(5, width, generator=generator)
    ids = torch.randint(5, (rows, 7), generator=generator)
    lengths = torch.randint(0, 8, (rows,), generator=generator)
    places = oracle.places((rows, 7), lengths=lengths.tolist())
    noise = oracle.noise_of_tokens(places, width, 5.0, seed)
    truth = oracle.embedded_with_noise(wide(weight[ids]).reshape(-1, width), noise, "float32")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with running(level) as backend:
                out = noisy_embedding(ids, weight, 5.0, lengths=lengths, seed=seed, backend=backend)
            assert equals_oracle(out, truth)
    finally:
        torch.set_num_threads(before)


SHARED_OUT = st.integers(100, 300), st.sampled_from([63, 128, 200]), st.sampled_from(KERNELS), SEEDS


@settings(QUICK, max_examples=8)
@given(*SHARED_OUT)
def test_threads(rows, width, level, seed):
    """Above 32 768 elements a thread."""
    if level == "cpp":
        pytest.skip("no native library")
    check_threads(rows, width, level, seed)


# ---- the algebra


class Algebra(RuleBasedStateMachine):
    """Some samples, told in several calls. Rules tell them otherwise; every real token's noise
    stays what the oracle says of its sample, its position and its sample's length.

    A call is (first sample, end, how it is told, padding, columns): `columns` is None, or the shard
    of each sample that it sees.
    """

    HOW = ("right", "left", "lengths", "cu_seqlens", "numbers", "positions", "mask and positions")

    @initialize(
        lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
        width=st.integers(1, 12),
        alpha=st.floats(2.0**-60, 2.0**60),
        seed=SEEDS,
        words=st.tuples(WORDS, WORDS),
        backend=BACKENDS,
        distribution=st.sampled_from(["uniform", "normal", "rademacher"]),
    )
    def begin(self, lengths, width, alpha, seed, words, backend, distribution):
        self.lengths, self.width, self.alpha, self.seed = lengths, width, alpha, seed
        self.replica, self.sample_offset = words
        self.backend, self.distribution, self.sign = backend, distribution, 1
        self.muted = set()
        self.calls = [(0, len(lengths), "right", 0, None)]

    @rule(data=st.data(), how=st.sampled_from(HOW), padding=st.integers(0, 3))
    def tell_otherwise(self, data, how, padding):
        """Padding, on either side; packing."""
        index = data.draw(st.integers(0, len(self.calls) - 1))
        first, end, _, _, columns = self.calls[index]
        lengths = self.lengths[first:end]
        numbered = how in ("numbers", "positions", "mask and positions")
        if columns is not None or (numbered and 0 in lengths):
            return  # a shard needs lengths; a document without tokens has no number
        self.calls[index] = (first, end, how, padding, None)

    @rule(data=st.data())
    def split(self, data):
        """Micro-batching."""
        index = data.draw(st.integers(0, len(self.calls) - 1))
        first, end, *told = self.calls[index]
        if end - first < 2:
            return
        middle = data.draw(st.integers(first + 1, end - 1))
        self.calls[index : index + 1] = [(first, middle, *told), (middle, end, *told)]

    @precondition(lambda self: len(self.calls) > 1)
    @rule(data=st.data())
    def merge(self, data):
        index = data.draw(st.integers(0, len(self.calls) - 2))
        one, other = self.calls[index : index + 2]
        if one[1] == other[0] and one[2:] == other[2:]:
            self.calls[index : index + 2] = [(one[0], other[1], *one[2:])]

    @rule(data=st.data())
    def shard(self, data):
        """Sequence parallelism: each shard is told the whole lengths."""
        index = data.draw(st.integers(0, len(self.calls) - 1))
        first, end, _, _, columns = self.calls[index]
        begin, stop = columns or (0, max(self.lengths[first:end]))
        cut = data.draw(st.integers(begin, stop))
        shards = [(first, end, "lengths", 0, part) for part in ((begin, cut), (cut, stop))]
        self.calls[index : index + 1] = shards

    @rule()
    def double_alpha(self):
        """Every value doubles exactly, as long as it is no infinity."""
        before = self.collected()
        self.alpha *= 2
        for place, row in self.collected().items():
            assert np.array_equal(row, before[place] * np.float32(2))

    @rule()
    def negate(self):
        before = self.collected()
        self.sign = -self.sign
        for place, row in self.collected().items():
            assert np.array_equal(row, -before[place])

    @rule(data=st.data())
    def mute(self, data):
        """A noise mask: the others' noise stays."""
        places = [(s, p) for s, length in enumerate(self.lengths) for p in range(length)]
        if places:
            self.muted ^= {data.draw(st.sampled_from(places))}

    @rule(backend=BACKENDS)
    def change_backend(self, backend):
        self.backend = backend

    def rows_of(self, call):
        """What the call sees: rows of (sample, position), None for padding."""
        first, end, how, padding, columns = call
        samples = [[(s, p) for p in range(self.lengths[s])] for s in range(first, end)]
        if how in ("right", "left", "lengths"):
            begin, stop = columns or (0, max(self.lengths[first:end]) + padding)
            rows = [row + [None] * (stop - len(row)) for row in samples]
            if how == "left":
                rows = [
                    row[len(kept) :] + row[: len(kept)]
                    for row, kept in zip(rows, samples, strict=True)
                ]
            return [row[begin:stop] for row in rows]
        packed = [place for row in samples for place in row]
        return [packed + [None] * (0 if how in ("cu_seqlens", "positions") else padding)]

    def told(self, call, rows):
        """The layout arguments that say so."""
        first, end, how, *_ = call
        lengths = self.lengths[first:end]
        if how == "lengths":
            return {"lengths": torch.tensor(lengths)}
        if how == "cu_seqlens":
            return {"cu_seqlens": torch.tensor([0, *np.cumsum(lengths).tolist()])}
        shape = (len(rows), len(rows[0]))
        number = {"numbers": lambda place: place[0] - first + 1}.get(how, lambda place: 1)
        mask = [0 if place is None else number(place) for row in rows for place in row]
        places = [7 if place is None else place[1] for row in rows for place in row]
        said = {}
        if how != "positions":
            said["attention_mask"] = torch.tensor(mask).reshape(shape)
        if "positions" in how:
            said["position_ids"] = torch.tensor(places).reshape(shape)
        return said

    def collected(self):
        """(sample, position) → its noise, of all calls; padding must have none."""
        found = {}
        for call in self.calls:
            rows = self.rows_of(call)
            begin = call[4][0] if call[4] else 0
            muted = [[place not in self.muted for place in row] for row in rows]
            shape = (len(rows), len(rows[0]))
            with running(self.backend) as backend:
                noise = neftune_noise(
                    shape,
                    self.width,
                    self.alpha,
                    **self.told(call, rows),
                    noise_mask=torch.tensor(muted).reshape(shape) if self.muted else None,
                    seed=self.seed,
                    replica=self.replica,
                    sample_offset=(self.sample_offset + call[0]) % 2**32,
                    position_offset=begin,
                    sign=self.sign,
                    distribution=self.distribution,
                    backend=backend,
                ).numpy()
            for row, values in zip(rows, noise, strict=True):
                for place, value in zip(row, values, strict=True):
                    if place is None:
                        assert not value.any()
                    else:
                        assert place not in found
                        found[place] = value
        return found

    @invariant()
    def every_token_has_its_noise(self):
        if not hasattr(self, "calls"):
            return
        found = self.collected()
        places = [(s, p) for s, length in enumerate(self.lengths) for p in range(length)]
        assert sorted(found) == places
        truth = oracle.noise_of_tokens(
            [
                None
                if (s, p) in self.muted
                else ((s + self.sample_offset) % 2**32, p, self.lengths[s])
                for s, p in places
            ],
            self.width,
            self.alpha,
            self.seed,
            self.replica,
            self.sign,
            self.distribution,
        )
        for place, row in zip(places, truth, strict=True):
            assert np.array_equal(found[place], row)


Algebra.TestCase.settings = settings(QUICK, max_examples=40, stateful_step_count=8)
TestAlgebra = Algebra.TestCase
