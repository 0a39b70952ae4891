"""A source install with no compiler succeeds and says why there is no C++ kernel; the report runs;
the docs' examples hold.
"""

import doctest
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
import torch

import neftune_kernels
import setup
from neftune_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent


def run(*command, folder=None, **environment):
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def source_copy(folder):
    keep = shutil.ignore_patterns("*.so", "_build_error*.txt", "__pycache__")
    shutil.copytree(ROOT / "neftune_kernels", folder / "neftune_kernels", ignore=keep)
    shutil.copytree(ROOT / "neftune_run", folder / "neftune_run", ignore=keep)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "third_party", folder / "third_party", ignore=keep)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)


def install(tmp_path, **environment):
    """pip install of a source copy into a fresh environment that sees this one's torch and
    setuptools.
    """
    source, home = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    source_copy(source)
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*")) / "site-packages"
    (site / "outer.pth").write_text(str(pathlib.Path(torch.__file__).parent.parent) + "\n")
    log = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        site,
        source,
        **{"NEFTUNE_BUILD_CUDA": "0", **environment},  # tests/test_cuda_build.py builds those
    )
    return log, lambda *code: run(
        python, *code, folder=home
    )  # not here: python -m would find this checkout first


@pytest.mark.skipif(os.name != "posix", reason="the kernel is built with g++ or clang++")
def test_install_without_a_compiler(tmp_path):
    log, python = install(tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert "NO C++ KERNEL" in log
    report = python("-m", "neftune_kernels")
    assert re.search(r"cpp +not built: .*no-such-compiler", report), report
    assert "SIMD level of the C++ kernel: none" in report
    code = (
        "import torch, neftune_kernels as nk; ids = torch.tensor([[1, 2]]); weight = "
        "torch.ones(3, 4)\n"
        "print(nk.__file__); out = nk.noisy_embedding(ids, weight, 5.0, seed=1); print('moved', "
        "bool((out != 1).all()))\n"
        "nk.noisy_embedding(ids, weight, 5.0, backend='reference')\n"
        "try: nk.noisy_embedding(ids, weight, 5.0, backend='cpp')\n"
        "except ValueError as error: print('refused:', error)"
    )
    out = python("-c", code)
    assert str(tmp_path) in out and "moved True" in out
    assert out.count("UserWarning: neftune_kernels has no C++ kernel here") == 1
    assert re.search(
        "refused: backend 'cpp' is not available: not built: .*no-such-compiler", out
    ), out
    starts_nothing(tmp_path, python)


def starts_nothing(tmp_path, python):
    """What is installed runs at Python's start under neftune-run, and only then."""
    (script,) = (tmp_path / "venv").rglob("neftune-run")
    site = script.parent.parent
    assert {file.name for file in site.glob("*.pth")} == {"outer.pth"}  # ours, to find torch
    assert not list(site.glob("*customize*")) and (site / "neftune_run").exists()
    code = (
        "import sys; print([name for name in sys.modules if 'custom' in name or 'neftune' in name])"
    )
    assert python("-c", code) == "[]\n"
    reached = run(script, tmp_path / "venv" / "bin" / "python", "-c", code, PYTHONPATH=str(site))
    assert reached.startswith("['sitecustomize']\n") and "neftune-run: no noise" in reached


def test_source_distribution_is_the_whole_project(tmp_path):
    """What git has and nothing more, but for setuptools' own files: `make sdist` tests it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout: which files are the project's is not known")
    tracked = run("git", "ls-files", folder=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).exists(), tracked):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    strays = ("_C.abi3.so", "_build_error.txt", "../build/x.md", "../tests/__pycache__/x.pyc")
    for stray in (f"neftune_kernels/{name}" for name in (*strays, "../tests/x.so")):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).touch()
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run(sys.executable, "-c", code, folder=tmp_path)
    (file,) = (tmp_path / "dist").iterdir()
    with tarfile.open(file) as archive:
        names = {one.name.partition("/")[2] for one in archive if one.isfile()}
    made = {name for name in names if name.startswith("neftune_kernels.egg-info/")}
    assert names - made - {"PKG-INFO", "setup.cfg"} == set(tracked)


def test_install_with_a_compiler_builds(tmp_path):
    """Extension(optional=True) hides compile errors, so somebody has to look. The headers are the
    tree's own: in an isolated build there are no others.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    log, python = install(tmp_path, NEFTUNE_BUILD_CPP="1")
    assert "NO C++ KERNEL" not in log
    assert "third_party/torch/include" in log and "site-packages/torch" not in log
    assert re.search(r"cpp +available", python("-m", "neftune_kernels"))


# ---- setup.py's switches, and what it makes without a compiler

NO_COMPILER = {"CXX": "no-such-compiler", "CC": "no-such-compiler", "NEFTUNE_BUILD_CUDA": "0"}


def build_wheel(folder, **environment):
    """The wheel's file and what was said."""
    source_copy(folder)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | NO_COMPILER | environment,
        capture_output=True,
        text=True,
    )
    return next((folder / "dist").glob("*.whl"), None), done.stdout + done.stderr


