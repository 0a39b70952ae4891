"""The CUDA C++ kernels against the reference, bit for bit: the Triton kernels' matrix, on a GPU or,
without one, in this machine's memory.

    pytest -m gpu                                                on a GPU
    NEFTUNE_CUDA_SHIM=library pytest -m gpu tests/test_cuda.py   the kernels' bodies compiled by g++
                                                                 with sanitizers

tests/test_cuda_build.py builds that library from csrc/cuda and tests/cuda_shim.h and runs this file
in it.
"""

import ctypes
from types import SimpleNamespace

import pytest
import test_attack
import test_triton
import torch
import torch.nn.functional as F
from conftest import FLOAT_DTYPES, cuda_shim, make_batch, same_bits
from test_triton import (
    TILED_LAYOUTS,
    VECTORS,
    agree,
    assert_golden,
    assert_same_layout,
    by_kernel,
    golden_cases,
    make_weight,
)

from neftune_kernels import (
    available_backends,
    backends,
    functional,
    lookup,
    neftune_noise,
    noisy_embedding,
)

OPS = torch.ops.neftune_kernels
KERNELS = SimpleNamespace(
    noisy_embedding_out=OPS.cuda_noisy_embedding.out,
    add_noise_out=OPS.cuda_add_noise.out,
    mask_layout=OPS.cuda_mask_layout,
    padding_layout=OPS.cuda_padding_layout,
    number_documents=OPS.cuda_number_documents,
    number_padding=OPS.cuda_number_padding,
)
pytestmark = pytest.mark.gpu


@pytest.fixture
def device(monkeypatch):
    """Where CUDA kernels run: a GPU, or the CPU under the shim."""
    monkeypatch.setattr(test_triton, "kernels", lambda: KERNELS)
    # Rows of its tests are those of one warp, whatever a block is: test_numbering_of_long_rows.
    monkeypatch.setattr(test_triton, "small_programs", lambda monkeypatch, block: None)
    if cuda_shim is not None:
        return torch.device("cpu")
    reason = available_backends("cuda")["cuda"]
    if reason != "available":
        pytest.skip(f"CUDA kernels: {reason}; tests/test_cuda_build.py runs these on the CPU")
    return torch.device("cuda", 0)


@pytest.fixture
def gpu(device, monkeypatch):
    if cuda_shim is not None:
        pytest.skip("needs a real GPU: streams, graphs, devices, memory")
    monkeypatch.setattr(backends, "_triton_fails", lambda device_type: "left out by this test")
    return device


@pytest.fixture
def alpha_on_device(device):
    """Alpha is taken for the device's, wherever that is."""
    if cuda_shim is not None:
        cuda_shim.neftune_shim_alpha_on_device(ctypes.c_bool(True))
    yield
    if cuda_shim is not None:
        cuda_shim.neftune_shim_alpha_on_device(ctypes.c_bool(False))


@pytest.fixture
def public(device, monkeypatch):
    """Where the public functions serve backend="cuda"."""
    if cuda_shim is not None:
        monkeypatch.setattr(backends, "_cuda_reason", lambda device_type: "")
        monkeypatch.setattr(lookup, "_embed_quickly", lambda *args: None)
    return device


@pytest.fixture(params=(1, 2, 3))
def grid_limit(request, device):
    if cuda_shim is None:
        pytest.skip("a GPU's grid has its own limits: test_rows_beyond_65535")
    cuda_shim.neftune_shim_grid_limit(ctypes.c_int64(request.param))
    yield request.param
    cuda_shim.neftune_shim_grid_limit(ctypes.c_int64(65535))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_grids_smaller_than_the_tokens(device, grid_limit, dtype):
    """Rows folded into z by the vector kernel while they fit there, strided over by the other."""
    weight = make_weight(24, dtype)
    for rows, columns in (
        (1, 1),
        (grid_limit**2, 4 * grid_limit),
        (grid_limit**2 + 3, 1),
        (2, 4 * grid_limit + 1),
        (11, 13),
    ):
        ids = torch.arange(rows * columns).reshape(rows, columns) % 11
        agree(device, ids, weight, lengths=torch.arange(rows) % columns + 1)
        agree(device, ids, weight, embed_scale=1.5)


