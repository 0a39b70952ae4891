"""Every refusal of the three functions: the right exception, and a message that names the value and
the rule it breaks.
"""

import math
import re

import numpy
import pytest
import torch
from torch import nn

from neftune_kernels import (
    add_noise,
    available_backends,
    backends,
    neftune_noise,
    noisy_embedding,
)

IDS = torch.tensor([[1, 2, 3], [4, 0, 0]])
WEIGHT = torch.zeros(5, 16)
NAN, INF = math.nan, math.inf


def embed(noise_alpha=5.0, **given):
    return noisy_embedding(IDS, WEIGHT, noise_alpha, **given)


def train(noise_alpha=5.0, **given):
    return noisy_embedding(IDS, WEIGHT.clone().requires_grad_(), noise_alpha, **given)


def add(noise_alpha=5.0, **given):
    return add_noise(WEIGHT[IDS], noise_alpha, **given)


def noise(noise_alpha=5.0, **given):
    return neftune_noise((2, 3), 16, noise_alpha, **given)


FUNCTIONS = (embed, train, add, noise)


def refused(error, message, function, *args, **given):
    with pytest.raises(error) as caught:
        function(*args, **given)
    assert caught.type is error, f"{caught.type.__name__} instead of {error.__name__}"
    assert re.search(message, str(caught.value)), str(caught.value)


