"""README and docs/ as a reader meets them: their code runs, their links lead somewhere, the README
is short, and the table of messages is whole.
"""

import ast
import pathlib
import re

import pytest
import torch

import neftune_kernels
from neftune_kernels import doctor

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MESSAGES = ROOT / "docs" / "is-my-noise-on.md"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.M | re.S)
INCLUDED = re.compile(r'^--8<-- "(.*?)"$', re.M)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]+)?\)(?!`)")


def blocks(page):
    return [code for code in BLOCK.findall(page.read_text()) if not INCLUDED.search(code)]


def execute(code, where, namespace):
    exec(compile(code, where, "exec"), namespace)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, threads):
    """An empty folder, and the generators as they were."""
    monkeypatch.chdir(tmp_path)
    threads(1)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# ---- what is written runs


def snippets():
    """The README's blocks; the one of `handle.check` goes with the first."""
    found = blocks(README)
    (check,) = [code for code in found if "handle.check" in code]
    found.remove(check)
    return found, check


@pytest.mark.parametrize("number", range(4))
def test_readme_snippets_run_alone(number, elsewhere):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found, check = snippets()
    assert len(found) == 4 and all(len(code.splitlines()) <= 12 for code in found)
    assert len(check.splitlines()) == 3
    namespace = {}
    execute(found[number], f"README.md, snippet {number + 1}", namespace)
    if number == 0:
        execute(check, "README.md, handle.check", namespace)


FOREIGN = ("tools", "ways")  # pages of single tools, whose code needs those: other tests run it
NEEDS = {"peft": "peft", "trainer": "accelerate", "migration": "accelerate"}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page) and page.parent.name not in FOREIGN],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_pages_run(page, elsewhere):
    """A page's blocks, in their order, in one namespace."""
    pytest.importorskip("transformers")
    for name, package in NEEDS.items():
        if page.name.startswith(name):
            pytest.importorskip(package)
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page)):
        execute(code, f"{page.name}, block {number + 1}", namespace)


def test_included_files_are_run_by_tests():
    """By tests/test_examples.py, several processes by test_programs_of_several_processes there."""
    included = {pathlib.Path(name) for page in PAGES for name in INCLUDED.findall(page.read_text())}
    programs = {path.stem for path in included if path.suffix == ".py"}
    tests = (ROOT / "tests" / "test_examples.py").read_text()
    assert programs and all(f'"{name}"' in tests for name in programs)


# ---- links


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    """Relative ones; make docs looks at their anchors, too."""
    for target, _ in LINK.findall(re.sub(r"`[^`\n]*`", "", page.read_text())):
        assert (page.parent / target).exists(), f"{page.name} links {target}"
    for name in INCLUDED.findall(page.read_text()):
        assert (ROOT / name.split(":")[0]).is_file(), f"{page.name} includes {name}"


def test_tests_that_are_named_are_there():
    named = re.compile(r"\[`(test_\w+)`\]\(([^)]+)\)")
    found = [(page, *pair) for page in [README, *PAGES] for pair in named.findall(page.read_text())]
    assert len(found) > 5
    for page, name, target in found:
        assert f"def {name}(" in (page.parent / target).read_text(), f"{page.name}: {name}"


# ---- what people look for


def test_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", text, re.M)[1] == neftune_kernels.__version__


# ---- the README


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 140 and len(text.split()) <= 1000
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads == [
        "Install",
        "Which API is mine",
        "Is my noise on?",
        "Guaranteed",
        "Figures",
        "Two commands",
        "Limits",
        "Citation",
    ]
    promises = re.findall(r"^- (.*)$", text.split("## Guaranteed")[1].split("##")[0], re.M)
    assert len(promises) == 8
    for promise in promises:
        words = re.sub(r"\]\([^)]*\)", "]", promise).split()
        assert "](" in promise and len(words) <= 15, promise
    assert "free of cost" not in text


def test_readme_totals_are_the_sweeps():
    text = README.read_text()
    results = ROOT / "bench" / "results"
    zoo = dict(re.findall(r"^\| ([A-Z ]+) \| (\d+) \|$", (results / "zoo.md").read_text(), re.M))
    counts = {word: int(count) for word, count in zoo.items()}
    judged, exact = sum(counts.values()), counts.pop("EXACT")
    led = counts.pop("WARNED") + counts.pop("REFUSED")
    assert not any(counts.values()), counts  # neither crash nor silent wrong noise
    assert f"{exact} of {judged} types exact at once, {led} after a true message" in text
    foreign = (results / "foreign.md").read_text()
    (line,) = re.findall(r"^[A-Z ]+: \d+(?:; [A-Z ]+: \d+)*\.$", foreign, re.M)
    counts = {word: int(count) for word, count in re.findall(r"([A-Z][A-Z ]*): (\d+)", line)}
    led, exact = counts.pop("REFUSED") + counts.pop("WARNED", 0), counts.pop("EXACT")
    assert not counts, counts
    assert f"of {led + exact} models of other packages {exact} exact at once, {led} after" in text


def test_readme_figures_are_the_benchmarks():
    """Every line of the table, under its own heads, from bench/results/compare.md."""
    benchmark = (ROOT / "bench/results/compare.md").read_text()
    part = benchmark.split("## Ragged batches, by the shapes of models")[1].split("\n## ")[0]
    rows, results = (
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines()
            if "|" in line
        ]
        for text in (README.read_text().split("## Figures")[1].split("\n## ")[0], part)
    )
    heads = [
        head.replace("`", "").replace("compiled HF hook", "HF hook, compiled") for head in rows[0]
    ]
    lines = [dict(zip(results[0], one, strict=True)) for one in results[2:]]
    expected = [
        [f"{one['shape']} {one['dtype']}", *(one[head] for head in heads[1:])] for one in lines
    ]
    assert len(rows) == 10 and rows[2:] == expected


def test_assurance_is_of_the_results():
    """Every sweep's row has the date, and where it names sources or a commit of a benchmark those,
    of the file that the sweep wrote; every file has a row.
    """
    page = (ROOT / "docs/assurance.md").read_text()
    rows = re.findall(
        r"^\| `make (\S+)` \| .*\(\.\./(bench/results/\S+\.md)\)\) \| (\S+) \| (.*) \|$", page, re.M
    )
    assert len(rows) == 10
    for command, file, date, of in rows:
        text = (ROOT / file).read_text()
        assert date in text, (command, date)
        for sources in re.findall(r"\b[0-9a-f]{12}\b", of):
            assert sources in text, (command, sources)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, re.M) for command, *_ in rows)


