"""The sdist and the wheels of one state are the same bytes, built in another folder, at another
time, under another umask, in another order of files.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from test_install import ROOT, run

import setup

CODE = "from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
PLACES = {  # a build each: all that must not matter
    "one": {"umask": 0o022, "zone": "UTC", "year": 2001},
    "another/and/deeper": {"umask": 0o077, "zone": "Asia/Tokyo", "year": 2031},
}


def tracked_files():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout: which files are the project's is not known")
    names = run("git", "ls-files", folder=ROOT).splitlines()
    return [name for name in names if (ROOT / name).exists()]


def copy(folder, how):
    """The project's files, written in that order and dated to that year."""
    names = tracked_files()
    for name in names if how["year"] == 2001 else reversed(names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        is_executable = os.access(ROOT / name, os.X_OK)
        target.chmod((0o777 if is_executable else 0o666) & ~how["umask"])
        seconds = (how["year"] - 1970) * 31_556_952
        os.utime(target, (seconds, seconds))


def built(folder, what, how, **environment):
    """The name and the bytes of what was built."""
    copy(folder, how)
    own = {"TZ": how["zone"], "PYTHONHASHSEED": str(how["year"]), "NEFTUNE_BUILD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(what=what)],
        cwd=folder,
        env={**os.environ, **own, **environment},
        umask=how["umask"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (folder / "dist").iterdir()
    return file.name, file.read_bytes()


def built_everywhere(tmp_path, what, **environment):
    first, second = (
        built(tmp_path / place, what, how, **environment) for place, how in PLACES.items()
    )
    return first, second


def test_sdist(tmp_path):
    first, second = built_everywhere(tmp_path, "sdist")
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first[1])) as archive:
        files = archive.getmembers()
    assert {one.mtime for one in files} == {setup.OLDEST_DATE} and len(files) > 300
    assert {(one.uid, one.gid, one.uname, one.gname) for one in files} == {(0, 0, "", "")}
    assert {one.name.partition("/")[2] for one in files if one.mode == 0o755} == {".ci/run"}


def test_wheel_for_every_machine(tmp_path):
    first, second = built_everywhere(tmp_path, "wheel", NEFTUNE_BUILD_CPP="pure")
    assert first == second
    with zipfile.ZipFile(io.BytesIO(first[1])) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {one.date_time for one in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert names[-1].endswith(".dist-info/RECORD") and "neftune_kernels/py.typed" in names


@pytest.mark.long
def test_wheel_with_the_kernel(tmp_path):
    """Nor does the library know where its sources lay."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    first, second = built_everywhere(tmp_path, "wheel", NEFTUNE_BUILD_CPP="1")
    assert first == second
    with zipfile.ZipFile(io.BytesIO(first[1])) as archive:
        library = archive.read("neftune_kernels/_C.abi3.so")
    assert b"libtorch_cpu.so" in library and os.fsencode(tmp_path) not in library


def test_date_is_what_was_asked_for(tmp_path):
    how = PLACES["one"]
    _, content = built(
        tmp_path, "wheel", how, NEFTUNE_BUILD_CPP="pure", SOURCE_DATE_EPOCH="1700000000"
    )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {one.date_time for one in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


@pytest.mark.parametrize("said, date", [("0", setup.OLDEST_DATE), ("1700000000", 1700000000)])
def test_a_date(monkeypatch, said, date):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", said)
    assert setup.source_date() == date


@pytest.mark.parametrize("said", ["", "yesterday", "-1", "1.5"])
def test_a_date_that_is_none(monkeypatch, said):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", said)
    with pytest.raises(ValueError, match="SOURCE_DATE_EPOCH must be whole seconds"):
        setup.source_date()