@pytest.mark.skipif(os.name != "posix", reason="the compiler is chosen by CXX")
@pytest.mark.parametrize(
    "wanted, reason",
    [
        ("auto", "no-such-compiler"),
        ("0", "skipped by NEFTUNE_BUILD_CPP=0"),
        ("pure", "this is the wheel for machines of every kind"),
    ],
)
def test_wheel_without_a_library_is_for_every_machine(tmp_path, wanted, reason):
    wheel, said = build_wheel(tmp_path, NEFTUNE_BUILD_CPP=wanted)
    assert wheel is not None, said
    assert wheel.name.endswith("-py3-none-any.whl") and reason in said
    with zipfile.ZipFile(wheel) as archive:
        assert reason in archive.read("neftune_kernels/_build_error.txt").decode()
        (facts,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in archive.read(facts).decode()
        assert "neftune_run/site/sitecustomize.py" in archive.namelist()


@pytest.mark.skipif(os.name != "posix", reason="the compiler is chosen by CXX")
def test_a_kernel_that_was_asked_for_is_built_or_fails(tmp_path):
    wheel, said = build_wheel(tmp_path / "1", NEFTUNE_BUILD_CPP="1")
    assert wheel is None
    assert "NEFTUNE_BUILD_CPP=1, but the C++ kernel cannot be built: no-such-compiler" in said
    wheel, said = build_wheel(tmp_path / "yes", NEFTUNE_BUILD_CPP="yes")
    assert wheel is None
    assert "NEFTUNE_BUILD_CPP must be 0, 1, pure or auto, got 'yes'" in said


@pytest.mark.parametrize(
    "version, reason",
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", ""),
        ("cuda = '11.8'\n", ""),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "has no CUDA"),
        ("cuda = None\n", "has no CUDA"),
        (None, "with --no-build-isolation it sees the one that is installed"),
    ],
)
@pytest.mark.parametrize("seen_by", ["path", "VIRTUAL_ENV", "sysconfig"])
def test_cuda_kernels_are_for_a_torch_with_cuda(tmp_path, monkeypatch, version, reason, seen_by):
    site = tmp_path / "lib" / "python3" / "site-packages"
    (site / "torch").mkdir(parents=True)
    if version is not None:
        (site / "torch" / "version.py").write_text(version)
    monkeypatch.setattr(sys, "path", [str(site)] if seen_by == "path" else [])
    monkeypatch.setenv(
        "VIRTUAL_ENV", str(tmp_path if seen_by == "VIRTUAL_ENV" else tmp_path / "no")
    )
    paths = dict.fromkeys(("purelib", "platlib"), str(site if seen_by == "sysconfig" else tmp_path))
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: paths)
    said = setup.torch_without_cuda()
    assert reason in said and bool(said) == bool(reason)


# ---- the headers of torch's stable ABI


def test_headers_are_unchanged():
    """Those of the torch that third_party/torch/README.md names."""
    folder = ROOT / "third_party" / "torch"
    version = re.search(r"They are of torch ([\d.]+)\.", (folder / "README.md").read_text())[1]
    if torch.__version__.partition("+")[0] != version:
        pytest.skip(f"the headers are of torch {version}, this is {torch.__version__}")
    installed = pathlib.Path(torch.__file__).parent / "include"
    headers = sorted((folder / "include").rglob("*.h"))
    assert len(headers) > 40
    for header in headers:
        original = installed / header.relative_to(folder / "include")
        assert header.read_bytes() == original.read_bytes(), header


def test_library_asks_torch_for_nothing_but_its_stable_abi():
    """Every function that it leaves to torch is one of those that it was linked to."""
    if backends.native.handle is None or shutil.which("nm") is None:
        pytest.skip(f"no library to look at: {backends.native.reason or 'no nm'}")
    undefined = run("nm", "-D", "--undefined-only", backends.native.handle._name).split()
    asked = {name for name in undefined if "torch" in name}
    assert "torch_library_impl" in asked and asked <= set(setup.functions_of_torch())


# ---- a kernel that is missing

IDS, WEIGHT = torch.tensor([[1, 2]]), torch.ones(3, 4)


