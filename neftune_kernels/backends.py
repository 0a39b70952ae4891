"""The backends: what is loaded, why something is not, which one serves, and its fast entries.

"reference" and "cpp" serve CPUs, "triton" and "cuda" GPUs; "reference" serves every device.
"""

import ctypes
import importlib
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_gradients, ops, reference_ops, self_check
from . import layout as layouts
from .noise import Offsets
from .torch_internals import asked_outside_the_graph, dispatch_modes, entry

OPS = torch.ops.neftune_kernels
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*CPP_DTYPES, torch.float64)
WRONG_DEVICE = "wrong device"
DEFAULT_BACKEND = os.environ.get("NEFTUNE_BACKEND") or None  # for who cannot reach the code


# ---- the native libraries


class NativeLibrary(NamedTuple):
    handle: ctypes.CDLL | None
    reason: str  # "" when loaded


def load_library(name: str, switch: str, log: str, unfit: str = "") -> NativeLibrary:
    """The library `name` beside the package, unless the environment's `switch` is 1 or this torch
    is `unfit` for it.
    """
    if os.environ.get(switch) == "1":
        return NativeLibrary(None, f"switched off by {switch}=1")
    folder = pathlib.Path(__file__).parent
    paths = sorted(
        path
        for suffix in ("so", "pyd")
        for path in (*folder.glob(f"{name}.{suffix}"), *folder.glob(f"{name}.*.{suffix}"))
    )
    if not paths:
        reason = (
            (folder / log).read_text().strip()
            if (folder / log).exists()
            else "no library beside the package"
        )
        return NativeLibrary(None, f"not built: {reason}")
    if unfit:
        return NativeLibrary(None, unfit)
    try:
        return NativeLibrary(
            ctypes.CDLL(str(paths[0])), ""
        )  # its static initialisers register the kernels
    except OSError as error:
        return NativeLibrary(None, f"{paths[0].name} failed to load: {error}")


def unfit_for_cuda() -> str:
    if torch.version.cuda is not None:
        return ""
    return f"built, but not loaded: this torch ({torch.__version__}) has no CUDA"


native = load_library("_C", "NEFTUNE_DISABLE_CPP", "_build_error.txt")
native_cuda = load_library(
    "_C_cuda", "NEFTUNE_DISABLE_CUDA", "_build_error_cuda.txt", unfit_for_cuda()
)
SWITCHED_OFF = ("switched off by", "not built: skipped")  # the reasons that somebody wanted
CPP_SERVES = dict.fromkeys(CPP_DTYPES, not native.reason and DEFAULT_BACKEND in (None, "cpp"))


def simd_level() -> str:
    """The instruction set the C++ kernel uses on this machine ("avx512", "avx2", "neon", "scalar"),
    or "none" without the library.
    """
    if native.handle is None:
        return "none"
    native.handle.neftune_kernels_simd_level.restype = ctypes.c_char_p
    return str(native.handle.neftune_kernels_simd_level().decode())


@asked_outside_the_graph
def _no_simd_level() -> str:
    """Why the loaded library serves no call: NEFTUNE_SIMD named what is not there; else ""."""
    if native.handle is None or simd_level() != "none":
        return ""
    name = os.environ.get("NEFTUNE_SIMD")
    return f"NEFTUNE_SIMD={name} is not an instruction set of this CPU and build"


# ---- an accelerator's first call


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(value for value in args if value is not None)


def compared(
    name: str, serve: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """`serve`, and from its first wrong bit on `otherwise`; while tracing the operator itself."""
    operator = getattr(OPS, f"cuda_{name}")

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args, **kwargs)
        device = first_tensor(args).device
        done = ("cuda", device.type, name)
        if self_check.failure("cuda", device.type):
            return otherwise(*args, **kwargs)
        if done in self_check.passed or not self_check.wanted(device):
            return serve(*args, **kwargs)
        expected = expected_rows(name, args) if kwargs else None
        served = serve(*args, **kwargs)
        if not kwargs:
            mask, places = mask_of_padding(*args) if "padding" in name else args
            layout = layouts.Layout(numbering=served) if isinstance(served, Tensor) else served
            agrees = self_check.numbering_agrees("cuda", mask, places, layout)
        elif expected is None:
            return served
        else:
            agrees = self_check.rows_agree("cuda", kwargs["out"], expected)
        if not agrees:
            return otherwise(*args, **kwargs)
        self_check.passed.add(done)
        return served

    return call