@pytest.mark.parametrize("embedding_dim", (8, 248, 256, 264, 512, 520, 768, 3584))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_trips_of_the_loop_over_columns(device, dtype, embedding_dim):
    """Blocks ahead and those left over, with and without a layout and a scale; and rows without
    noise beside them.
    """
    batch, weight = make_batch("holes", rows=2, columns=5), make_weight(embedding_dim, dtype)
    weight[:, ::3] = -0.0
    agree(device, batch.input_ids, weight, seed=2**63 + 1, replica=2**32 - 1)
    agree(
        device,
        batch.input_ids,
        weight,
        attention_mask=batch.attention_mask,
        sample_offset=2**32 - 2,
    )
    agree(device, batch.input_ids.int(), weight, lengths=torch.tensor([3, 0]), embed_scale=1.7)


@pytest.fixture
def long_calls(device):
    """Small calls are served as long ones are: narrow rows by part of a warp each."""
    if cuda_shim is None:
        pytest.skip("a GPU has its own sizes: test_long_calls")
    cuda_shim.neftune_shim_many_tokens(ctypes.c_int64(0), ctypes.c_int64(1))
    yield
    cuda_shim.neftune_shim_many_tokens(ctypes.c_int64(4097), ctypes.c_int64(64))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", TILED_LAYOUTS)
def test_several_tokens_of_a_warp(device, long_calls, layout, dtype):
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [2, 6, 7, 8, 2, 2], [9, 10, 2, 1, 3, 4]])
    given = TILED_LAYOUTS[layout]
    for embedding_dim in (24, 576, 1032) if layout == "numbered" else (24,):
        weight = make_weight(embedding_dim, dtype)
        weight[2:6] = -0.0
        agree(device, ids, weight, **given, replica=3, sample_offset=1, position_offset=1)
        agree(device, ids.int(), weight, **given, embed_scale=1.7)


@pytest.mark.parametrize("rows, columns, embedding_dim", ((65, 64, 24), (1, 4099, 16), (66, 63, 8)))
def test_long_calls(device, rows, columns, embedding_dim):
    ids = torch.arange(rows * columns).reshape(rows, columns) % 11
    weight = make_weight(embedding_dim, torch.bfloat16)
    agree(device, ids, weight, attention_mask=(ids > 2).long())


@pytest.mark.parametrize("rows", (128, 129))
def test_rows_of_short_calls_take_several_warps(device, rows):
    """Up to 512 tokens: of 512 columns two warps, of 1024 four, of 248 one."""
    for embedding_dim in (248, 512, 1024):
        ids = torch.arange(rows * 4).reshape(rows, 4) % 11
        agree(device, ids, make_weight(embedding_dim, torch.float16), lengths=ids[:, 0] % 4 + 1)


@pytest.fixture(params=["rows", "pieces of one warp", "pieces of three"])
def blocks(request, device):
    """The most tokens of a block; a GPU has its own."""
    if cuda_shim is None:
        yield 4096, 2048
        return
    row, piece = {"rows": (4096, 2048), "pieces of one warp": (64, 128)}.get(
        request.param, (256, 384)
    )
    cuda_shim.neftune_shim_numbering(ctypes.c_int64(row), ctypes.c_int64(piece))
    yield row, piece
    cuda_shim.neftune_shim_numbering(ctypes.c_int64(4096), ctypes.c_int64(2048))


# What lies at the seams of threads, warps and pieces: (of every hundred tokens real, columns from
# one document to the next), of a row each.
LONG_ROWS = [(100, 10**6), (100, 7), (97, 200), (50, 31), (3, 500), (1, 10**6), (0, 1)]


