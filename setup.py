"""Builds the C++ CPU kernel as neftune_kernels/_C*.so and the CUDA kernels as _C_cuda*.so; all else
is declared in pyproject.toml.

The package works without the libraries, so a failure here fails no install that did not ask for
them: the reason is printed and kept in _build_error.txt or _build_error_cuda.txt beside the
package, which `python -m neftune_kernels` shows.

No torch is needed: the headers of its stable ABI lie in third_party/torch, and what is linked to is
a library of the same name with those headers' functions.

    NEFTUNE_BUILD_CPP=auto|0|1|pure the C++ kernel: where it compiles, never, or with an error for
                                    what went wrong; pure: the wheel for machines of every kind
    NEFTUNE_BUILD_CUDA=auto|0|1     the CUDA kernels: for a torch with CUDA where a toolkit is
                                    found, never, or with an error for what is missing
    NEFTUNE_CUDA_ARCHS=80,90        fewer architectures than the usual, for a quick build
    SOURCE_DATE_EPOCH=seconds       the date of the files in an archive, 1980 unless said
"""

import gzip
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import ExecError

CSRC = pathlib.Path("csrc")
TORCH_INCLUDE = pathlib.Path("third_party", "torch", "include")
CUDA_SOURCES = ("kernels.cu", "gradients.cu")
CUDA_EXTENSION = "neftune_kernels._C_cuda"
BUILT_FOR = sysconfig.get_platform()  # _PYTHON_HOST_PLATFORM names another machine than this one
TORCH_TARGET_VERSION = (
    "0x020a000000000000"  # 2.10, the first with everything used here in its stable ABI
)
# Contracting x·step + e into an FMA would round once where the specification rounds twice. MSVC's
# /fp:precise contracts nothing since Visual Studio 2022: csrc/compiler.h refuses older ones.
COMPILE_FLAGS = (
    ["/O2", "/std:c++17", "/EHsc", "/fp:precise"]
    if sys.platform == "win32"
    else ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
)


def simd_flags() -> dict[str, list[str]]:
    """Each source's own. One source per instruction set, empty on other processors; the choice is
    made at run time: never -march=native, nor -mfma.
    """
    # g++ 12 takes the intrinsics' deliberately undefined operands for mistakes.
    silent = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *silent]
    flags = {
        "rows_avx512bf16.cpp": [*avx512, "-mavx512bf16"],
        "rows_avx512.cpp": avx512,
        "rows_avx2.cpp": ["-mavx2", "-mf16c"],
    }
    if sys.platform == "darwin":  # a universal build compiles every source for both processors
        return {
            name: [part for flag in own if flag not in silent for part in ("-Xarch_x86_64", flag)]
            for name, own in flags.items()
        }
    if not BUILT_FOR.endswith(("x86_64", "amd64")):
        return {}
    if sys.platform == "win32":
        return {"rows_avx512.cpp": ["/arch:AVX512"], "rows_avx2.cpp": ["/arch:AVX2"]}
    return flags


SIMD_FLAGS = simd_flags()
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


# ---- the torch that is installed: its headers are not needed, whether it has CUDA is


def installed_torch() -> pathlib.Path | None:
    """Found without importing it. An isolated build sees the torch of the environment it is for
    only where sysconfig or VIRTUAL_ENV still name that.
    """
    virtual = pathlib.Path(os.environ.get("VIRTUAL_ENV") or sys.prefix)
    paths = sysconfig.get_paths()
    sites = [
        *map(pathlib.Path, sys.path),
        *sorted(virtual.glob("lib/python*/site-packages")),
        virtual / "Lib" / "site-packages",
        pathlib.Path(paths["purelib"]),
        pathlib.Path(paths["platlib"]),
    ]
    folders = (site / "torch" for site in sites)
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def torch_without_cuda() -> str:
    """Why NEFTUNE_BUILD_CUDA=auto builds nothing; "" for a torch that has CUDA."""
    otherwise = "NEFTUNE_BUILD_CUDA=1 builds the CUDA kernels all the same"
    torch = installed_torch()
    if torch is None:
        return (
            "this build sees no torch, so not whether it has CUDA: with --no-build-isolation it "
            f"sees the one that is installed, and {otherwise}"
        )
    said = (torch / "version.py").read_text(encoding="utf-8")
    if re.search(r"^cuda\b.*= *['\"]\d", said, re.M):
        return ""
    return f"the torch in {torch.parent} has no CUDA; {otherwise}"