def expected_rows(name: str, args: tuple[Any, ...]) -> self_check.Expected | None:
    """What the reference has for some tokens of an `out` operator's arguments."""
    if name == "noisy_embedding":
        input_ids, weight, *drawn = args
        source, shape, scale = weight, input_ids.shape, drawn[11] if len(drawn) > 11 else 1.0
    else:
        embeds, *drawn = args
        input_ids, shape, scale = None, embeds.shape[:-1], 1.0
        source = embeds.reshape(shape.numel(), embeds.shape[-1])
    seed, noise_alpha, *rest = drawn
    layout = layouts.Layout(*rest[:5])
    offsets = Offsets(*rest[5:8])
    return self_check.expected_rows(
        source, shape, seed, noise_alpha, layout, offsets, input_ids, scale
    )


def mask_of_padding(input_ids: Tensor, padding_idx: int) -> tuple[Tensor, None]:
    """An operator's arguments on padding as those of its twin on masks."""
    return input_ids != padding_idx, None


def first_compared(name: str) -> Callable[..., Any]:
    """The CUDA operator of that name, its first call on a device compared with the reference."""
    cuda, reference = getattr(OPS, f"cuda_{name}"), getattr(OPS, f"reference_{name}")
    if "out" in cuda.overloads():
        return compared(name, entry(cuda.out), entry(reference.out))
    return compared(name, entry(cuda.default), entry(reference.default))


CUDA_MASK_LAYOUT = first_compared("mask_layout")
CUDA_PADDING_LAYOUT = first_compared("padding_layout")
CUDA_NUMBER_DOCUMENTS = first_compared("number_documents")
CUDA_NUMBER_PADDING = first_compared("number_padding")
ops.OUT["cuda_noisy_embedding"] = first_compared("noisy_embedding")
ops.OUT["cuda_add_noise"] = first_compared("add_noise")


# ---- the Triton kernels

TRITON_DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda too
NO_TRITON = "triton is not installed (pip install triton)"


def _no_triton() -> str:
    if os.environ.get("NEFTUNE_DISABLE_TRITON") == "1":
        return "switched off by NEFTUNE_DISABLE_TRITON=1"
    return NO_TRITON if importlib.util.find_spec("triton") is None else ""


@cache
def load_triton(module: str = "triton_kernels") -> ModuleType | str:
    """That module, imported when first needed; or the reason why there is none."""
    if reason := _no_triton():
        return reason
    try:
        return importlib.import_module(f"neftune_kernels.{module}")
    except Exception as error:  # whatever a broken or foreign triton raises
        return f"triton failed to load: {type(error).__name__}: {error}"


ALWAYS_READ = ("seed", "noise_alpha", *layouts.Layout._fields)
READ = {
    "noisy_embedding_out": ("input_ids", "weight", *ALWAYS_READ),
    "add_noise_out": ("inputs_embeds", *ALWAYS_READ),
    "embedding_gradient_out": ("grad", "input_ids"),
}


