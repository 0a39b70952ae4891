"""What nobody should pass to an operator or a function, and what happens who does: memory that
overlaps, devices that differ, names that do not exist, shapes that do not fit.
"""

import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import require_native, same_bits

from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    available_backends,
    backends,
    neftune_noise,
    noisy_embedding,
)

OPS = torch.ops.neftune_kernels
TOKENS, WIDTH = 6, 4
SEED, ALPHA = torch.tensor(3), torch.tensor(5.0, dtype=torch.float64)


@pytest.fixture(params=["reference_", "cpp"])
def family(request):
    """The prefix of the raw operators, of those that run on this machine."""
    if request.param == "reference_":
        return "reference_"
    require_native()
    return ""


def operator(family, name):
    return getattr(OPS, family + name)


# ---- memory


READ = {  # what an operator reads beside its source, and how many elements
    "document": (torch.int64, TOKENS),
    "position": (torch.int64, TOKENS),
    "lengths": (torch.int64, 1),
    "cu_seqlens": (torch.int64, 2),
    "cu_seqlens of int32": (torch.int32, 2),
    "seed": (torch.int64, 1),
    "noise_alpha": (torch.float64, 1),
    "input_ids": (torch.int64, TOKENS),
    "input_ids of int32": (torch.int32, TOKENS),
}


def overlapping(name, dtype, count, device="cpu"):
    """out (6, 4) float32 with that argument inside its bytes. What the argument says is harmless
    even where it is read while out is written.
    """
    out = torch.zeros(TOKENS, WIDTH, device=device)
    inside = out.view(-1).view(dtype)[-count:]
    if name == "cu_seqlens":
        inside[-1] = TOKENS
    if name in ("lengths", "noise_alpha"):
        inside[0] = TOKENS
    if name in ("seed", "noise_alpha"):
        inside = inside[0]
    return out, inside


def assert_overlap_is_refused(family, argument, device="cpu"):
    """An operator that wrote its own bounds while it read them would follow them anywhere."""
    name = argument.split(" ")[0]
    out, inside = overlapping(name, *READ[argument], device)
    given = {"seed": SEED.to(device), "noise_alpha": ALPHA.to(device), name: inside}
    if name == "document":
        given["lengths"] = torch.tensor([TOKENS], device=device)
    before = out.clone()
    ids, weight = torch.arange(TOKENS, device=device), torch.ones(9, WIDTH, device=device)
    calls = {"noisy_embedding": {"input_ids": ids, "weight": weight}}
    if name == "input_ids":
        del calls["noisy_embedding"]["input_ids"]
    else:
        calls["add_noise"] = {"inputs_embeds": torch.ones(TOKENS, WIDTH, device=device)}
    for called, sources in calls.items():
        with pytest.raises(RuntimeError, match=f"out must not overlap {name}"):
            operator(family, called).out(**sources, **given, out=out)
        assert torch.equal(out, before)


@pytest.mark.parametrize("argument", READ)
def test_out_overlaps_no_argument(family, argument):
    assert_overlap_is_refused(family, argument)


def test_out_overlaps_no_source(family):
    buffer = torch.ones(80)
    drawn = {"seed": SEED, "noise_alpha": ALPHA}
    table, ids = buffer[:40].view(10, WIDTH), torch.arange(TOKENS)
    for begin in (0, 39):
        with pytest.raises(RuntimeError, match="out must not overlap weight"):
            out = buffer[begin : begin + TOKENS * WIDTH].view(TOKENS, WIDTH)
            operator(family, "noisy_embedding").out(ids, table, **drawn, out=out)
    rows = buffer[:24].view(TOKENS, WIDTH)
    for begin in (1, 23):
        with pytest.raises(RuntimeError, match="out must not overlap inputs_embeds"):
            out = buffer[begin : begin + 24].view(TOKENS, WIDTH)
            operator(family, "add_noise").out(rows, **drawn, out=out)
    assert torch.equal(buffer, torch.ones(80))
    operator(family, "add_noise").out(rows, **drawn, out=buffer[24:48].view(TOKENS, WIDTH))
    expected = add_noise(rows.clone(), 5.0, seed=SEED)
    assert torch.equal(buffer[24:48].view(TOKENS, WIDTH), expected)
    operator(family, "add_noise").out(rows, **drawn, out=rows)  # in place
    assert torch.equal(rows, expected)


