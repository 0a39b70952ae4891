"""The CUDA C++ kernels without a GPU: their bodies under sanitizers, wrong kernels that
must be seen, nvcc's library, its symbols.

NEFTUNE_REQUIRE_CUDA_BUILD=1 makes a missing compiler a failure instead of a skip.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from sanitizers import COMPILERS
from test_install import run, source_copy

from setup import CUDA_SOURCES, find_toolkit

ROOT = pathlib.Path(__file__).parent.parent
UNITS = tuple(name.removesuffix(".cu") for name in CUDA_SOURCES)
TORCH = pathlib.Path(torch.__file__).parent
SHIM_FLAGS = [
    *(
        "-std=c++20",
        "-O1",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
    ),
    *(
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-Wno-unknown-pragmas",
        "-Wno-unused-const-variable",  # the shim drops __launch_bounds__ and what it names
        "-fno-omit-frame-pointer",
    ),
    *("-include", str(ROOT / "tests" / "cuda_shim.h")),
]


def skip_or_fail(reason):
    if os.environ.get("NEFTUNE_REQUIRE_CUDA_BUILD") == "1":
        pytest.fail(f"NEFTUNE_REQUIRE_CUDA_BUILD=1, but {reason}")
    pytest.skip(reason)


# ---- the kernels' bodies on the CPU


def compile_for_cpu(compiler, source, target, *options):
    flags = (*SHIM_FLAGS, *compiler.sanitizers, *options)
    run(compiler.command, *flags, "-x", "c++", "-c", source, "-o", target)


def link_for_cpu(compiler, objects, library):
    libraries = (f"-L{TORCH / 'lib'}", "-ltorch_cpu")
    run(compiler.command, "-shared", *compiler.sanitizers, *objects, *libraries, "-o", library)


@pytest.fixture(scope="module", params=list(COMPILERS))
def compiler(request):
    found = COMPILERS[request.param]
    if missing := found.missing():
        reason = f"{missing}: it does not compile the CUDA kernels' bodies"
        skip_or_fail(reason) if request.param == "g++" else pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def operators(tmp_path_factory, compiler):
    """ops.cpp compiled for the CPU."""
    target = tmp_path_factory.mktemp("shim") / "ops.o"
    compile_for_cpu(
        compiler,
        ROOT / "csrc/cuda/ops.cpp",
        target,
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        TORCH / "include",
    )
    return target


@pytest.fixture(scope="module")
def in_shim(operators, compiler):
    """Runs Python with the kernels' bodies compiled for the CPU: as they are, or with one text of
    one source replaced, from a copy of the sources in that folder.
    """

    def library(sources, target, changed, *options):
        """Linked from units that are changed and those that are not."""
        objects = [operators]
        for name in UNITS:
            objects.append((target if name in changed else operators).with_name(f"{name}.o"))
            if name in changed:
                compile_for_cpu(compiler, sources / f"cuda/{name}.cu", objects[-1], *options)
        link_for_cpu(compiler, objects, target)
        return target

    unchanged = library(ROOT / "csrc", operators.with_name("shim.so"), UNITS)

    def run_python(*command, mutation=None, folder=None):
        shim = unchanged
        if mutation is not None:
            file, old, new = mutation
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            path = folder / "csrc" / file
            text = path.read_text()
            assert old in text, f"{file} has no {old!r}"
            path.write_text(text.replace(old, new))
            changed = (path.stem,) if path.suffix == ".cu" else UNITS
            shim = library(folder / "csrc", folder / "shim.so", changed, "-Wno-error")
        variables = {"NEFTUNE_CUDA_SHIM": str(shim), "PYTHONPATH": str(ROOT)}
        return compiler.run_python(*command, cwd=ROOT, **variables)

    return run_python


LONG_ROWS = "long_rows or more_pieces or long_calls"


def passed_in(in_shim, *options):
    done = in_shim("-m", "pytest", "-q", "-p", "no:cacheprovider", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_equality_matrix_under_sanitizers(in_shim, compiler):
    """Rows of several pieces take clang++'s sanitizers three times as long as g++'s."""
    some = () if compiler.command == "g++" else ("-k", f"not ({LONG_ROWS})")
    assert passed_in(in_shim, "-m", "gpu", *some, "tests/test_cuda.py") >= 300


@pytest.mark.long
def test_long_rows_under_sanitizers(in_shim):
    assert passed_in(in_shim, "-m", "gpu", "-k", LONG_ROWS, "tests/test_cuda.py") >= 20


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["g++"], indirect=True)
def test_more_than_int32_elements_under_sanitizers(in_shim):
    assert passed_in(in_shim, "-k", "cuda", "tests/test_size.py") == 2


def test_gradients_under_sanitizers(in_shim):
    assert passed_in(in_shim, "-m", "gpu", "tests/test_cuda_gradients.py") >= 55


@pytest.mark.long
def test_cpu_matrix_under_sanitizers(in_shim):
    """Every test of the CPU's kernels against the reference, but for the errors that only a CPU
    raises.
    """
    left_out = (
        "not out_of_range and not empty_table and not no_columns and not knows_its_instruction_sets"
    )
    chosen = ("-m", "not long", "-k", left_out)
    assert passed_in(in_shim, *chosen, "tests/test_backends.py", "tests/test_numbering.py") >= 450


MUTATIONS = {
    "multiplier": ("philox.h", "0xD2511F53u", "0xD2511F57u"),
    "key step": ("philox.h", "0xBB67AE85u", "0xBB67AE87u"),
    "rounds": ("noise.h", "kPhiloxRounds = 7", "kPhiloxRounds = 6"),
    "half a step": ("noise.h", "step, step * 32768.0f", "step, step * 0.0f"),
    "halves swapped": ("noise.h", "(word & 0xFFFF0000u)), step", "(word << 16)), step"),
    "lattice": ("noise.h", "(word & 0xFFFF0000u) | 0x8000u", "(word & 0xFFFF0000u)"),
    "mask dropped": ("cuda/documents.h", "real ? number : -1", "number"),
    "documents of one row": ("cuda/documents.h", "opens &= unlike.opens(a)", "opens = 0"),
    "documents of the warps before": ("cuda/documents.h", "lane < warp ? found : 0", "0u"),
    "real token of the warps before": (
        "cuda/documents.h",
        "warps_below ? last_of[last_lane(warps_below)] : previous",
        "previous",
    ),
    "real token of the pieces before": (
        "cuda/documents.h",
        "openings(a, own, {previous, own.value[0], own.place[0]})",
        "openings(a, own, {-1, 0, 0})",
    ),
    "documents at the seams of pieces": (
        "cuda/documents.h",
        "span.opened += opens_after(a, row, span.first, before)",
        "span.opened += 0",
    ),
    "a run that goes on from the piece before": (
        "cuda/documents.h",
        "run.breaks + run.goes_on > 1",
        "run.breaks > 1",
    ),
    "distance of columns": ("cuda/documents.h", "(jump != 1) & (jump != distance)", "jump != 1"),
    "one token too many": (
        "cuda/kernels.cu",
        "+ a.position_offset >= length)",
        "+ a.position_offset > length)",
    ),
    "replica dropped": (
        "cuda/kernels.cu",
        "place.position, a.replica, noise_key",
        "place.position, 0u, noise_key",
    ),
    "sample offset dropped": (
        "cuda/kernels.cu",
        "static_cast<uint32_t>(sample) + a.sample_offset",
        "static_cast<uint32_t>(sample)",
    ),
    "position of the document": (
        "cuda/kernels.cu",
        "position = static_cast<int64_t>(token - start);",
        "position = column;",
    ),
    "scale dropped from padding": (
        "cuda/kernels.cu",
        "if (kScaled) values = Element::scaled(values, scale);",
        "",
    ),
    "blocks left over": (
        "cuda/kernels.cu",
        "block < blocks; block += lanes)",
        "block < blocks - 1; block += lanes)",
    ),
}
GRADIENTS = {
    "first row of a strip": ("sum[i] = ends ? 0.0f : sum[i]", "sum[i] = sum[i]"),
    "border of chunks": ("place + k + 1 == end || !goes", "!goes"),
    "a run that comes in": (
        "a.scratch + (2 * int64_t{chunk} + !comes)",
        "a.scratch + (2 * int64_t{chunk})",
    ),
    "padding": ("id != static_cast<Id>(a.padding_idx)", "true"),
    "order of tokens": ("source[k] * a.grad_row", "source[kAhead - 1 - k] * a.grad_row"),
    "order of the carry": ("parts[k][i])", "parts[kAhead - 1 - k][i])"),
    "parts of a group": ("other + k < stop", "other + k + 1 < stop"),
    "a run that comes into a group": ("comes && unit != opening", "comes"),
    "a run taken up twice": ("if (comes && unit != opening) return;", ""),
    "a run that leaves a group": ("if (comes || leaves)", "if (comes)"),
    "groups added at once": (
        "a.group = last ? a.units : static_cast<uint32_t>(a.chunk)",
        "a.group = a.units",
    ),
    "third launch": (
        "if (error || a.units == 1) break;",
        "if (error || a.units == 1 || last) break;",
    ),
    "counts": ("place + k + 1 - start", "place + k + 2 - start"),
    "counts of long runs": ("static_cast<Id>(id - 1), begin", "id, begin"),
    "scale": ("__fmul_rn(sum[i], a.scale)", "sum[i]"),
    "folds of chunks": ("blockIdx.y + blockIdx.z * gridDim.y", "blockIdx.y"),
}
OUTSIDE_GRADIENTS = {
    "row at the end": ("<Unsigned>(id) < static", "<Unsigned>(id) <= static"),
    "columns past a row": ("are_there = column < half", "are_there = column < half + 4"),
    "single columns past a row": ("left < kStrip ? left : kStrip)", "kStrip)"),
    "tokens past the last": ("place + k < end ? a.order", "place + k <= end ? a.order"),
    "units past the last": ("if (unit + 1 >= a.units ||", "if ("),
}
OUTSIDE = {
    "tail of a row": ("cuda/kernels.cu", "if (column + k >= a.embedding_dim) break;", ""),
    "id at the end": ("cuda/kernels.cu", "id < a.num_embeddings", "id <= a.num_embeddings"),
    "blocks past a row": (
        "cuda/kernels.cu",
        "block < blocks; block += lanes)",
        "block < blocks + 1; block += lanes)",
    ),
    "tail of a mask": (
        "cuda/documents.h",
        "column[j + 1] = min(own.column + j, last)",
        "column[j + 1] = own.column + j",
    ),
    "tail of a record": (
        "cuda/documents.h",
        "if (is_before(own.column + j, end)) tables.record",
        "tables.record",
    ),
}
QUICK = (
    "mask dropped",
    "real token of the pieces before",
    "id at the end",
    "order of the carry",
)


BY_GCC = pytest.mark.parametrize("compiler", ["g++"], indirect=True)


def names(mutations):
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in mutations
    ]


@pytest.mark.parametrize("file", ("test_cuda.py", "test_cuda_gradients.py"))
def test_standard_cases_pass(in_shim, file):
    done = in_shim(f"tests/{file}")
    assert done.returncode == 0, done.stderr[-4000:]


def assert_values_differ(done):
    """A comparison has failed, no access."""
    fails = done.returncode != 0 and "AssertionError" in done.stderr
    assert fails and "Sanitizer" not in done.stderr, done.stderr[-2000:]


@BY_GCC
@pytest.mark.parametrize("name", names(MUTATIONS))
def test_wrong_kernels_are_seen(in_shim, tmp_path, name):
    done = in_shim("tests/test_cuda.py", mutation=MUTATIONS[name], folder=tmp_path)
    assert_values_differ(done)


@BY_GCC
@pytest.mark.parametrize("name", names(GRADIENTS))
def test_wrong_gradients_are_seen(in_shim, tmp_path, name):
    mutation = "cuda/gradients.cu", *GRADIENTS[name]
    done = in_shim("tests/test_cuda_gradients.py", mutation=mutation, folder=tmp_path)
    assert_values_differ(done)


@BY_GCC
@pytest.mark.parametrize("name", names(OUTSIDE_GRADIENTS))
def test_stray_accesses_of_gradients_are_seen(in_shim, tmp_path, name):
    mutation = "cuda/gradients.cu", *OUTSIDE_GRADIENTS[name]
    done = in_shim("tests/test_cuda_gradients.py", mutation=mutation, folder=tmp_path)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, (
        done.stderr[-2000:]
    )
    assert "gradients.cu" in done.stderr, "the report names the line"


@BY_GCC
@pytest.mark.parametrize("name", names(OUTSIDE))
def test_stray_accesses_are_seen(in_shim, tmp_path, name):
    done = in_shim("tests/test_cuda.py", mutation=OUTSIDE[name], folder=tmp_path)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, (
        done.stderr[-2000:]
    )
    assert "kernels.cu" in done.stderr, "the report names the line"


def races(sources, program):
    """What ThreadSanitizer says of the kernels that this program runs: a fiber to each thread."""
    flags = (
        "-std=c++20",
        "-O1",
        "-g",
        "-w",
        "-fno-strict-aliasing",
        "-fsanitize=thread",
        "-I",
        sources,
        "-I",
        ROOT / "tests",
    )
    run("g++", *flags, ROOT / "tests" / f"{program.name}.cpp", "-o", program)
    plain_addresses = (
        ["setarch", "-R"] if shutil.which("setarch") else []
    )  # some kernels place code where the sanitizer wants its own
    return subprocess.run([*plain_addresses, str(program)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "program, file, needed",
    [
        ("cuda_races", "documents.h", "__syncthreads();"),
        ("cuda_gradient_races", "gradients.cu", "if (comes && unit != opening) return;"),
    ],
)
def test_threads_of_a_block_do_not_race(tmp_path, program, file, needed):
    if shutil.which("g++") is None:
        skip_or_fail("no g++ here: races are not looked for")
    done = races(ROOT / "csrc", tmp_path / program)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    assert needed in text
    path.write_text(text.replace(needed, "", 1))
    done = races(tmp_path / "csrc", tmp_path / program)
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr


# ---- the library for GPUs, built against whatever torch is here


@pytest.fixture(scope="module")
def toolkit():
    """setup.py's own search."""
    try:
        return find_toolkit()
    except RuntimeError as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="module")