def functions_of_torch() -> list[str]:
    """The functions of torch's stable ABI, from its headers."""
    headers = sorted((TORCH_INCLUDE / "torch" / "csrc").rglob("shim*.h"))
    text = "".join(header.read_text(encoding="utf-8") for header in headers)
    return sorted(set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", text)))


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

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # it is no Python module, which Windows would look for in it

    def build_extension(self, ext: Extension) -> None:
        library = pathlib.Path(self.get_ext_fullpath(ext.name))
        reason(library).unlink(missing_ok=True)
        cuda = ext.name == CUDA_EXTENSION
        switch, wanted = (
            ("NEFTUNE_BUILD_CUDA", build_cuda()) if cuda else ("NEFTUNE_BUILD_CPP", build_cpp())
        )
        try:
            if build_cpp() == "pure":
                raise RuntimeError("this is the wheel for machines of every kind")
            if wanted == "0":
                raise RuntimeError(f"skipped by {switch}=0")
            if cuda and wanted == "auto" and (without := torch_without_cuda()):
                raise RuntimeError(without)
            self.configure(ext)
            if cuda:
                self.compile_cuda(ext)
            super().build_extension(ext)
        except Exception as error:
            library.unlink(missing_ok=True)
            if wanted == "1":
                kernels = "the CUDA kernels" if cuda else "the C++ kernel"
                raise RuntimeError(f"{switch}=1, but {kernels} cannot be built: {error}") from error
            library.parent.mkdir(parents=True, exist_ok=True)
            reason(library).write_text(f"{error}\n", encoding="utf-8")
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
        """What both libraries need: torch's headers, something to link to, the messages of a
        compiler, and the sources with flags of their own compiled.
        """
        compiler: Any = self.compiler
        if compiler.compiler_type == "unix":  # setuptools calls the one or, since 84, the other
            compiler.spawn = compiler.call = run_compiler
        ext.include_dirs.append(str(TORCH_INCLUDE))
        ext.library_dirs.append(str(self.link_to_torch()))
        for source in [one for one in ext.sources if pathlib.Path(one).name in SIMD_FLAGS]:
            ext.sources.remove(source)
            ext.extra_objects += compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMPILE_FLAGS, *SIMD_FLAGS[pathlib.Path(source).name]],
                depends=ext.depends,
            )

    def link_to_torch(self) -> pathlib.Path:
        """The folder of a library with the name and the functions of torch's own, which is loaded
        long before ours: there is no run path.
        """
        compiler: Any = self.compiler
        folder = pathlib.Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        if compiler.compiler_type == "msvc":
            definitions = folder / "torch_cpu.def"
            definitions.write_text(
                "\n".join(["LIBRARY torch_cpu", "EXPORTS", *functions_of_torch()])
            )
            if not compiler.initialized:
                compiler.initialize()
            library = folder / "torch_cpu.lib"
            machine = "ARM64" if BUILT_FOR.endswith("arm64") else "X64"
            made_of = ["/NOLOGO", f"/MACHINE:{machine}", f"/DEF:{definitions}"]
            compiler.spawn([compiler.lib, *made_of, f"/OUT:{library}"])
            return folder
        if sys.platform == "win32":
            raise RuntimeError(f"on Windows MSVC builds it, not {compiler.compiler_type}")
        source = folder / "torch_cpu.cpp"
        source.write_text(
            "".join(
                f'extern "C" __attribute__((visibility("default"))) void {name}() {{}}\n'
                for name in functions_of_torch()
            )
        )
        named = (
            ["-dynamiclib", "-Wl,-install_name,@rpath/libtorch_cpu.dylib"]
            if sys.platform == "darwin"
            else ["-shared", "-Wl,-soname,libtorch_cpu.so"]
        )
        library = folder / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
        run_compiler([*compiler.compiler_so_cxx, *named, str(source), "-o", str(library)])
        return folder


