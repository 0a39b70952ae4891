"""Does our launcher hand the driver what Triton's kernel[grid] hands it? A program of its own.

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python tests/launcher_calls.py [--spoiled]

FOLDER holds tests/fake_libcuda.c, compiled as libcuda.so.1. Triton's driver code and launcher are
its own, compiled by the installed triton. torch's CUDA side, which a CPU build lacks, is replaced
below, and CPU tensors stand for device memory. tests/test_launcher.py runs this and reads the JSON
that it prints. --spoiled swaps two integers of every launch past kernel[grid]: it has to be seen.
"""

import contextlib
import ctypes
import itertools
import json
import os
import struct
import sys

import torch

MOST_PARAMETERS = 64
STREAMS = {0: 0, 1: 0x7000}  # of each device; a call sets device 0's
PLACES = {  # the tensors' device, the current one, the stream
    "default stream": (0, 0, 0),
    "a stream": (0, 0, 0x5000),
    "not the current device": (1, 0, 0x7000),
}


# ---- what torch and the driver would know


class Launch(ctypes.Structure):  # of fake_libcuda.c
    _fields_ = [
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("count", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * MOST_PARAMETERS),
        ("bytes", (ctypes.c_uint8 * 8) * MOST_PARAMETERS),
    ]

    def described(self):
        """Everything but the parameters; those."""
        fields = ("function", "stream", "device", "shared_bytes", "attributes", "count")
        facts = {name: getattr(self, name) for name in fields}
        facts |= {"grid": tuple(self.grid), "block": tuple(self.block)}
        return facts, [bytes(self.bytes[i][: self.sizes[i]]) for i in range(self.count)]


libcuda = None


def launches():
    """All that the driver was asked to launch."""
    count = ctypes.c_int.in_dll(libcuda, "launched").value
    return (Launch * count).in_dll(libcuda, "launches")


class Current:
    device = 0


def set_device(device):
    Current.device = device if isinstance(device, int) else device.index
    libcuda.cuCtxSetCurrent(ctypes.c_void_p(Current.device + 1))


@contextlib.contextmanager
def current(device):
    before = Current.device
    set_device(device)
    yield
    set_device(before)