# ---- devices


def arguments_of(name):
    """Good arguments of the raw operators, every tensor given."""
    drawn = {
        "seed": SEED,
        "noise_alpha": ALPHA,
        "document": torch.zeros(TOKENS, dtype=torch.int64),
        "position": torch.arange(TOKENS),
        "lengths": torch.tensor([TOKENS]),
    }
    sources = {
        "noisy_embedding": {
            "input_ids": torch.arange(TOKENS),
            "weight": torch.ones(9, WIDTH),
            **drawn,
        },
        "add_noise": {"inputs_embeds": torch.ones(TOKENS, WIDTH), **drawn},
        "add_variant_noise": {"inputs_embeds": torch.ones(TOKENS, WIDTH), **drawn},
        "mask_layout": {
            "attention_mask": torch.ones(TOKENS),
            "position_ids": torch.arange(TOKENS),
        },
    }
    return sources[name]


@pytest.mark.parametrize(
    "name", ["noisy_embedding", "add_noise", "add_variant_noise", "mask_layout"]
)
def test_one_argument_elsewhere(family, name):
    """Neither the data of a meta tensor is read, nor does one turn the whole result into meta."""
    call, arguments = operator(family, name), arguments_of(name)
    call(**arguments)
    for moved in arguments:
        with pytest.raises((RuntimeError, ValueError), match=f"{moved}.*(CPU|cpu|device|meta)"):
            call(**{**arguments, moved: arguments[moved].to("meta")})
    if "out" not in call.overloads():
        return
    out = torch.zeros(TOKENS, WIDTH)
    for moved in arguments:
        with pytest.raises((RuntimeError, ValueError), match=f"{moved}.*(CPU|cpu|device|meta)"):
            call.out(**{**arguments, moved: arguments[moved].to("meta")}, out=out)
    with pytest.raises((RuntimeError, ValueError), match=r"out.*(CPU|cpu|device|meta)"):
        call.out(**arguments, out=out.to("meta"))
    assert not out.any()


@pytest.mark.parametrize("name", ["noisy_embedding", "add_noise", "add_variant_noise"])
def test_everything_on_meta_has_a_shape(family, name):
    """alpha stays on the CPU, as on every accelerator."""
    moved = {
        key: value if key == "noise_alpha" else value.to("meta")
        for key, value in arguments_of(name).items()
    }
    out = operator(family, name)(**moved)
    assert out.device.type == "meta" and out.shape == (TOKENS, WIDTH)


# ---- names, shapes, documents that are not there


@pytest.mark.parametrize("distribution", ["gaussian", "Normal", "", "uniforms"])
def test_unknown_distribution(family, distribution):
    with pytest.raises(ValueError, match=f"distribution must be .*got '{distribution}'"):
        operator(family, "add_variant_noise")(
            torch.ones(TOKENS, WIDTH), SEED, ALPHA, distribution=distribution
        )


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 3), (2, 4), (2, 1), (1, 6), ()])
def test_shape_of_position_ids(family, shape):
    """The operator takes them as the mask lies; the public functions broadcast one row."""
    ids = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="position_ids must have the attention_mask's shape"):
        operator(family, "mask_layout")(torch.ones(2, 3), ids)


@pytest.mark.parametrize("name", ["document", "position", "lengths"])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_number_of_layout_elements(family, name, count):
    """One element is no row of them, nor are they cut: (2, 3) tokens have six, their rows two."""
    given = {name: torch.zeros(count, dtype=torch.int64)}
    if name == "document":
        given["lengths"] = torch.ones(2, dtype=torch.int64)
    for called, sources in (
        ("noisy_embedding", (torch.zeros(2, 3).long(), torch.ones(9, WIDTH))),
        ("add_noise", (torch.ones(2, 3, WIDTH),)),
        ("add_variant_noise", (torch.ones(2, 3, WIDTH),)),
    ):
        with pytest.raises(ValueError, match=f"{name} must have [26] elements, got {count}"):
            operator(family, called)(*sources, SEED, ALPHA, **given)


