"""Builds the C++ CPU kernel as neftune_kernels/_C*.so; everything else is declared in pyproject.toml.

The package works without the library (the reference backend then serves the CPU), so a failure here never fails an install: the reason is
printed and kept in neftune_kernels/_build_error.txt, which `python -m neftune_kernels` shows. NEFTUNE_BUILD_CPP=0 skips the build.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

CSRC = pathlib.Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the first with everything used here in its stable ABI
# Contracting x·step + e into an FMA would round once where the specification rounds twice.
COMPILE_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
# One file per instruction set, the choice is made at run time: never -march=native, nor -mfma.
# g++ 12 takes the intrinsics' deliberately undefined operands for mistakes.
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SIMD_FLAGS = {
    "rows_avx512bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "rows_avx512.cpp": AVX512_FLAGS,
    "rows_avx2.cpp": ["-mavx2", "-mf16c"],
}
X86, ARM = ["rows_avx512bf16.cpp", "rows_avx512.cpp", "rows_avx2.cpp"], ["rows_neon.cpp"]
SIMD_SOURCES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


def torch_folder() -> pathlib.Path:
    """The installed torch, found without importing it; in an isolated build sysconfig still names the interpreter's own site-packages."""
    paths = sysconfig.get_paths()
    for site in (paths["purelib"], paths["platlib"], *sys.path):
        folder = pathlib.Path(site, "torch")
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    raise RuntimeError(f"no headers of torch >= 2.10 in {paths['purelib']}: install torch first, then this package again")


def run_compiler(command: list[str], **kwargs: Any) -> None:
    """Runs a compiler command, with its message in the error: that is what _build_error.txt shows."""
    print(*command, flush=True)
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=kwargs.get("env"))
    except OSError as error:
        raise ExecError(f"{command[0]}: {error}") from None
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise ExecError(f"{command[0]} failed with exit code {done.returncode}\n{done.stderr.strip()}")


class BuildKernel(build_ext):  # type: ignore[misc]
    """build_ext with torch's headers and each source's own flags, which leaves its reason behind when it fails."""

    def run(self) -> None:
        super().run()
        if not self.inplace:
            return
        # setuptools has copied the library beside the sources; the reason follows, and no library of an older state stays.
        for extension in self.extensions:
            built = pathlib.Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))
            library = pathlib.Path(self.get_ext_fullpath(extension.name))
            reason(library).unlink(missing_ok=True)
            if reason(built).exists():
                library.unlink(missing_ok=True)
                shutil.copyfile(reason(built), reason(library))

    def build_extension(self, ext: Extension) -> None:
        library = pathlib.Path(self.get_ext_fullpath(ext.name))
        reason(library).unlink(missing_ok=True)
        try:
            if os.environ.get("NEFTUNE_BUILD_CPP") == "0":
                raise RuntimeError("skipped by NEFTUNE_BUILD_CPP=0")
            self.configure(ext)
            super().build_extension(ext)
        except Exception as error:
            library.unlink(missing_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            reason(library).write_text(f"{error}\n")
            print(f"\nneftune_kernels: NO C++ KERNEL, the slow reference backend will serve the CPU. Reason: {error}\n", file=sys.stderr)

    def configure(self, ext: Extension) -> None:
        compiler: Any = self.compiler
        if compiler.compiler_type != "unix":
            raise RuntimeError(f"the C++ kernel is built with g++ or clang++, not with {compiler.compiler_type}")
        torch = torch_folder()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        compile_one = compiler._compile

        def compile_with_flags(obj: str, src: str, suffix: str, cc_args: list[str], postargs: list[str], pp_opts: list[str]) -> None:
            compile_one(obj, src, suffix, cc_args, [*postargs, *SIMD_FLAGS.get(pathlib.Path(src).name, [])], pp_opts)

        compiler._compile = compile_with_flags
        compiler.spawn = compiler.call = run_compiler  # setuptools calls the one or, since 84, the other


def reason(library: pathlib.Path) -> pathlib.Path:
    return library.with_name("_build_error.txt")


def kernel() -> Extension:
    names = ["ops.cpp", "dispatch.cpp", "rows_scalar.cpp", *SIMD_SOURCES.get(platform.machine().lower(), [])]
    return Extension(
        "neftune_kernels._C",
        [str(CSRC / "cpu" / name) for name in names],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=COMPILE_FLAGS,
        libraries=["torch_cpu"],  # loaded long before; no run path
        language="c++",
        py_limited_api=True,  # no Python in it at all
        optional=True,
        depends=["setup.py", *(str(path) for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cpu/*")]))],
    )


setup(
    ext_modules=[kernel()],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
