"""Builds the C++ CPU kernel as neftune_kernels/_C*.so and the CUDA kernels as _C_cuda*.so; all else
is declared in pyproject.toml.

The package works without the libraries, so a failure here never fails an install: the reason is
printed and kept in _build_error.txt or _build_error_cuda.txt beside the package, which `python -m
neftune_kernels` shows.

    NEFTUNE_BUILD_CPP=0             skips the C++ kernel
    NEFTUNE_BUILD_CUDA=auto|0|1     the CUDA kernels: where a toolkit is found, never, or with an
                                    error for what is missing
    NEFTUNE_CUDA_ARCHS=80,90        fewer architectures than the usual, for a quick build
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

CSRC = pathlib.Path("csrc")
CUDA_SOURCES = ("kernels.cu", "gradients.cu")
CUDA_EXTENSION = "neftune_kernels._C_cuda"
TORCH_TARGET_VERSION = (
    "0x020a000000000000"  # 2.10, the first with everything used here in its stable ABI
)
# Contracting x·step + e into an FMA would round once where the specification rounds twice.
COMPILE_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
# One file per instruction set, the choice is made at run time: never -march=native, nor -mfma.
# g++ 12 takes the intrinsics' deliberately undefined operands for mistakes.
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
SIMD_FLAGS = {
    "rows_avx512bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "rows_avx512.cpp": AVX512_FLAGS,
    "rows_avx2.cpp": ["-mavx2", "-mf16c"],
}
# The CUDA kernels: machine code for each, and PTX of the first and the last for whatever lies
# between and beyond.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-ffp-contract=off",
    "-Xfatbin",
    "-compress-all",
]
X86, ARM = ["rows_avx512bf16.cpp", "rows_avx512.cpp", "rows_avx2.cpp"], ["rows_neon.cpp"]
SIMD_SOURCES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


def torch_folder() -> pathlib.Path:
    """The installed torch, found without importing it; in an isolated build sysconfig still names
    the interpreter's own site-packages.
    """
    paths = sysconfig.get_paths()
    for site in (paths["purelib"], paths["platlib"], *sys.path):
        folder = pathlib.Path(site, "torch")
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    raise RuntimeError(
        f"no headers of torch >= 2.10 in {paths['purelib']}: install torch first, then this "
        f"package again"
    )


def run_compiler(command: list[str], **kwargs: Any) -> None:
    """Runs a compiler command, its message in the error: that is what _build_error.txt shows."""
    print(*command, flush=True)
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=kwargs.get("env")
        )
    except OSError as error:
        raise ExecError(f"{command[0]}: {error}") from None
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise ExecError(
            f"{command[0]} failed with exit code {done.returncode}\n{done.stderr.strip()}"
        )


class BuildKernel(build_ext):  # type: ignore[misc]
    """build_ext with torch's headers and each source's own flags, which leaves its reason behind
    when it fails.
    """

    def run(self) -> None:
        super().run()
        if not self.inplace:
            return
        # setuptools has copied the library beside the sources; the reason follows, and no library
        # of an older state stays.
        for extension in self.extensions:
            built = pathlib.Path(
                self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name))
            )
            library = pathlib.Path(self.get_ext_fullpath(extension.name))
            reason(library).unlink(missing_ok=True)
            if reason(built).exists():
                library.unlink(missing_ok=True)
                shutil.copyfile(reason(built), reason(library))

    def build_extension(self, ext: Extension) -> None:
        library = pathlib.Path(self.get_ext_fullpath(ext.name))
        reason(library).unlink(missing_ok=True)
        cuda = ext.name == CUDA_EXTENSION
        switch, wanted = (
            "NEFTUNE_BUILD_CUDA" if cuda else "NEFTUNE_BUILD_CPP",
            build_cuda() if cuda else os.environ.get("NEFTUNE_BUILD_CPP"),
        )
        try:
            if wanted == "0":
                raise RuntimeError(f"skipped by {switch}=0")
            self.configure(ext)
            if cuda:
                self.compile_cuda(ext)
            super().build_extension(ext)
        except Exception as error:
            library.unlink(missing_ok=True)
            if cuda and wanted == "1":
                raise RuntimeError(
                    f"NEFTUNE_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}"
                ) from error
            library.parent.mkdir(parents=True, exist_ok=True)
            reason(library).write_text(f"{error}\n")
            if cuda:
                print(f"\nneftune_kernels: no CUDA C++ kernels. Reason: {error}\n", file=sys.stderr)
            else:
                print(
                    f"\nneftune_kernels: NO C++ KERNEL, the slow reference backend will serve the "
                    f"CPU. Reason: {error}\n",
                    file=sys.stderr,
                )

    def compile_cuda(self, ext: Extension) -> None:
        """The kernels by nvcc; the rest, with the CUDA runtime linked in, is an extension like the
        other.
        """
        if sys.platform != "linux":
            raise RuntimeError(f"the CUDA kernels are built on Linux, not on {sys.platform}")
        toolkit = find_toolkit()
        flags = [*NVCC_FLAGS, *arch_flags(toolkit), "--threads", "0"]
        objects = []
        for name in CUDA_SOURCES:
            target = pathlib.Path(self.build_temp, f"{name}.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            files = ["-c", CSRC / "cuda" / name, "-o", target]
            run_compiler([str(part) for part in (toolkit.nvcc, *flags, *files)])
            objects.append(str(target))
        ext.extra_objects = [*objects, str(toolkit.runtime)]

    def configure(self, ext: Extension) -> None:
        compiler: Any = self.compiler
        if compiler.compiler_type != "unix":
            raise RuntimeError(
                f"the C++ kernel is built with g++ or clang++, not with {compiler.compiler_type}"
            )
        torch = torch_folder()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        compile_one = compiler._compile

        def compile_with_flags(
            obj: str,
            src: str,
            suffix: str,
            cc_args: list[str],
            postargs: list[str],
            pp_opts: list[str],
        ) -> None:
            compile_one(
                obj,
                src,
                suffix,
                cc_args,
                [*postargs, *SIMD_FLAGS.get(pathlib.Path(src).name, [])],
                pp_opts,
            )

        compiler._compile = compile_with_flags
        compiler.spawn = compiler.call = (
            run_compiler  # setuptools calls the one or, since 84, the other
        )


def reason(library: pathlib.Path) -> pathlib.Path:
    return library.with_name(
        "_build_error_cuda.txt" if library.name.startswith("_C_cuda") else "_build_error.txt"
    )


def build_cuda() -> str:
    wanted = os.environ.get("NEFTUNE_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"NEFTUNE_BUILD_CUDA must be 0, 1 or auto, got {wanted!r}")
    return wanted


class Toolkit(NamedTuple):
    nvcc: pathlib.Path
    runtime: pathlib.Path  # libcudart_static.a


def find_toolkit() -> Toolkit:
    """The first whole CUDA toolkit: CUDA_HOME's, that of nvcc on the PATH, /usr/local/cuda, or
    PyPI's nvidia-cuda-nvcc and companions.
    """
    roots = [
        pathlib.Path(os.environ[name])
        for name in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    if not roots:
        if found := shutil.which("nvcc"):
            roots.append(pathlib.Path(found).resolve().parent.parent)
        roots.append(pathlib.Path("/usr/local/cuda"))
        roots += [
            folder
            for site in (sysconfig.get_paths()["purelib"], *sys.path)
            for folder in sorted(pathlib.Path(site).glob("nvidia/cu1*"))
        ]
    complaints = []
    for root in dict.fromkeys(roots):
        parts = [
            "bin/nvcc",
            "nvvm/bin/cicc",
            "include/cuda_runtime.h",
            "include/cuda_bf16.h",
            "include/crt/host_config.h",
        ]
        missing = [part for part in parts if not (root / part).exists()]
        runtimes = [
            path
            for name in ("lib64", "lib")
            if (path := root / name / "libcudart_static.a").exists()
        ]
        if not missing and runtimes:
            return Toolkit(root / "bin" / "nvcc", runtimes[0])
        if root.exists():
            complaints.append(
                f"{root} lacks "
                f"{', '.join(missing + ([] if runtimes else ['lib64/libcudart_static.a']))}"
            )
    raise RuntimeError(
        "; ".join(complaints)
        or "no CUDA toolkit: no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"
    )


def arch_flags(toolkit: Toolkit) -> list[str]:
    listed = subprocess.run(
        [str(toolkit.nvcc), "--list-gpu-code"], capture_output=True, text=True
    ).stdout.split()
    asked = os.environ.get("NEFTUNE_CUDA_ARCHS")
    archs = (
        [arch.strip() for arch in asked.split(",")]
        if asked
        else [arch for arch in CUDA_ARCHS if f"sm_{arch}" in listed]
    )
    if unknown := [arch for arch in archs if f"sm_{arch}" not in listed]:
        raise RuntimeError(
            f"NEFTUNE_CUDA_ARCHS: {toolkit.nvcc} knows no {', '.join(unknown)}, but "
            f"{', '.join(listed)}"
        )
    code = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        part
        for flags in (
            *code,
            *(f"arch=compute_{a},code=compute_{a}" for a in {archs[0]: 0, archs[-1]: 0}),
        )
        for part in ("-gencode", flags)
    ]


def kernel() -> Extension:
    names = [
        "ops.cpp",
        "dispatch.cpp",
        "gradients.cpp",
        "rows_scalar.cpp",
        *SIMD_SOURCES.get(platform.machine().lower(), []),
    ]
    return Extension(
        "neftune_kernels._C",
        [str(CSRC / "cpu" / name) for name in names],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=COMPILE_FLAGS,
        libraries=["torch_cpu"],  # loaded long before; no run path
        language="c++",
        py_limited_api=True,  # no Python in it at all
        optional=True,
        depends=[
            "setup.py",
            *(str(path) for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cpu/*")])),
        ],
    )


def cuda_kernels() -> Extension:
    return Extension(
        CUDA_EXTENSION,
        [str(CSRC / "cuda" / "ops.cpp")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=COMPILE_FLAGS,
        libraries=["torch_cpu", "dl", "rt", "pthread"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],  # the CUDA runtime's symbols are nobody else's
        language="c++",
        py_limited_api=True,
        optional=True,
        depends=[
            "setup.py",
            *(str(path) for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*")])),
        ],
    )


if __name__ == "__main__":
    setup(
        ext_modules=[kernel(), cuda_kernels()],
        cmdclass={"build_ext": BuildKernel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