def built(tmp_path_factory, toolkit):
    """A source copy with the CUDA library built in place, for one architecture."""
    folder = tmp_path_factory.mktemp("cuda")
    source_copy(folder)
    arguments = ("setup.py", "-q", "build_ext", "--inplace")
    run(
        sys.executable,
        *arguments,
        folder=folder,
        NEFTUNE_BUILD_CUDA="1",
        NEFTUNE_CUDA_ARCHS="90",
        NEFTUNE_BUILD_CPP="0",
    )
    (library,) = (folder / "neftune_kernels").glob("_C_cuda*.so")
    return library


def test_library_needs_the_stable_abi_alone(built):
    """Undefined: torch's C functions and versioned ones of the C and C++ runtimes; defined for
    others: none of ours or CUDA's.
    """
    undefined = [line.split() for line in run("nm", "-D", "--undefined-only", built).splitlines()]
    others = {
        name
        for *_, kind, name in undefined
        if kind == "U" and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
    }
    assert others and all(re.match(r"(aoti_)?torch_", name) for name in others), sorted(others)
    assert "torch_library_impl" in others
    defined = run("nm", "-D", "--defined-only", built)
    assert not re.search(r"cuda|neftune", defined), defined


def test_library_registers_and_is_left_alone_by_a_torch_without_cuda(built):
    """Opened by hand it registers its kernels; the package says why it does not."""
    program = (
        "import ctypes, torch, neftune_kernels as n\n"
        "print(n.available_backends()['cuda'])\n"
        f"ctypes.CDLL({str(built)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = ['noisy_embedding', 'noisy_embedding.out', 'add_noise', 'add_noise.out', "
        "'mask_layout', 'padding_layout', 'number_documents', 'number_padding', "
        "'sorted_gradient.out']\n"
        "assert all(has(f'neftune_kernels::cuda_{name}', 'CUDA') for name in names)\n"
        "ids, weight = torch.zeros(1, 2).long(), torch.ones(3, 8)\n"
        "assert n.noisy_embedding(ids, weight, 5.0, seed=1).ne(1).all()"
    )
    said = run(sys.executable, "-c", program, folder=built.parent.parent).splitlines()[0]
    if torch.version.cuda is None:
        assert said == f"built, but not loaded: this torch ({torch.__version__}) has no CUDA"
    else:
        assert said in ("available", "no device: torch sees no cuda")