@pytest.mark.parametrize("document", [2, 5, 2**31, 2**32, 2**62, -1, -2, -(2**63)])
def test_document_that_lengths_do_not_hold(family, document):
    """It is padding, whichever backend: nothing is read behind the lengths."""
    documents = torch.tensor([0, document, 1, document, 1, 1])
    behind = torch.tensor([1, 3, 6, 6])  # what a read behind the two lengths would find
    given = {"document": documents, "lengths": behind[:2]}
    noise = operator(family, "add_noise")(torch.zeros(TOKENS, WIDTH), SEED, ALPHA, **given)
    padding = torch.tensor([False, True, False, True, False, False])
    assert not noise[padding].any() and (noise[~padding] != 0).all()
    for distribution in ("uniform", "normal"):
        for count in (0, 1):  # no document but -1, or one
            given = {"document": torch.full((TOKENS,), document), "lengths": torch.ones(count)}
            given["lengths"] = given["lengths"].long()
            name = "add_noise" if distribution == "uniform" else "add_variant_noise"
            quiet = operator(family, name)(-torch.zeros(TOKENS, WIDTH), SEED, ALPHA, **given)
            assert same_bits(quiet, -torch.zeros(TOKENS, WIDTH))


# ---- the public seams


def test_module_without_rows():
    """As nn.Embedding: any id is out of range, and no ids are none."""
    message = r"input_ids must lie in \[0, num_embeddings = 0\), got 7"
    for backend in (None, "reference"):
        for frozen in (False, True):
            module = NEFTuneEmbedding(0, 4, backend=backend).requires_grad_(not frozen)
            for shape in ((), (1, 2), (300, 300)):  # on both sides of the shorter eager path
                ids = torch.full(shape, 7)
                for given in ({}, {"attention_mask": torch.ones(shape)}):
                    with pytest.raises(IndexError, match=message):
                        module(ids, **given)
            assert module(torch.zeros(2, 0).long()).shape == (2, 0, 4)


@pytest.mark.parametrize("noise_alpha", [1.0, 0])
@pytest.mark.parametrize("input_shape", [5, None, 2.5, torch.tensor(3), "12", b"ab"], ids=repr)
def test_input_shape_is_a_shape(input_shape, noise_alpha):
    message = "input_shape must be the tokens' shape, a tuple of integers, got "
    with pytest.raises(TypeError, match=message):
        neftune_noise(input_shape, 8, noise_alpha)


def test_input_shapes_of_other_types():
    expected = neftune_noise((2, 3), 8, 1.0, seed=1)
    for shape in ([2, 3], torch.Size((2, 3)), torch.zeros(2, 3).shape):
        assert torch.equal(neftune_noise(shape, 8, 1.0, seed=1), expected)


def test_unknown_instruction_set_is_shown():
    """NEFTUNE_SIMD is read when the library is loaded. What was asked for and is not there is an
    error at the call, never a slower backend without a word.
    """
    require_native()
    program = (
        "import torch, neftune_kernels as n; print(n.available_backends()['cpp']);"
        "print(n.available_backends('cpu')['cpp']);"
        "call = lambda backend: n.neftune_noise((1, 2), 4, 5.0, backend=backend)\n"
        "for backend in (None, 'cpp'):\n"
        "    try: call(backend)\n"
        "    except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"NEFTUNE_SIMD": "avx1024"},
        cwd=os.getcwd(),
        capture_output=True,
        text=True,
    )
    reason = "NEFTUNE_SIMD=avx1024 is not an instruction set of this CPU and build"
    everywhere, on_cpus, by_itself, named = done.stdout.splitlines()
    assert everywhere == on_cpus == reason
    assert by_itself.startswith(reason) and named == f"backend 'cpp' is not available: {reason}"
    assert available_backends("cpu")["cpp"] == "available"


# ---- views that only torch's own kernels resolve