# ---- the messages

# Strings of four words and more that tell a user nothing that is wrong: what they are
NO_MESSAGES = {
    "schemas of operators": r"^[(….]?.*(Tensor|SymInt)\b.*[()=]|^(…|\(…), (str|\*)",
    "help of commands": "compare every backend present|^neftune-run \\[|^In every Python process|"
    "^of trainings whose own|^exit with … where",
    "types": r"^weakref\.",
    "words of reprs and lists": "^ and … more$|^chosen at the call$",
    "the report": "^(CUDA C\\+\\+ kernels: …|neftune_kernels …, Python|SIMD level|CPU threads|"
    "… on …: |  WRONG)",
    "a handle's own line": "^alpha …, replica …",
    "an AttributeError as Python's own": "^forward$",
}


def template(node):
    """A string with … for what is filled in; None where it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[\w.!]*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return None


def strings_of_python(path, least):
    """What is raised, and all strings of that many words and more but documentation."""
    tree = ast.parse(path.read_text())
    passed_by = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    raised = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for argument in node.exc.args
    }
    for node in ast.walk(tree):
        text = template(node)
        if text is None or id(node) in passed_by:
            continue
        if isinstance(node, ast.JoinedStr):
            passed_by |= {id(part) for part in ast.walk(node)} - {id(node)}
        if id(node) in raised or text.count(" ") >= least - 1:
            yield text


def strings_of_native(path):
    """What C++ hands to fail() or returns as an error."""
    text = path.read_text()
    for call in re.findall(r"fail<[^>]*>\((.*?)\);", text, re.S):
        parts = re.split(r'("(?:[^"\\]|\\.)*")', call)
        yield "".join(
            part[1:-1] if part.startswith('"') else "…" if part.strip(" ,\n+") else ""
            for part in parts
        )
    yield from re.findall(r'return "([^"]* [^"]* [^"]* [^"]*)";', text)


def messages():
    found = []
    for folder in ("neftune_kernels", "neftune_run"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            least = 99 if path.name == "doctor.py" else 4  # it speaks of other things, too
            found += [(path.name, text) for text in strings_of_python(path, least)]
    for pattern in ("*.h", "*.cpp", "*.cu"):
        for path in sorted((ROOT / "csrc").rglob(pattern)):
            found += [(path.name, text) for text in strings_of_native(path)]
    found += [("doctor.py", text) for text in (doctor.NO_PICTURE, doctor.NO_TRANSFORMERS)]
    nothing = re.compile("|".join(NO_MESSAGES.values()))
    words = re.compile(r"[a-zA-Z]{2,}")
    return [
        (where, text) for where, text in found if words.search(text) and not nothing.search(text)
    ]


def rows_of_the_table():
    """Each row's message, and what finds it."""
    text = MESSAGES.read_text().split("## Every message")[1]
    rows = {}
    for row in re.findall(r"^\| `(.*?)` \| .+ \| .+ \|$", text, re.M):
        parts = [re.escape(part) for part in row.split("…")]
        assert sum(map(len, parts)) >= 8, f"{row} would fit anything"
        rows[row] = re.compile(".*".join(parts), re.S)
    return rows


def test_every_message_has_its_row():
    rows = rows_of_the_table()
    found = messages()
    assert len(found) > 250 and len(rows) > 150
    missing = [one for one in found if not any(row.search(one[1]) for row in rows.values())]
    assert not missing, "docs/is-my-noise-on.md has no row for:\n" + "\n".join(map(str, missing))


def test_every_row_is_a_message():
    texts = [text for _, text in messages()]
    rows = rows_of_the_table().items()
    stale = [row for row, pattern in rows if not any(map(pattern.search, texts))]
    assert not stale, "no message reads so: " + "\n".join(stale)