def test_switched_off_says_so(built):
    report = run(
        sys.executable,
        "-m",
        "neftune_kernels",
        folder=built.parent.parent,
        NEFTUNE_DISABLE_CUDA="1",
    )
    assert "CUDA C++ kernels: switched off by NEFTUNE_DISABLE_CUDA=1" in report


@pytest.mark.parametrize("switch", ("auto", "1", "0"))
def test_build_without_a_toolkit(tmp_path, switch):
    """1 is an error naming what is missing, auto and 0 leave the reason. The torch that the build
    sees has CUDA.
    """
    source_copy(tmp_path)
    (tmp_path / "site/torch").mkdir(parents=True)
    (tmp_path / "site/torch/version.py").write_text("cuda: Optional[str] = '13.0'")
    (tmp_path / "toolkit/bin").mkdir(parents=True)
    (tmp_path / "toolkit/bin/nvcc").touch()
    environment = {
        "NEFTUNE_BUILD_CUDA": switch,
        "CUDA_HOME": str(tmp_path / "toolkit"),
        "NEFTUNE_BUILD_CPP": "0",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    missing = (
        "toolkit lacks nvvm/bin/cicc, include/cuda_runtime.h, include/cuda_bf16.h, "
        "include/crt/host_config.h, lib64/libcudart_static.a"
    )
    assert not list((tmp_path / "neftune_kernels").glob("_C_cuda*.so"))
    if switch == "1":
        assert (
            done.returncode != 0
            and "NEFTUNE_BUILD_CUDA=1, but the CUDA kernels cannot be built" in done.stderr
            and missing in done.stderr
        )
        return
    assert done.returncode == 0, done.stderr
    report = run(sys.executable, "-m", "neftune_kernels", folder=tmp_path)
    assert (
        f"CUDA C++ kernels: not built: "
        f"{'skipped by NEFTUNE_BUILD_CUDA=0' if switch == '0' else str(tmp_path)}" in report
    )


def test_source_is_hipify_clean(tmp_path):
    """torch's translator leaves no CUDA name behind; what hipcc makes of the result is not tried
    here.
    """
    from torch.utils.hipify import hipify_python

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    sources = [
        str(path) for path in (tmp_path / "csrc").glob("cuda/*") if path.suffix in (".cu", ".h")
    ]
    result = hipify_python.hipify(
        project_directory=str(tmp_path),
        output_directory=str(tmp_path),
        includes=["*"],
        extra_files=sources,
        is_pytorch_extension=True,
    )
    translated = [
        pathlib.Path(result[str(tmp_path / "csrc/cuda" / name)].hipified_path).read_text()
        for name in (*CUDA_SOURCES, "kernel.h")
    ]
    code = re.sub(r"//.*", "", "".join(translated))
    assert "hipLaunchKernelGGL" in code and "hip_bf16.h" in code and "hipGetLastError" in code
    assert not re.findall(r"\bcuda[A-Z_]\w*|<cuda\w*\.h>|__nv_\w+", code)


# ---- wheels


@pytest.fixture(scope="module")
def wheels(tmp_path_factory, toolkit):
    """The wheels with and without the CUDA part, each from the sdist, as `python -m build` makes
    them.
    """
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    source.mkdir()
    source_copy(source)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, folder=source)
    (archive,) = folder.glob("*.tar.gz")
    for name, environment in (
        ("with", {"NEFTUNE_BUILD_CUDA": "1", "NEFTUNE_CUDA_ARCHS": "80"}),
        ("without", {"NEFTUNE_BUILD_CUDA": "0"}),
    ):
        wheel = (
            "wheel",
            "--quiet",
            "--no-index",
            "--no-build-isolation",
            "--no-deps",
            "--wheel-dir",
            folder / name,
            archive,
        )
        run(sys.executable, "-m", "pip", *wheel, **environment)
    return {name: next((folder / name).glob("*.whl")) for name in ("with", "without")}