def tensors_read(launcher: str, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """What that launcher reads, by its operator's names."""
    named = zip(READ[launcher], args, strict=False)
    return {name: value for name, value in named if isinstance(value, Tensor)}


def on_gpu(
    name: str,
    otherwise: Callable[..., Any],
    cuda: Callable[..., Any] | None,
    module: str = "triton_kernels",
) -> Callable[..., Any]:
    """An operator's implementation on a GPU: the Triton launcher of that name in the module,
    without triton the CUDA library's, else the reference.
    """

    def serve(*args: Any, **kwargs: Any) -> Any:
        device_type = first_tensor(args).device.type
        kernels = load_triton(module)
        if not isinstance(kernels, str) and not self_check.failure("triton", device_type):
            served = getattr(kernels, name)(*args, **kwargs)
            if served is not NotImplemented:
                return served
        elif cuda is not None and not self_check.failure("cuda", device_type):
            return cuda(*args, **kwargs)
        return otherwise(*args, **kwargs)

    return for_any_out(name, serve, otherwise)


def for_any_out(
    name: str, serve: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """`serve`, which takes a contiguous `out` of a kernel's dtype apart from what that launcher
    reads: others it is not given, and they are written all the same.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out")
        if out is not None and out.dtype not in CPP_DTYPES:
            return otherwise(*args, **kwargs)
        if out is not None:
            reference_ops.check_apart(out, **tensors_read(name, args))
        if out is None or out.is_contiguous():
            return serve(*args, **kwargs)
        rounded = out.contiguous()
        serve(*args, out=rounded)
        out.copy_(rounded)

    return call


def register_on_gpus(
    name: str,
    launcher: str,
    otherwise: Callable[..., Any],
    cuda: Callable[..., Any] | None,
    module: str = "triton_kernels",
) -> None:
    on_cuda = on_gpu(launcher, otherwise, None if native_cuda.reason else cuda, module)
    ops.library.impl(name, on_cuda, "CUDA")
    ops.library.impl(name, on_gpu(launcher, otherwise, None, module), "XPU")


register_on_gpus(
    "noisy_embedding.out",
    "noisy_embedding_out",
    reference_ops.noisy_embedding_out,
    ops.OUT["cuda_noisy_embedding"],
)
register_on_gpus(
    "add_noise.out", "add_noise_out", reference_ops.add_noise_out, ops.OUT["cuda_add_noise"]
)
register_on_gpus("mask_layout", "mask_layout", layouts.mask_layout, CUDA_MASK_LAYOUT)
register_on_gpus(
    "padding_layout",
    "padding_layout",
    ops.padding_by_mask("reference_mask_layout"),
    CUDA_PADDING_LAYOUT,
)
register_on_gpus(
    "number_documents", "number_documents", layouts.number_documents, CUDA_NUMBER_DOCUMENTS
)
register_on_gpus(
    "number_padding",
    "number_padding",
    ops.padding_by_mask("reference_number_documents"),
    CUDA_NUMBER_PADDING,
)
register_on_gpus("untailed", "untailed", layouts.untailed, None)  # the CUDA library has none


def cuda_gradient(*args: Any, out: Tensor) -> None:
    """`cuda_embedding_gradient.out` on a GPU, for a contiguous `out`."""
    failed = self_check.failure("cuda", out.device.type)
    if failed or cuda_gradients.embedding_gradient_out(*args, out=out) is NotImplemented:
        reference_ops.embedding_gradient_out(*args, out=out)


register_on_gpus(
    "embedding_gradient.out",
    "embedding_gradient_out",
    reference_ops.embedding_gradient_out,
    cuda_gradient,
    "triton_gradients",
)
if not native_cuda.reason:
    by_cuda = for_any_out(
        "embedding_gradient_out", cuda_gradient, reference_ops.embedding_gradient_out
    )
    ops.library.impl("cuda_embedding_gradient.out", by_cuda, "CUDA")


@asked_outside_the_graph
def _triton_reason(device_type: str | None) -> str:
    """Empty where Triton can serve tensors of that device (None: of any), else why not.

    Does not import triton.
    """
    if device_type is not None and device_type not in TRITON_DEVICES:
        return f"{WRONG_DEVICE}: runs on GPUs, not on {device_type}"
    if load_triton.cache_info().currsize and isinstance(reason := load_triton(), str):
        return reason
    if reason := _no_triton() or self_check.failure("triton", device_type):
        return reason
    devices = TRITON_DEVICES if device_type is None else (device_type,)
    if not any(torch.get_device_module(name).is_available() for name in devices):
        return f"no device: torch sees no {' or '.join(devices)}"
    return ""


def past_the_dispatcher(name: str) -> Callable[..., None]:
    """The Triton launcher itself, which spares the dispatcher's way into Python; the operator where
    a mode or subclass must see it, or where memory holds the negated values: the launcher takes
    addresses. The source is the first argument or the second; no integer tensor is such a view.
    """
    operator, by_reference = ops.OUT[name], ops.OUT[f"reference_{name}"]

    def call(first: Tensor, *args: Any, out: Tensor) -> None:
        kernels = load_triton()
        lazy = first.is_neg() or args[0].is_neg()
        if isinstance(kernels, str) or type(first) is not Tensor or dispatch_modes() or lazy:
            operator(first, *args, out=out)
        elif getattr(kernels, f"{name}_out")(first, *args, out=out) is NotImplemented:
            by_reference(first, *args, out=out)

    return call


# ---- the CUDA C++ kernels


@asked_outside_the_graph
def _cuda_reason(device_type: str | None) -> str:
    """Empty where the CUDA library serves tensors of that device (None: of any), else why not."""
    if device_type not in (None, "cuda"):
        return f"{WRONG_DEVICE}: runs on GPUs, not on {device_type}"
    if reason := native_cuda.reason or self_check.failure("cuda", device_type):
        return reason
    return "" if torch.cuda.is_available() else "no device: torch sees no cuda"


# ---- the records


class Backend(NamedTuple):
    """One backend's operators, and its faster entries for eager calls without autograd."""

    name: str
    noisy_embedding: Any
    add_noise: Any
    add_variant_noise: Any
    mask_layout: Any  # a layout's three tensors per token
    padding_layout: Any
    number_documents: Any  # a layout's numbering
    number_padding: Any
    noisy_embedding_out: Callable[..., None]
    add_noise_out: Callable[..., None]


REFERENCE = Backend(
    name="reference",
    noisy_embedding=OPS.reference_noisy_embedding,
    add_noise=OPS.reference_add_noise,
    add_variant_noise=OPS.reference_add_variant_noise,
    mask_layout=OPS.reference_mask_layout,
    padding_layout=OPS.reference_padding_layout,
    number_documents=OPS.reference_number_documents,
    number_padding=OPS.reference_number_padding,
    noisy_embedding_out=ops.OUT["reference_noisy_embedding"],
    add_noise_out=ops.OUT["reference_add_noise"],
)
CPP = Backend(
    name="cpp",
    noisy_embedding=OPS.noisy_embedding,
    add_noise=OPS.add_noise,
    add_variant_noise=OPS.add_variant_noise,
    mask_layout=OPS.mask_layout,
    padding_layout=OPS.padding_layout,
    number_documents=OPS.number_documents,
    number_padding=OPS.number_padding,
    noisy_embedding_out=ops.OUT["noisy_embedding"],
    add_noise_out=ops.OUT["add_noise"],
)
number_documents = entry(OPS.number_documents.default)  # CPP's, for eager calls
TRITON = CPP._replace(  # the same operators: the dispatcher goes by the device
    name="triton",
    noisy_embedding_out=past_the_dispatcher("noisy_embedding"),
    add_noise_out=past_the_dispatcher("add_noise"),
)
CUDA = Backend(
    name="cuda",
    noisy_embedding=OPS.cuda_noisy_embedding,
    add_noise=OPS.cuda_add_noise,
    add_variant_noise=OPS.cuda_add_variant_noise,
    mask_layout=CUDA_MASK_LAYOUT,
    padding_layout=CUDA_PADDING_LAYOUT,
    number_documents=CUDA_NUMBER_DOCUMENTS,
    number_padding=CUDA_NUMBER_PADDING,
    noisy_embedding_out=ops.OUT["cuda_noisy_embedding"],
    add_noise_out=ops.OUT["cuda_add_noise"],
)
BACKENDS = {backend.name: backend for backend in (REFERENCE, CPP, TRITON, CUDA)}


def capturable(backend: Backend) -> Backend:
    """By the operators for an alpha on the device."""
    named = ("noisy_embedding", "add_noise", "add_variant_noise")
    twins = {one: f"capturable_{getattr(backend, one).__name__}" for one in named}
    return backend._replace(**{one: getattr(OPS, twin) for one, twin in twins.items()})


CAPTURABLE = {name: capturable(backend) for name, backend in BACKENDS.items()}


def available_backends(device_type: str | None = None) -> dict[str, str]:
    """Every backend's name → "available", or the reason why it is not.

    Args:
        device_type: "cpu", "cuda", ...: judge for tensors of that device; None: for any device.

    Raises:
        ValueError: torch knows no such device.

    Example:
        >>> available_backends("cpu")["reference"]
        'available'
    """
    if device_type is not None:
        try:
            device_type = torch.device(device_type).type
        except RuntimeError as error:
            raise ValueError(f"device_type: {error}") from None
    cpp = native.reason or _no_simd_level() or "available"
    if cpp == "available" and device_type not in (None, "cpu"):
        cpp = f"{WRONG_DEVICE}: runs on cpu, not on {device_type}"
    gpu = {
        "triton": _triton_reason(device_type) or "available",
        "cuda": _cuda_reason(device_type) or "available",
    }
    return {"reference": "available", "cpp": cpp, **gpu}


_warned_devices: set[str] = set()


@asked_outside_the_graph  # a compiled call says it, too
def _warn_without_cpp() -> None:
    """At the first call that it would serve; not where somebody switched it off."""
    if "cpu" in _warned_devices or native.reason.startswith(SWITCHED_OFF):
        return
    _warned_devices.add("cpu")
    again = "pip install --force-reinstall --no-deps --no-cache-dir . (in its checkout)"
    remedy = (
        "with a C++ compiler (g++, clang++, Visual Studio) install neftune_kernels again, "
        f"{again}; NEFTUNE_BUILD_CPP=1 makes that fail where the kernel cannot be built"
        if native.reason.startswith("not built: ")
        else f"install neftune_kernels again beside this torch, {again}"
    )
    warnings.warn(
        "neftune_kernels has no C++ kernel here: its reference serves the CPU, with the same bits "
        f"and many times slower. Reason: {native.reason}. Remedy: {remedy}. If that is wanted, "
        "NEFTUNE_DISABLE_CPP=1 says so",
        stacklevel=5,
    )


@cache
def _import_for(device_type: str) -> str:
    reason: str = _triton_reason(device_type)
    if not reason and isinstance(loaded := load_triton(), str):
        reason = loaded
    return reason


@asked_outside_the_graph  # not the cached function: Dynamo looks through its cache
def _triton_fails(device_type: str) -> str:
    """_triton_reason, after importing it if nothing spoke against that."""
    return self_check.failure("triton", device_type) or _import_for(device_type)


@cache
def _float64_error(device_type: str) -> str:
    """What a device of that type says to float64; "" where it computes, or where there is none."""
    module = getattr(torch, device_type, None)
    if module is not None and not module.is_available():
        return ""
    try:
        (torch.full((), 3.0, dtype=torch.float64, device=device_type).sqrt() * 2).float()
    except Exception as error:  # TypeError, RuntimeError: each device has its own words
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


@asked_outside_the_graph
def _no_float64(device_type: str) -> str:
    """Why no backend can serve a device without float64 (MPS, some of Intel's); "" with it."""
    error: str = _float64_error(device_type)
    if not error:
        return ""
    return (
        f"embeddings on {device_type} get no NEFTune noise: its magnitude alpha/√(L·d) is computed "
        f"in float64, which {device_type} does not have ({error}). Keep the embedding on the CPU "
        "and move its output, or set noise_alpha to 0"
    )


def choose_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype, with_noise: bool = True
) -> Backend:
    """The backend for tensors of this device and dtype, which are to get noise or not; ValueError
    with the reason where the one of that name cannot serve them.
    """
    if dtype not in REFERENCE_DTYPES:
        raise TypeError(f"embeddings must be float32, bfloat16, float16 or float64, got {dtype}")
    if (
        with_noise
        and device.type not in ("cpu", "cuda", "meta")
        and (reason := _no_float64(device.type))
    ):
        raise ValueError(reason)
    said_by = ""
    if backend is None and DEFAULT_BACKEND is not None:
        backend, said_by = DEFAULT_BACKEND, " (NEFTUNE_BACKEND)"
    if backend is None:
        if device.type == "cpu" or device.type == "meta":
            if not native.reason and dtype in CPP_DTYPES:
                return CPP
            if device.type == "cpu" and dtype in CPP_DTYPES:
                _warn_without_cpp()
            return REFERENCE
        if dtype not in CPP_DTYPES:
            return REFERENCE
        triton, cuda = _triton_fails(device.type), _cuda_reason(device.type)
        if not triton or not cuda:
            return CUDA if triton else TRITON
        if device.type not in _warned_devices and not torch.compiler.is_compiling():
            _warned_devices.add(device.type)
            warnings.warn(
                f"neftune_kernels has no fused kernel for {device.type} here and uses its slow "
                f"reference backend: "
                f"triton: {triton}; cuda: {cuda}",
                stacklevel=4,
            )
        return REFERENCE
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, "
            f"got {backend!r}{said_by}"
        )
    reason = available_backends(device.type)[backend]
    if backend == "triton" and reason == "available":
        reason = _triton_fails(device.type) or reason
    if reason != "available":
        move = reason.startswith(WRONG_DEVICE)
        remedy = f"; leave it out, or move the tensors from {device.type}" if move else ""
        raise ValueError(f"backend {backend!r}{said_by} is not available: {reason}{remedy}")
    if backend != "reference" and dtype not in CPP_DTYPES:
        raise ValueError(
            f"backend {backend!r}{said_by} is not available: "
            f"dtype {dtype} is served by the reference backend alone"
        )
    return BACKENDS[backend]