def lazily_negated():
    """(5, 4) float32 whose memory holds the opposite: the imaginary part of a conjugate."""
    numbers = torch.randn(5, WIDTH, dtype=torch.complex64, generator=torch.Generator())
    value = numbers.conj().imag
    assert value.is_neg() and torch.equal(value, -numbers.imag)
    return value


def test_negative_bits(family):
    value, ids = lazily_negated(), torch.tensor([0, 4, 1])
    backend = "reference" if family else "cpp"
    for dense in (value.resolve_neg(), value.contiguous()):
        given = {"seed": 3, "backend": backend}
        expected = noisy_embedding(ids, dense, 5.0, **given)
        assert same_bits(noisy_embedding(ids, value, 5.0, **given), expected)
        assert same_bits(noisy_embedding(ids, value, 5.0, seed=3), expected)
        expected = add_noise(dense, 5.0, **given)
        assert same_bits(add_noise(value, 5.0, **given), expected)


@pytest.mark.parametrize("name", ["noisy_embedding", "add_noise"])
def test_negative_bits_reach_no_launcher(monkeypatch, name):
    """The Triton launcher takes addresses: what has the bit goes by the dispatcher, which resolves
    it. A stub stands for the launcher; what it served would be 7.
    """

    def launcher(*arguments, out):
        out.fill_(7)

    stub = types.SimpleNamespace(noisy_embedding_out=launcher, add_noise_out=launcher)
    monkeypatch.setattr(backends, "load_triton", lambda *_: stub)
    call = getattr(backends.TRITON, f"{name}_out")
    ids, value = torch.tensor([0, 4, 1, 2, 3]), lazily_negated()
    dense = value.resolve_neg()
    first = (ids, value) if name == "noisy_embedding" else (value,)
    plain = (ids, dense) if name == "noisy_embedding" else (dense,)
    expected = add_noise(dense[ids] if name == "noisy_embedding" else dense, 5.0, seed=3)
    out = torch.zeros(5, WIDTH)
    call(*first, SEED, ALPHA, out=out)
    assert same_bits(out, expected)
    call(*plain, SEED, ALPHA, out=out)
    assert (out == 7).all()


# ---- masks that are no masks


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("name", ["attention_mask", "noise_mask"])
def test_soft_masks(family, name, dtype):
    """Integral values number documents; others say nothing about tokens, down to the smallest."""
    backend = "reference" if family else "cpp"
    given = {"seed": 3, "backend": backend}
    mask = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 3.0, 3.0, 128.0]]).to(dtype)
    whole = neftune_noise((2, 4), WIDTH, 5.0, **{name: mask.long()}, **given)
    assert same_bits(neftune_noise((2, 4), WIDTH, 5.0, **{name: mask}, **given), whole)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value in (0.5, 1.5, 0.99609375, smallest, float("inf")):
        soft = mask.clone()
        soft[1, 2] = value
        message = f"{name} has values that are no whole numbers, such as {float(soft[1, 2]):g}"
        with pytest.raises(ValueError, match=message):
            neftune_noise((2, 4), WIDTH, 5.0, **{name: soft}, **given)
        with pytest.raises(ValueError, match=message):
            noisy_embedding(torch.zeros(2, 4).long(), torch.ones(3, WIDTH), 5.0, **{name: soft})


def test_negative_zero_is_padding(family):
    backend = "reference" if family else "cpp"
    mask = torch.tensor([[1.0, -0.0, 1.0]])
    embeds = F.embedding(torch.zeros(1, 3).long(), torch.ones(1, WIDTH))
    out = add_noise(embeds, 5.0, attention_mask=mask, seed=3, backend=backend)
    assert torch.equal(out[0, 1], embeds[0, 1]) and not torch.equal(out[0, 0], embeds[0, 0])


def test_differences_of_position_ids_wrap(family):
    """The smallest int64 goes on after the largest: differences count modulo 2⁶⁴."""
    backend = "reference" if family else "cpp"
    ids = torch.tensor([[2**63 - 1, -(2**63)]])
    given = {"seed": 3, "backend": backend}
    noise = neftune_noise((1, 2), WIDTH, 5.0, position_ids=ids, **given)
    assert same_bits(noise, neftune_noise((1, 2), WIDTH, 5.0, **given))