def test_wheels_are_abi3(wheels):
    for name, wheel in wheels.items():
        libraries = {path for path in zipfile.ZipFile(wheel).namelist() if path.endswith(".so")}
        assert "-cp310-abi3-linux_" in wheel.name
        assert libraries == {
            "neftune_kernels/_C.abi3.so",
            *(["neftune_kernels/_C_cuda.abi3.so"] if name == "with" else []),
        }


def other_pythons():
    """This one, and those of NEFTUNE_OTHER_PYTHONS (separated by colons), with other versions of
    torch.
    """
    others = [path for path in os.environ.get("NEFTUNE_OTHER_PYTHONS", "").split(":") if path]
    return [sys.executable, *others] if others else [sys.executable, None]


@pytest.mark.parametrize(
    "python", other_pythons(), ids=lambda path: "this" if path == sys.executable else str(path)
)
@pytest.mark.parametrize("name", ("with", "without"))
def test_wheel_works(wheels, tmp_path, python, name):
    """Both libraries open beside that torch, and the CPU's kernels give the reference's bits."""
    if python is None:
        pytest.skip("NEFTUNE_OTHER_PYTHONS names no Python with another torch")
    zipfile.ZipFile(wheels[name]).extractall(tmp_path)
    program = (
        "import torch, neftune_kernels as n\n"
        "ids, mask = torch.arange(12).reshape(2, 6) % 5, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 2, "
        "2, 3, 3, 0]])\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    weight, given = torch.randn(5, 72).to(dtype), {'attention_mask': mask, 'seed': 3, "
        "'embed_scale': 1.5}\n"
        "    outs = [n.noisy_embedding(ids, weight, 5.0, **given, backend=name) for name in "
        "('cpp', 'reference')]\n"
        "    assert torch.equal(*outs)\n"
        "print(torch.__version__, torch.version.cuda, '|', n.available_backends()['cuda'], "
        "n.backends.native_cuda.handle is not None)\n"
    )
    version, _, said = run(python, "-c", program, folder=tmp_path).strip().partition(" | ")
    if name == "without":
        assert said == "not built: skipped by NEFTUNE_BUILD_CUDA=0 False"
    elif version.endswith(" None"):
        assert "but not loaded: this torch" in said and said.endswith("has no CUDA False")
    else:
        assert said in ("available True", "no device: torch sees no cuda True")