def call(weight=WEIGHT, **options):
    return neftune_kernels.noisy_embedding(IDS, weight, 5.0, seed=1, **options)


@pytest.fixture
def missing(monkeypatch):
    """Makes this process one whose library is not there, for that reason."""

    def make(reason):
        monkeypatch.setattr(backends, "native", backends.NativeLibrary(None, reason))
        monkeypatch.setattr(backends, "_warned_devices", set())
        for dtype in backends.CPP_DTYPES:
            monkeypatch.setitem(backends.CPP_SERVES, dtype, False)

    return make


@pytest.mark.parametrize("first", ["eager", "compiled"])
@pytest.mark.parametrize(
    "reason, remedy",
    [
        ("not built: g++ failed", "with a C++ compiler"),
        ("not built: this is the wheel for machines of every kind", "with a C++ compiler"),
        ("_C.abi3.so failed to load: no such symbol", "again beside this torch"),
    ],
)
def test_a_missing_kernel_warns_once(missing, recwarn, reason, remedy, first):
    """At the first call that it would serve."""
    missing(reason)
    call(WEIGHT.double())
    call(backend="reference")
    ours = "neftune_kernels has no C++ kernel here"
    assert not [one for one in recwarn if ours in str(one.message)]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    (compiled if first == "compiled" else call)()
    call()
    (said,) = [str(one.message) for one in recwarn if ours in str(one.message)]
    assert f"Reason: {reason}. Remedy: " in said and remedy in said
    assert "pip install" in said and "NEFTUNE_DISABLE_CPP=1" in said
    torch.compiler.reset()


@pytest.mark.parametrize(
    "reason", ["switched off by NEFTUNE_DISABLE_CPP=1", "not built: skipped by NEFTUNE_BUILD_CPP=0"]
)
def test_a_kernel_that_somebody_switched_off_is_quiet(missing, recwarn, reason):
    missing(reason)
    call()
    assert not [one for one in recwarn if "C++" in str(one.message)]


def test_a_missing_kernel_is_no_matter_where_the_reference_is_asked_for(
    missing, recwarn, monkeypatch
):
    missing("not built: g++ failed")
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "reference")
    call()
    assert not [one for one in recwarn if "C++" in str(one.message)]


def test_library_that_does_not_load_says_why(tmp_path):
    source_copy(tmp_path)
    (tmp_path / "neftune_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    report = run(sys.executable, "-m", "neftune_kernels", folder=tmp_path)
    assert re.search(r"cpp +_C.abi3.so failed to load: .*(too short|invalid ELF)", report), report


def test_switched_off_library_says_so():
    report = run(sys.executable, "-m", "neftune_kernels", NEFTUNE_DISABLE_CPP="1")
    assert re.search(r"cpp +switched off by NEFTUNE_DISABLE_CPP=1", report)


def test_report():
    report = run(sys.executable, "-m", "neftune_kernels")
    assert (
        f"neftune_kernels {neftune_kernels.__version__}" in report
        and f"torch {torch.__version__}" in report
    )
    assert (
        re.search(r"reference +available", report)
        and f"SIMD level of the C++ kernel: {backends.simd_level()}" in report
    )
    assert "CPU threads (torch.get_num_threads()): " in report


@pytest.mark.parametrize(
    "module",
    [
        "backends",
        "distributed",
        "functional",
        "integrations.lightning",
        "integrations.apply",
        "integrations.transformers",
        "modules",
        "schedules",
    ],
)
def test_docstring_examples(module):
    names = {**vars(neftune_kernels), "torch": torch, "nn": torch.nn}
    failed, attempted = doctest.testmod(
        importlib.import_module(f"neftune_kernels.{module}"), extraglobs=names
    )
    assert attempted > 0 and failed == 0


def test_import_is_quiet_and_light():
    """No printing, no warnings, no transformers at import."""
    heavy = "{'transformers', 'peft', 'trl', 'triton', 'lightning_utilities'}"
    code = f"import sys, neftune_kernels; assert not {heavy} & set(sys.modules), 'heavy import'"
    assert run(sys.executable, "-W", "error", "-c", code) == ""


@pytest.mark.parametrize(
    "integration, packages, extra",
    [
        ("transformers", ("transformers",), "transformers"),
        ("lightning", ("pytorch_lightning", "lightning"), "lightning"),
    ],
)
def test_an_integration_names_the_extra_it_needs(integration, packages, extra):
    listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert re.search(rf"^{extra} = \[", listed, re.M)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        f"try: import neftune_kernels.integrations.{integration}\n"
        "except ImportError as error: print(error)"
    )
    assert f"pip install 'neftune_kernels[{extra}]'" in run(sys.executable, "-c", code)