def wheel_command() -> type:
    """bdist_wheel, asked for here alone: who only compiles by this file's functions may lack it."""
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):  # type: ignore[misc]
        """A wheel in which no library ended is for every machine, and its name says so."""

        def run(self) -> None:
            if not self.skip_build:
                self.run_command("build")
            built = pathlib.Path(self.get_finalized_command("build").build_lib, "neftune_kernels")
            if not [*built.glob("_C*.so"), *built.glob("_C*.pyd")]:
                self.root_is_pure = True
                self.distribution.ext_modules = []
            super().run()
            settle_wheel(pathlib.Path(self.distribution.dist_files[-1][2]))

    return Wheel


# ---- the same sources give the same bytes, whoever builds, when, where and under which umask


def source_date() -> int:
    """Seconds since 1970 of every file in an archive; zip knows nothing before 1980."""
    said = os.environ.get("SOURCE_DATE_EPOCH")
    if said is None:
        return OLDEST_DATE
    if not said.isdecimal():
        raise ValueError(f"SOURCE_DATE_EPOCH must be whole seconds since 1970, got {said!r}")
    return max(int(said), OLDEST_DATE)


OLDEST_DATE = 315532800  # 1980-01-01


def mode_of(path: str, is_executable: bool) -> int:
    return 0o755 if is_executable or path.endswith("/") else 0o644


def settle_wheel(wheel: pathlib.Path) -> None:
    """Writes it again: files by name but for RECORD and its folder, which belong at the end."""
    with zipfile.ZipFile(wheel) as archive:
        files = {one: archive.read(one) for one in archive.infolist()}
    date = time.gmtime(source_date())[:6]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for old, content in sorted(files.items(), key=lambda one: in_wheel(one[0].filename)):
            new = zipfile.ZipInfo(old.filename, date)
            new.create_system = 3  # Unix, whatever this is
            mode = mode_of(old.filename, bool(old.external_attr >> 16 & 0o100))
            new.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(new, content, zipfile.ZIP_DEFLATED)


def in_wheel(name: str) -> tuple[bool, bool, str]:
    return ".dist-info/" in name, name.endswith("/RECORD"), name


class SourceArchive(sdist):  # type: ignore[misc]
    """An sdist whose files have one date, one owner and modes of ours."""

    def make_archive(self, base_name: str, format: str, *args: Any, **kwargs: Any) -> str:
        if format != "gztar":
            return str(super().make_archive(base_name, format, *args, **kwargs))
        folder = pathlib.Path(kwargs.get("base_dir") or args[1])
        archive = pathlib.Path(f"{base_name}.tar.gz")
        # no name and no date in gzip's head
        with (
            archive.open("wb") as file,
            gzip.GzipFile("", "wb", mtime=source_date(), fileobj=file) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted(folder.rglob("*"), key=lambda one: one.as_posix()):
                if path.is_file():
                    one = tarfile.TarInfo(path.as_posix())
                    one.size = path.stat().st_size
                    one.mtime = source_date()
                    one.mode = mode_of(one.name, bool(path.stat().st_mode & stat.S_IXUSR))
                    with path.open("rb") as content:
                        tar.addfile(one, content)
        return str(archive)


def reason(library: pathlib.Path) -> pathlib.Path:
    return library.with_name(
        "_build_error_cuda.txt" if library.name.startswith("_C_cuda") else "_build_error.txt"
    )


def switched(name: str, *values: str) -> str:
    wanted = os.environ.get(name) or "auto"
    if wanted not in ("auto", *values):
        raise ValueError(f"{name} must be {', '.join(values)} or auto, got {wanted!r}")
    return wanted


def build_cpp() -> str:
    return switched("NEFTUNE_BUILD_CPP", "0", "1", "pure")


def build_cuda() -> str:
    return switched("NEFTUNE_BUILD_CUDA", "0", "1")


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
        "rows_avx512bf16.cpp",
        "rows_avx512.cpp",
        "rows_avx2.cpp",
        "rows_neon.cpp",
    ]
    return Extension(
        "neftune_kernels._C",
        [str(CSRC / "cpu" / name) for name in names],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=COMPILE_FLAGS,
        libraries=["torch_cpu"],
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
        cmdclass={
            "build_ext": BuildKernel,
            "bdist_wheel": wheel_command(),
            "sdist": SourceArchive,
        },
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
