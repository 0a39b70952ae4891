"""The list of wrong code that the tests must see belongs to today's code."""

import pytest

pytest.importorskip("tomllib", reason="the list is read by Python 3.11 and later")

from bench import mutants


def test_every_mutant_applies():
    """Its text stands in its file exactly once, what it makes is Python, its tests are there."""
    assert len(mutants.read_list()) > 100


HERE, OTHER = "import available_backends", "import other_backends"


@pytest.mark.parametrize(
    "old, new, test, message",
    [
        ("no such text", OTHER, "test_ops.py", "holds its old text 0 times"),
        ("import", OTHER, "test_ops.py", "holds its old text [1-9][0-9]* times"),
        (HERE, HERE, "test_ops.py", "holds its old text 1 times"),
        (HERE, OTHER, "test_ops.py::test_nothing", "there is no tests/test_ops.py::"),
        (HERE, "import", "test_ops.py", "is no Python"),
    ],
)
def test_a_list_that_rots_is_seen(tmp_path, monkeypatch, old, new, test, message):
    listed = tmp_path / "mutants.toml"
    listed.write_text(
        f'[[mutant]]\nname = "m"\nfile = "neftune_kernels/__init__.py"\nold = "{old}"\n'
        f'new = "{new}"\ntests = ["tests/{test}"]\n'
    )
    monkeypatch.setattr(mutants, "LIST", listed)
    with pytest.raises(SystemExit, match=message):
        mutants.read_list()