ALPHAS = [
    (NAN, ValueError, "noise_alpha must be finite and >= 0, got nan"),
    (INF, ValueError, "noise_alpha must be finite and >= 0, got inf"),
    (-INF, ValueError, "noise_alpha must be finite and >= 0, got -inf"),
    (-1.0, ValueError, r"noise_alpha must be finite and >= 0, got -1\.0"),
    (-1, ValueError, "noise_alpha must be finite and >= 0, got -1"),
    (10**400, ValueError, "noise_alpha must be finite and >= 0, got an integer beyond float64"),
    (-1e-300, ValueError, "noise_alpha must be finite and >= 0, got -1e-300"),
    (torch.tensor(-2.0), ValueError, r"noise_alpha must be finite and >= 0, got -2\.0"),
    ("5", TypeError, "noise_alpha must be a number or None, got '5'"),
    (True, TypeError, "noise_alpha must be a number or None, got True"),
    ([5.0], TypeError, "noise_alpha must be a number or None, got"),
    (5j, TypeError, "noise_alpha must be a number or None, got 5j"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("noise_alpha, error, message", ALPHAS)
def test_noise_alpha(function, noise_alpha, error, message):
    refused(error, message, function, noise_alpha)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("noise_alpha", [torch.tensor(5.0), torch.tensor(5), 5])
def test_numbers_of_any_kind_are_alphas(function, noise_alpha):
    assert torch.equal(function(noise_alpha, seed=0), function(5.0, seed=0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_stream_is_refused_with_its_new_name(function):
    name = {add: "add_noise", noise: "neftune_noise"}.get(function, "noisy_embedding")
    message = rf"{name}\(\) takes no stream=: .* is replica="
    refused(TypeError, message, function, stream=0)
    refused(TypeError, message, function, noise_alpha=0.0, stream=1)  # without noise as well
    refused(TypeError, f"{name}.*unexpected keyword argument 'streams'", function, streams=0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("word", ["replica", "sample_offset", "position_offset"])
def test_words_of_the_counter(function, word):
    for value in (-1, 2**32, 2**64, -(2**63)):
        refused(
            ValueError,
            rf"{word} must lie in \[0, 2\*\*32\), got {value}",
            function,
            seed=0,
            **{word: value},
        )
    for value in (1.0, 0.0, "1", None, True, False):
        refused(
            TypeError,
            f"{word} must be an integer, got {value!r}",
            function,
            seed=0,
            **{word: value},
        )
    assert not torch.equal(function(seed=0, **{word: 2**32 - 1}), function(seed=0))
    assert torch.equal(function(seed=0, **{word: torch.tensor(3)}), function(seed=0, **{word: 3}))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_seeds(function):
    for value in (2**64, -(2**63) - 1, 10**30):
        refused(
            ValueError,
            rf"seed must lie in \[-2\*\*63, 2\*\*64\), got {value}",
            function,
            seed=value,
        )
    for value in (1.0, "1", True):
        refused(TypeError, f"seed must be an int.*got {value!r}", function, seed=value)
    for value in (torch.tensor([1]), torch.tensor([1, 2])):
        refused(
            ValueError,
            rf"seed tensor must be 0-dim int64, got torch.int64 of shape \({len(value)},\)",
            function,
            seed=value,
        )
    for value in (torch.tensor(1, dtype=torch.int32), torch.tensor(1.0)):
        refused(
            ValueError, f"seed tensor must be 0-dim int64, got {value.dtype}", function, seed=value
        )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_backend(function):
    for name in ("gpu", "CPP", ""):
        refused(
            ValueError,
            f"backend must be None or one of 'reference', 'cpp', 'triton', 'cuda', got {name!r}",
            function,
            backend=name,
        )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_of_another_device(function, backend):
    refused(
        ValueError,
        f"backend '{backend}' is not available: wrong device: runs on GPUs, not on cpu",
        function,
        backend=backend,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "reason", ["not built: no compiler", "_C.abi3.so failed to load: undefined symbol: _Zebra"]
)
def test_missing_library_gives_its_reason(function, reason, monkeypatch):
    """The original error reaches the user who asks for the kernel by name; everybody else gets the
    reference.
    """
    expected = function(seed=0, backend="reference")
    monkeypatch.setattr(backends, "native", backends.NativeLibrary(None, reason))
    refused(
        ValueError,
        f"^backend 'cpp' is not available: {re.escape(reason)}$",
        function,
        backend="cpp",
    )
    assert available_backends()["cpp"] == available_backends("cpu")["cpp"] == reason
    assert backends.simd_level() == "none"
    assert backends.choose_backend(None, torch.device("cpu"), torch.float32).name == "reference"
    assert torch.equal(function(seed=0), expected)


def test_available_backends(monkeypatch):
    monkeypatch.setattr(backends, "native", backends.NativeLibrary(None, ""))
    assert set(available_backends()) == {"reference", "cpp", "triton", "cuda"}
    assert (
        available_backends()["reference"]
        == available_backends("cpu")["reference"]
        == available_backends("cuda")["reference"]
        == "available"
    )
    assert available_backends()["cpp"] == available_backends("cpu")["cpp"] == "available"
    assert (
        available_backends("cuda")["cpp"]
        == available_backends("cuda:1")["cpp"]
        == "wrong device: runs on cpu, not on cuda"
    )


def test_dtype_the_kernel_does_not_know(monkeypatch):
    monkeypatch.setattr(backends, "native", backends.NativeLibrary(None, ""))
    message = "backend 'cpp' is not available: dtype torch.float64"
    refused(ValueError, message, noisy_embedding, IDS, WEIGHT.double(), 5.0, backend="cpp")
    refused(ValueError, message, add_noise, WEIGHT.double(), 5.0, backend="cpp")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int16, torch.uint8, torch.bool, torch.float16], ids=str
)
def test_dtype_of_ids(dtype):
    for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
        refused(
            TypeError,
            f"input_ids must be int32 or int64, got {dtype}",
            noisy_embedding,
            IDS.to(dtype),
            weight,
            5.0,
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_dtype_of_embeddings(dtype):
    message = f"must be float32, bfloat16, float16 or float64, got {dtype}"
    refused(TypeError, message, noisy_embedding, IDS, WEIGHT.to(dtype), 5.0)
    refused(TypeError, message, add_noise, WEIGHT.to(dtype), 5.0)


def test_what_is_not_a_tensor():
    refused(
        TypeError, "input_ids must be a tensor, got list", noisy_embedding, [[1, 2]], WEIGHT, 5.0
    )
    refused(TypeError, "weight must be a tensor, got list", noisy_embedding, IDS, [[1.0]], 5.0)
    refused(TypeError, "inputs_embeds must be a tensor, got list", add_noise, [[1.0]], 5.0)


@pytest.mark.parametrize("shape", [(), (16,), (5, 4, 4)])
def test_axes_of_the_weight(shape):
    message = re.escape(f"weight must have shape (num_embeddings, embedding_dim), got {shape}")
    for noise_alpha in (5.0, 0):
        refused(ValueError, message, noisy_embedding, IDS, torch.zeros(shape), noise_alpha)


def test_embeddings_need_a_last_axis():
    refused(
        ValueError,
        r"inputs_embeds must have shape \(\.\.\., embedding_dim\), got \(\)",
        add_noise,
        torch.tensor(1.0),
        5.0,
    )


@pytest.mark.parametrize("embedding_dim", [-1, 2**31, 2**40])
def test_embedding_dim(embedding_dim):
    refused(
        ValueError,
        rf"embedding_dim must lie in \[0, 2\*\*31\), got {embedding_dim}",
        neftune_noise,
        (2, 3),
        embedding_dim,
        5.0,
    )


def test_devices():
    refused(
        ValueError,
        "input_ids is on meta, weight on cpu",
        noisy_embedding,
        IDS.to("meta"),
        WEIGHT,
        5.0,
    )
    refused(
        ValueError,
        "input_ids is on cpu, weight on meta",
        noisy_embedding,
        IDS,
        WEIGHT.to("meta"),
        5.0,
    )
    refused(
        ValueError,
        "lengths is on meta, the tokens are on cpu",
        embed,
        lengths=torch.zeros(2, dtype=torch.int64, device="meta"),
    )


@pytest.mark.parametrize("padding_idx", [5, -6, 100])
def test_padding_idx(padding_idx):
    message = rf"padding_idx must lie in \[-num_embeddings, num_embeddings = 5\), got {padding_idx}"
    for noise_alpha in (5.0, 0):
        refused(ValueError, message, embed, noise_alpha, padding_idx=padding_idx)


@pytest.mark.parametrize("embed_scale", [NAN, INF, -INF])
def test_embed_scale(embed_scale):
    refused(
        ValueError, f"embed_scale must be finite, got {embed_scale}", embed, embed_scale=embed_scale
    )


# What layouts refuse is listed in test_layout; here: every function refuses it, on every backend,
# whichever op would look at the values.
BAD_LAYOUTS = {
    "two at once": (
        {"attention_mask": torch.ones(2, 3), "lengths": torch.tensor([3, 1])},
        ValueError,
        "attention_mask and lengths",
    ),
    "cu_seqlens and positions": (
        {"cu_seqlens": torch.tensor([0, 6]), "position_ids": IDS},
        ValueError,
        "position_ids.*cu_seqlens",
    ),
    "shape of the mask": (
        {"attention_mask": torch.ones(2, 4)},
        ValueError,
        r"attention_mask.*\(2, 3\).*\(2, 4\)",
    ),
    "shape of the lengths": (
        {"lengths": torch.tensor([3])},
        ValueError,
        r"lengths.*\(2,\).*\(1,\)",
    ),
    "shape of the positions": (
        {"position_ids": torch.zeros(2, 2).long()},
        ValueError,
        r"position_ids.*\(2, 3\).*\(2, 2\)",
    ),
    "NaN mask": ({"attention_mask": torch.full((2, 3), NAN)}, ValueError, "attention_mask.*NaN"),
    "negative mask": (
        {"attention_mask": -torch.ones(2, 3).long()},
        ValueError,
        "attention_mask.*negative",
    ),
    "negative bfloat16 mask": (
        {"attention_mask": -torch.ones(2, 3).bfloat16()},
        ValueError,
        "attention_mask.*negative",
    ),
    "negative lengths": ({"lengths": torch.tensor([3, -1])}, ValueError, "lengths.*negative.*-1"),
    "negative int32 lengths": (
        {"lengths": torch.tensor([-7, 1], dtype=torch.int32)},
        ValueError,
        "lengths.*negative.*-7",
    ),
    "negative lengths with positions": (
        {"lengths": torch.tensor([3, -1]), "position_ids": IDS},
        ValueError,
        "lengths.*negative.*-1",
    ),
    "cu_seqlens from 1": ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens.*0.*6.*1"),
    "cu_seqlens to 5": (
        {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
        ValueError,
        "cu_seqlens.*0.*6.*5",
    ),
    "cu_seqlens to 7": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens.*0.*6.*7"),
    "cu_seqlens that fall": (
        {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)},
        ValueError,
        "cu_seqlens.*decrease",
    ),
    "cu_seqlens far outside": (
        {"cu_seqlens": torch.tensor([0, 2**40, 6])},
        ValueError,
        "cu_seqlens.*decrease",
    ),
    "cu_seqlens of no document": (
        {"cu_seqlens": torch.tensor([0])},
        ValueError,
        "cu_seqlens.*6.*0",
    ),
    "dtype of the lengths": ({"lengths": torch.tensor([3.0, 1.0])}, TypeError, "lengths.*float32"),
    "dtype of the cu_seqlens": (
        {"cu_seqlens": torch.tensor([0, 6]).short()},
        TypeError,
        "cu_seqlens.*int16",
    ),
    "dtype of the positions": (
        {"position_ids": torch.zeros(2, 3)},
        TypeError,
        "position_ids.*float32",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout, error, message", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_layouts(function, layout, error, message, backend):
    refused(error, message, function, **layout, seed=0, backend=backend)


@pytest.mark.parametrize("length", [-1, -(2**63)])
def test_negative_lengths_without_tokens(length, backend):
    """Values are checked even where no token would look at them."""
    lengths = torch.tensor([length])
    refused(
        ValueError,
        "lengths.*negative",
        neftune_noise,
        (1, 0),
        16,
        5.0,
        lengths=lengths,
        seed=0,
        backend=backend,
    )


def test_ids_out_of_range_name_the_id(backend):
    for bad in (5, -1, 2**40):
        message = rf"input_ids must lie in \[0, num_embeddings = 5\), got {bad}"
        refused(
            IndexError,
            message,
            noisy_embedding,
            torch.tensor([[0, bad]]),
            WEIGHT,
            5.0,
            backend=backend,
        )


OFF = [
    ({"backend": "tpu"}, ValueError, "backend must be None or one of .* got 'tpu'"),
    (
        {"seed": 1, "generator": torch.Generator()},
        ValueError,
        "seed and generator may not both be given",
    ),
    ({"seed": 2**64}, ValueError, "seed must lie in"),
    ({"lengths": torch.tensor([1, 2, 3])}, ValueError, "lengths must have the leading axes"),
    (
        {"lengths": torch.tensor([1, 2]), "attention_mask": torch.ones(2, 3)},
        ValueError,
        "at most one of",
    ),
]


@pytest.mark.parametrize("noise_alpha", [0, 0.0, None])
@pytest.mark.parametrize("arguments, error, message", OFF)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_switched_off_noise_hides_no_mistake(function, arguments, error, message, noise_alpha):
    refused(error, message, function, noise_alpha, **arguments)


@pytest.mark.parametrize("noise_alpha", [0, 5.0])
def test_dtypes_are_refused_with_and_without_noise(noise_alpha):
    for ids in (IDS.short(), IDS.float()):
        refused(
            TypeError,
            f"input_ids must be int32 or int64, got {ids.dtype}",
            noisy_embedding,
            ids,
            WEIGHT,
            noise_alpha,
        )
    refused(
        TypeError,
        "embeddings must be float32.*got torch.int64",
        noisy_embedding,
        IDS,
        WEIGHT.long(),
        noise_alpha,
    )
    refused(TypeError, "embeddings must be float32.*got torch.int64", add_noise, IDS, noise_alpha)
    refused(
        ValueError,
        r"inputs_embeds must have shape \(..., embedding_dim\), got \(\)",
        add_noise,
        torch.tensor(1.0),
        noise_alpha,
    )


@pytest.mark.parametrize("tokens", [2, 3000])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_id_out_of_range_is_named(tokens, requires_grad):
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    for bad in (5, -1, 2**40):
        ids[0, -1] = bad
        message = rf"input_ids must lie in \[0, num_embeddings = 5\), got {bad}"
        refused(
            IndexError,
            message,
            noisy_embedding,
            ids,
            torch.zeros(5, 100, requires_grad=requires_grad),
            5.0,
        )


def test_other_python_values():
    refused(TypeError, "padding_idx must be an integer, got 1.5", embed, padding_idx=1.5)
    refused(TypeError, "padding_idx must be an integer, got True", embed, padding_idx=True)
    refused(TypeError, "embed_scale must be a number, got None", embed, embed_scale=None)
    refused(
        TypeError, "embedding_dim must be an integer, got 16.0", neftune_noise, (2, 3), 16.0, 5.0
    )
    refused(
        ValueError,
        r"input_shape must not be negative, got \(-1, 3\)",
        neftune_noise,
        (-1, 3),
        16,
        5.0,
    )
    refused(ValueError, "device_type: .*xx", available_backends, "xx")


REMEDIES = [
    ("noise_alpha must be one number, got a tensor of shape (2,)", {"noise_alpha": torch.ones(2)}),
    ("mask.squeeze(-1)", {"attention_mask": torch.ones(*IDS.shape, 1)}),
    ("pass the tokenizer's", {"attention_mask": torch.ones(2, 1, 5, 5), "shape": (2, 5)}),
    *(
        (f"pass torch.as_tensor({name})", {name: kind([[1, 1], [1, 0]]), "shape": (2, 2)})
        for name in ("attention_mask", "lengths", "cu_seqlens", "position_ids", "noise_mask")
        for kind in (list, numpy.array)
    ),
    ("pass its .weight", {"weight": nn.Embedding.from_pretrained(WEIGHT)}),
    ("pass torch.as_tensor(input_ids)", {"input_ids": IDS.tolist()}),
    ("leave it out, or move the tensors from cpu", {"backend": "triton"}),
]


def test_nested_tensors_are_told_their_dense_form():
    ids = torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=torch.jagged)
    refused(
        TypeError, r"input_ids must be a dense tensor.*\.values", noisy_embedding, ids, WEIGHT, 5
    )
    embeds = torch.nested.nested_tensor([WEIGHT, WEIGHT[:2]], layout=torch.jagged)
    refused(TypeError, r"inputs_embeds must be a dense tensor.*\.values", add_noise, embeds, 5.0)
    dense = {"cu_seqlens": ids.offsets(), "seed": 3}
    expected = noisy_embedding(torch.cat((IDS[0], IDS[1, :2])), WEIGHT, 5.0, **dense)
    assert torch.equal(noisy_embedding(ids.values(), WEIGHT, 5.0, **dense), expected)


@pytest.mark.parametrize("message, given", REMEDIES, ids=[message for message, _ in REMEDIES])
def test_errors_name_the_remedy(message, given):
    shape, given = given.get("shape", tuple(IDS.shape)), {"noise_alpha": 5.0, **given}
    given.pop("shape", None)
    call = {"input_ids": torch.zeros(shape, dtype=torch.int64), "weight": WEIGHT, **given}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        noisy_embedding(**call)