def tensor_class(index):
    """Tensors in this machine's memory that say they are on a GPU."""

    class Placed(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl
        device = property(lambda self: torch.device("cuda", index))

        def get_device(self):
            return index

        def item(self):
            raise AssertionError("the host waits for a value of the device")

    return Placed


PLACED = [tensor_class(index) for index in (0, 1)]


def replace_torch_cuda():
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: Current.device
    torch.cuda.set_device = set_device
    torch.cuda.device = current
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = STREAMS.__getitem__
    on_cpu = torch.empty

    def empty(*shape, device="cpu", **arguments):
        made = on_cpu(*shape, **arguments)
        device = torch.device(device)
        return made if device.type == "cpu" else made.as_subclass(PLACED[device.index])

    torch.empty = empty


# ---- the calls: each twice with the same key, and with nothing else the same


def filled(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def lengths_layout(shape, second, dtype=torch.int64, step=1):
    rows = shape[0]
    return {
        "lengths": filled((rows * 3,), dtype)[:: step + second][:rows]
        if step > 1
        else filled((rows,), dtype)
    }


def cu_seqlens_layout(shape, second, dtype=torch.int64):
    return {"cu_seqlens": filled((9 if second else 4,), dtype)}


def numbering_layout(shape, second):
    rows, tokens = shape[0], shape[0] * shape[1]
    return {"numbering": filled((4 * rows + 3 * tokens,), torch.int32)}


def documents_layout(shape, second):
    tokens = shape[0] * shape[1]
    return {
        "document": filled(tokens, torch.int64),
        "position": filled(tokens, torch.int64),
        **lengths_layout(shape, second),
    }


def positions_layout(shape, second, dtype=torch.int64):
    return {"position": filled(shape[0] * shape[1], dtype), **lengths_layout(shape, second)}


def embeds(
    dtype=torch.bfloat16,
    d=64,
    shapes=((2, 3), (16, 48)),
    ids=None,
    weight=None,
    layout=None,
    scales=(1.0, 1.0),
    capturable=False,
):
    """A lookup: (kernels, on, second) -> None, where on(tensor) lies on the device of the call."""

    def call(kernels, on, second):
        shape, vocabulary = shapes[second], 16 if second else 11
        input_ids = ids(shape) if ids else filled(shape, torch.int64)
        rows = weight(vocabulary + second, dtype) if weight else filled((vocabulary, d), dtype)
        given = {
            name: on(tensor) for name, tensor in (layout(shape, second) if layout else {}).items()
        }
        alpha = torch.tensor(-0.25 if second else 5.0, dtype=torch.float64)
        kernels.noisy_embedding_out(
            on(input_ids),
            on(rows),
            on(filled((), torch.int64)),
            on(alpha) if capturable else alpha,
            **given,
            replica=2**32 - 1 if second else 0,
            sample_offset=2**40 if second else 1,
            position_offset=2**31 if second else 16,
            embed_scale=scales[second],
            out=on(filled((*input_ids.shape, rows.shape[1]), dtype)),
        )

    return call


def adds(dtype, layout=None, in_place=False):
    """Noise on given embeddings."""

    def call(kernels, on, second):
        shape = (16, 48) if second else (2, 3)
        embeddings = on(filled((*shape, 64), dtype))
        given = {
            name: on(tensor) for name, tensor in (layout(shape, second) if layout else {}).items()
        }
        kernels.add_noise_out(
            embeddings,
            on(filled((), torch.int64)),
            torch.tensor(7.0 if second else 5.0, dtype=torch.float64),
            **given,
            replica=3 * second,
            sample_offset=-1 if second else 0,
            position_offset=1 if second else 0,
            out=embeddings if in_place else on(filled((*shape, 64), dtype)),
        )

    return call


def numbers(mask=None, positions=None, shapes=((2, 3), (16, 48))):
    """Documents numbered from a mask, position ids or both."""

    def call(kernels, on, second):
        shape = shapes[second]
        given = [on(make(shape)) if make else None for make in (mask, positions)]
        kernels.mask_layout(*given)

    return call


def pads(ids_dtype):
    def call(kernels, on, second):
        kernels.padding_layout(
            on(filled((16, 48) if second else (2, 3), ids_dtype)), 5 if second else 0
        )

    return call


def gradient(kernels, on, second):
    """The weight's, its tokens in several groups of chunks."""
    from neftune_kernels import triton_gradients

    tokens, vocabulary = 2100 + 1000 * second, 16 if second else 11
    triton_gradients.embedding_gradient_out(
        on(filled((tokens, 64), torch.bfloat16)),
        on(filled((tokens,), torch.int64)),
        3 * second,
        -0.25 if second else 1.5,
        False,
        out=on(filled((vocabulary, 64), torch.bfloat16)),
    )


def of(dtype):
    return lambda shape: filled(shape, dtype)


def transposed(dtype):
    return lambda shape: filled(shape[::-1], dtype).T


def expanded(shape):
    return filled((1, shape[1]), torch.int64).expand(shape)


def part(width, first, last):
    """Some columns of a wider matrix."""
    return lambda vocabulary, dtype: filled((vocabulary, width), dtype)[:, first:last]


def calls():
    bfloat16, dtypes = torch.bfloat16, (torch.float32, torch.bfloat16, torch.float16)
    made = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        made[f"{name}, nothing given"] = embeds(dtype)
        made[f"{name}, d = 20, lengths, scaled"] = embeds(
            dtype, 20, layout=lengths_layout, scales=(1.5, 64.0)
        )
        made[f"{name}, added in place, documents"] = adds(dtype, documents_layout, in_place=True)
    for first, second in (((1, 1), (7, 9)), ((16, 32), (1, 2)), ((5, 1), (131071, 3))):
        made[f"{first[0]} rows of {first[1]}, then {second[0]} of {second[1]}"] = embeds(
            d=8, shapes=(first, second)
        )
    for shape in ((), (6,), (2, 3, 4)):
        made[f"ids of rank {len(shape)}"] = embeds(
            ids=lambda _, shape=shape: filled(shape, torch.int64)
        )
    return made | {
        "ids int32": embeds(ids=of(torch.int32)),
        "ids transposed": embeds(ids=transposed(torch.int64)),
        "ids permuted, rank 3": embeds(
            ids=lambda shape: filled((3, *shape), torch.int64).permute(2, 0, 1)
        ),
        "weight transposed": embeds(
            weight=lambda vocabulary, dtype: filled((40, 32), dtype).T[: vocabulary + 1]
        ),
        "weight's rows apart, aligned": embeds(weight=part(48, 8, 24)),
        "weight's rows apart, not aligned": embeds(weight=part(48, 1, 17)),
        "lengths int32": embeds(layout=lambda *given: lengths_layout(*given, dtype=torch.int32)),
        "lengths strided": embeds(layout=lambda *given: lengths_layout(*given, step=2)),
        "cu_seqlens int64": embeds(layout=cu_seqlens_layout),
        "cu_seqlens int32, scaled": embeds(
            layout=lambda *given: cu_seqlens_layout(*given, torch.int32), scales=(0.5, -3.0)
        ),
        "documents": embeds(layout=documents_layout),
        "numbering": embeds(layout=numbering_layout),
        "positions int32 beside lengths": embeds(
            layout=lambda *given: positions_layout(*given, torch.int32)
        ),
        "alpha on the device": embeds(capturable=True),
        "alpha on the device, lengths, scaled": embeds(
            layout=lengths_layout, scales=(2.0, 1.5), capturable=True
        ),
        "alpha on the device, numbering": embeds(layout=numbering_layout, capturable=True),
        "added": adds(bfloat16),
        "added, lengths": adds(bfloat16, lengths_layout),
        "mask bool": numbers(of(torch.bool)),
        "mask int64": numbers(of(torch.int64)),
        "mask int64, rows in pieces": numbers(of(torch.int64), shapes=((2, 65), (3, 200))),
        "mask float32, transposed": numbers(transposed(torch.float32)),
        "position_ids expanded": numbers(positions=expanded),
        "mask uint8 and position_ids int32": numbers(of(torch.uint8), of(torch.int32)),
        "gradient": gradient,
        "padding_idx": pads(torch.int64),
        "padding_idx, ids int32": pads(torch.int32),
    }


def launched_at(kernels, alphas, capturable, layout):
    """What a captured lookup would hold: its launches at each alpha, all else in its place."""
    shape, on = (2, 3), lambda tensor: tensor.as_subclass(PLACED[0])
    ids, rows = filled(shape, torch.int64), filled((11, 64), torch.bfloat16)
    seed, alpha, out = (
        filled((), torch.int64),
        filled((), torch.float64),
        filled((2, 3, 64), rows.dtype),
    )
    given = {name: on(tensor) for name, tensor in layout(shape, False).items()}

    def call():
        first = len(launches())
        taken = on(alpha) if capturable else alpha
        kernels.noisy_embedding_out(on(ids), on(rows), on(seed), taken, **given, out=on(out))
        return [one.described() for one in launches()[first:]]

    call()  # compiles
    found = []
    for value in alphas:
        alpha.fill_(value)
        found.append(call())
    return found


def alphas_in_launches(kernels):
    """By who reads alpha: whether launches at different alphas are the same, byte for byte."""
    layouts = {"nothing": lambda *_: {}, "lengths": lengths_layout, "numbering": numbering_layout}
    set_device(0)
    return {
        f"{'device' if capturable else 'host'}, {name}": all(
            one == found[0] and len(one) == 1 for one in found
        )
        for capturable, (name, layout) in itertools.product((True, False), layouts.items())
        if (found := launched_at(kernels, (5.0, 0.0, 7.0), capturable, layout))
    }


# ---- the comparison


def encoded(value, size):
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, float):
        return struct.pack("<f", value)
    return (value % 2 ** (8 * size)).to_bytes(size, "little")


def differences(launcher, ours, theirs, index, grid, args):
    """In words: of the two launches; and of ours and what was given."""
    (facts, values), (expected_facts, expected_values) = ours.described(), theirs.described()
    for name, value in facts.items():
        if value != expected_facts[name]:
            yield f"{name}: {value}, kernel[grid] {expected_facts[name]}"
    runtime = [
        (parameter.name, value)
        for parameter, value in zip(launcher.kernel.params, args, strict=True)
        if not parameter.is_constexpr and value is not None
    ]
    if len(values) < len(runtime):
        yield f"{len(values)} parameters for {len(runtime)} arguments"
    names = [name for name, _ in runtime] + [
        f"scratch {i}" for i in range(len(values) - len(runtime))
    ]
    for name, value, expected in zip(names, values, expected_values, strict=False):
        if value != expected:
            yield f"{name}: {value.hex()}, kernel[grid] {expected.hex()}"
    for (name, given), value in zip(runtime, values, strict=False):
        if value != encoded(given, len(value)):
            yield f"{name}: {value.hex()} for {given}"
    if (facts["device"], facts["stream"], facts["grid"]) != (index, STREAMS[index], grid):
        yield f"not of the call: {facts['device']}, {facts['stream']}, {facts['grid']}"


class Swapped:
    """compiled.run with two arguments of the kernel swapped."""

    def __init__(self, run, first, second):
        self.run, self.first, self.second = run, 9 + first, 9 + second

    def __call__(self, *given):
        given = list(given)
        given[self.first], given[self.second] = given[self.second], given[self.first]
        self.run(*given)


def spoil(launcher):
    names = [parameter.name for parameter in launcher.kernel.params]
    last = {"position_offset", "padding_value", "padding_idx"}.intersection(names).pop()
    first = "columns" if "columns" in names else "tokens"
    for key, (constants, run, *rest) in launcher.compiled.items():
        if not isinstance(run, Swapped):
            run = Swapped(run, names.index(first), names.index(last))
            launcher.compiled[key] = (constants, run, *rest)


def main():
    global libcuda
    # A triton of another version may link driver functions that no launch needs.
    sys.setdlopenflags(os.RTLD_LAZY)
    libcuda = ctypes.CDLL("libcuda.so.1")
    replace_torch_cuda()
    import triton

    from neftune_kernels import triton_gradients, triton_kernels

    triton_kernels.ROW_BLOCKS, triton_kernels.PIECE = (64,), 64
    recorded = []
    launch = triton_kernels.Launcher.__call__

    def recording(self, key, found, index, grid, args, num_warps):
        recorded.append((self, found, index, grid, args, num_warps))
        launch(self, key, found, index, grid, args, num_warps)

    triton_kernels.Launcher.__call__ = recording
    compared = {}
    for (name, call), (place, (index, now, stream)) in itertools.product(
        calls().items(), PLACES.items()
    ):
        set_device(now)
        STREAMS[index] = stream
        wrong = []
        compared[f"{name}; {place}"] = found = {"launches": 0, "wrong": wrong}

        def on(tensor, index=index):
            return tensor.as_subclass(PLACED[index])

        call(triton_kernels, on, False)
        if "--spoiled" in sys.argv:
            spoil(triton_kernels.launch_rows)
            spoil(triton_kernels.launch_documents)
            spoil(triton_kernels.launch_pieces)
            spoil(triton_gradients.launch_chunks)
            spoil(triton_gradients.launch_carries)
        recorded.clear()
        before = len(launches())
        call(triton_kernels, on, True)
        ours = launches()[before:]
        if Current.device != now:
            wrong.append(f"the current device is {Current.device} afterwards")
        if (
            not ours
            or len(ours) != len(recorded)
            or any(entry is None for _, entry, *_ in recorded)
        ):
            wrong.append(f"{len(ours)} launches, not all of them past kernel[grid]")
            continue
        for own, (launcher, _, device, grid, args, num_warps) in zip(
            ours, list(recorded), strict=True
        ):
            with current(device):
                options = triton_kernels.compile_options("cuda", launcher.registers)
                launcher.kernel[grid](*args, num_warps=num_warps, **options)
            wrong.extend(differences(launcher, own, launches()[-1], device, grid, args))
            found["launches"] += 1
    same = {} if "--spoiled" in sys.argv else alphas_in_launches(triton_kernels)
    print(json.dumps({"triton": triton.__version__, "calls": compared, "alphas": same}))


if __name__ == "__main__":
    main()