def long_rows(columns, generator):
    """A mask that numbers documents, and position ids that count in them."""
    column, masks, places = torch.arange(columns), [], []
    for share, length in LONG_ROWS:
        real = torch.randint(0, 100, (columns,), generator=generator) < share
        masks.append((1 + column // length) * real)
        places.append(column % length + 5)
    padded = torch.stack([column < columns // 3, column >= columns - 130, column == columns // 2])
    return (
        torch.cat((torch.stack(masks), padded.long())),
        torch.cat((torch.stack(places), column.expand(3, -1))),
    )


@pytest.mark.parametrize("columns", (128, 129, 513, 700))
def test_numbering_of_long_rows(device, blocks, columns):
    """Rows of several warps, in one block and in pieces: of them some without a real token."""
    mask, place = long_rows(columns, torch.Generator().manual_seed(columns))
    for told in ((mask, None), (mask != 0, None), (None, place), (mask, place), (mask > 0, place)):
        assert_same_layout(mask.shape, device, *told)


def test_numbering_of_more_pieces_than_a_warp_has_lanes(device, blocks):
    row, piece = blocks
    columns = 35 * piece + 3 if row < 4096 else 2100  # and more tokens of a thread
    generator = torch.Generator().manual_seed(1)
    mask, place = (tensor[[0, 2, 5, 8]] for tensor in long_rows(columns, generator))
    assert_same_layout(mask.shape, device, mask)
    assert_same_layout(mask.shape, device, (mask > 0).int(), place.int())


@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.uint8), ids=str)
def test_narrow_position_ids(device, dtype):
    """Signs are extended, and what has none is not."""
    place = torch.tensor([[126, 127, -128, -127, 0, 1, 2, -1, 0]]).to(dtype)
    assert_same_layout(place.shape, device, position_ids=place)
    strided = torch.stack((place, place), -1)[..., 0]
    assert_same_layout(place.shape, device, attention_mask=place > 0, position_ids=strided)


def test_seeds_replicas_and_offsets(device):
    ids, weight = make_batch("full").input_ids, make_weight(32, torch.bfloat16)
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1, -1, -(2**63)):
        for replica, sample_offset, position_offset in (
            (0, 0, 0),
            (1, 2, 3),
            (2**32 - 1, 2**32 - 1, 2**32 - 1),
        ):
            offsets = {
                "replica": replica,
                "sample_offset": sample_offset,
                "position_offset": position_offset,
            }
            agree(device, ids, weight, seed=seed, **offsets)
            agree(
                device, ids, weight, seed=seed, **offsets, lengths=torch.tensor([13, 2**40, 0, 5])
            )


def test_masks_of_special_values(device):
    """Both zeros are padding; NaN is real and unlike itself, where nobody may look at it: as the
    reference does on a GPU.
    """
    nan, inf = float("nan"), float("inf")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        mask = torch.tensor(
            [
                [0.0, -0.0, 1.0, 1.0, nan, nan, 2.0, inf],
                [inf, inf, -0.0, inf, -inf, -inf, -1.0, 1.0],
            ],
            dtype=dtype,
        )
        document, _, lengths = (
            tensor.cpu() for tensor in KERNELS.mask_layout(mask.to(device), None)
        )
        assert document.tolist() == [-1, -1, 0, 0, 1, 2, 3, 4, 5, 5, -1, 5, 6, 6, 7, 8]
        assert lengths[:9].tolist() == [2, 1, 1, 1, 1, 3, 2, 1, 1]


@pytest.mark.parametrize("dtype", (torch.uint16, torch.uint32, torch.uint64), ids=str)
def test_unsigned_masks(device, dtype):
    mask = make_batch("numbered").attention_mask
    expected = KERNELS.mask_layout(mask.to(device), None)
    found = KERNELS.mask_layout(mask.to(dtype).to(device), None)
    assert torch.equal(found[0], expected[0]) and torch.equal(
        found[1][found[0] >= 0], expected[1][expected[0] >= 0]
    )


def test_padding_value_of_any_sign(device):
    for dtype in (torch.int32, torch.int64):
        ids = torch.tensor([[5, -1, 3, 2**31 - 1], [0, 5, 5, 7]], dtype=dtype)
        for padding in (5, 3, 0, 2**31 - 1, 2**32 - 1):
            document, _, lengths = (
                tensor.cpu() for tensor in KERNELS.padding_layout(ids.to(device), padding)
            )
            real = ids.long() != padding
            assert (
                torch.equal(document.reshape(2, 4) >= 0, real)
                and lengths[:2].tolist() == real.sum(1).tolist()
            )


def test_bounds_as_far_apart_as_can_be(device):
    ids, weight = torch.arange(6).reshape(1, 6), make_weight(16, torch.float32)
    for bounds in ([-(2**63), 2**63 - 1], [0, -(2**63), 2**63 - 1], [2**63 - 1, -(2**63)]):
        assert (
            by_kernel(device, ids, weight, 5.0, seed=0, cu_seqlens=torch.tensor(bounds))
            .isfinite()
            .all()
        )


def test_bad_arguments_are_refused(device):
    """What would otherwise be read as something else; values are not looked at."""
    ids, weight = (
        torch.zeros(2, 3, dtype=torch.int64, device=device),
        torch.zeros(4, 8, device=device),
    )
    seed, alpha, out = (
        torch.tensor(1, device=device),
        torch.tensor(5.0, dtype=torch.float64),
        torch.zeros(2, 3, 8, device=device),
    )
    call = OPS.cuda_noisy_embedding
    for arguments, message in (
        ((ids, weight.double(), seed, alpha), "weight must be float32, bfloat16 or float16"),
        ((ids.short(), weight, seed, alpha), "input_ids must be int32 or int64"),
        ((ids, weight, seed.int(), alpha), "seed must be a 0-dim int64"),
        ((ids, weight, seed, alpha.float()), "noise_alpha must be a 0-dim float64"),
        ((ids, weight, seed, alpha, None, None, seed.repeat(3)), "lengths must have 2 elements"),
        (
            (ids, weight, seed, alpha, seed.repeat(5), None, seed.repeat(2)),
            "document must have 6 elements",
        ),
        (
            (ids, weight, seed, alpha, None, None, None, seed.repeat(1)[:0]),
            "cu_seqlens must have shape",
        ),
        ((ids, weight[0], seed, alpha), "weight must have shape"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(*arguments)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        call.out(ids, weight, seed, alpha, out=torch.zeros(3, 2, 8, device=device).transpose(0, 1))
    with pytest.raises(RuntimeError, match="out must have the result's shape"):
        call.out(ids, weight, seed, alpha, out=out[:1])
    with pytest.raises(RuntimeError, match="out must not overlap inputs_embeds"):
        OPS.cuda_add_noise.out(
            out.view(-1)[8:].view(5, 8), seed, alpha, out=out.view(-1)[:40].view(5, 8)
        )


@pytest.mark.parametrize("argument", test_attack.READ)
def test_out_overlaps_no_argument(device, argument):
    """By the library's own check: in front of it stands that of all GPUs."""
    test_attack.assert_overlap_is_refused("cuda_", argument, device)


def test_public_functions_serve_it(public):
    batch, weight = make_batch("numbered"), make_weight(64, torch.bfloat16)
    given = {"attention_mask": batch.attention_mask.to(public), "seed": 5, "backend": "cuda"}
    expected = noisy_embedding(
        batch.input_ids,
        weight,
        5.0,
        attention_mask=batch.attention_mask,
        seed=5,
        backend="reference",
    )
    ids, table = batch.input_ids.to(public), weight.to(public)
    assert backends.choose_backend("cuda", public, torch.bfloat16).name == "cuda"
    assert same_bits(noisy_embedding(ids, table, 5.0, **given).cpu(), expected)
    trained = noisy_embedding(ids, table.clone().requires_grad_(), 5.0, **given)
    assert same_bits(trained.detach().cpu(), expected)
    (grad,) = torch.autograd.grad(trained.float().square().sum(), trained)
    assert grad.shape == trained.shape
    assert same_bits(functional.add_noise(F.embedding(ids, table), 5.0, **given).cpu(), expected)
    noise = neftune_noise((4, 13), 64, 5.0, **given)
    assert same_bits(
        noise.cpu(),
        neftune_noise(
            (4, 13), 64, 5.0, attention_mask=batch.attention_mask, seed=5, backend="reference"
        ),
    )
    with pytest.raises(ValueError, match=r"backend 'cuda' is not available: dtype torch.float64"):
        backends.choose_backend("cuda", public, torch.float64)


@pytest.mark.parametrize("distribution", ("normal", "rademacher"))
def test_other_distributions(public, distribution):
    """Unfused, but with the kernel's own draws."""
    batch = make_batch("holes", rows=2, columns=5)
    for dtype in FLOAT_DTYPES:
        kind = {
            "distribution": distribution,
            "sign": -1,
            "seed": 4,
            "sample_offset": 2,
            "position_offset": 1,
        }
        expected = noisy_embedding(
            batch.input_ids,
            make_weight(24, dtype),
            5.0,
            attention_mask=batch.attention_mask,
            **kind,
            backend="reference",
        )
        ids, weight, mask = (
            value.to(public)
            for value in (batch.input_ids, make_weight(24, dtype), batch.attention_mask)
        )
        assert same_bits(
            noisy_embedding(ids, weight, 5.0, attention_mask=mask, **kind, backend="cuda").cpu(),
            expected,
        )


@pytest.mark.parametrize("case", golden_cases(VECTORS))
def test_golden_vectors(public, case):
    assert_golden(public, case, "cuda")


def test_it_is_chosen_where_triton_is_not(gpu):
    assert backends.choose_backend(None, gpu, torch.bfloat16).name == "cuda"


def standard_cases():
    """For tests/test_cuda_build.py, which sees to it that wrong kernels fail here: every kernel and
    every branch of a token's place.
    """
    device, batch = torch.device("cpu"), make_batch("holes", rows=3, columns=5)
    test_triton.kernels = lambda: KERNELS
    place = torch.arange(15).reshape(3, 5) % 4
    for width, dtype in (
        (520, torch.bfloat16),
        (520, torch.float16),
        (520, torch.float32),
        (20, torch.float16),
    ):
        weight = make_weight(width, dtype)
        agree(device, batch.input_ids, weight, replica=2, sample_offset=3, position_offset=5)
        for scale in (1.0, 1.7):
            arguments = {"replica": 2, "sample_offset": 3, "embed_scale": scale}
            agree(device, batch.input_ids, weight, lengths=torch.tensor([5, 2, 1]), **arguments)
            agree(
                device,
                batch.input_ids,
                weight,
                attention_mask=batch.attention_mask,
                position_ids=place,
                **arguments,
            )
            agree(
                device, batch.input_ids, weight, cu_seqlens=torch.tensor([0, 4, 4, 15]), **arguments
            )
        out = by_kernel(
            device,
            torch.tensor([[0, 10, 11]]),
            weight,
            5.0,
            seed=0,
            attention_mask=torch.tensor([[1, 2, 0]]),
        )
        assert out[0, 2].isnan().all() and not out[0, :2].isnan().any()
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons fresh memory
    mask, place = long_rows(650, torch.Generator().manual_seed(650))
    for row, piece in ((4096, 2048), (64, 256)):
        cuda_shim.neftune_shim_numbering(ctypes.c_int64(row), ctypes.c_int64(piece))
        assert_same_layout(mask.shape, device, mask, place)
        assert_same_layout(mask.shape, device, mask > 0)
        assert_same_layout(mask.shape, device, position_ids=place)


if __name__ == "__main__":
    standard_cases()
