"""bench.compare on tiny shapes: what is timed is what it is called, and tables say what is over
what."""

import argparse

import pytest
import torch

pytest.importorskip("transformers")

from bench import calls, cases, compare, compare_tables
from bench.interleaved import Sample, time_rounds
from bench.machine import Floors

SHAPE = "tiny", "tiny", 4, 64, 64, 100


def case_of(layout, dtype=torch.float32):
    return cases.Case(*SHAPE, dtype, layout)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_fill_what_they_say(layout):
    case = case_of(layout)
    share = sum(case.lengths) / case.tokens
    expected = {cases.RAGGED: 0.7, cases.SHORT: 0.3}.get(layout, 1.0)
    assert abs(share - expected) < 4 / case.tokens
    assert max(case.lengths) == case.columns
    one = cases.make_inputs(case)[0]
    assert int(one.attention_mask.sum()) == sum(case.lengths)
    assert set(one.told) <= {"attention_mask", "cu_seqlens", "position_ids"}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
def test_providers_are_what_they_are_called(layout, dtype):
    case = case_of(layout, dtype)
    one = cases.make_inputs(case)[0]
    providers = [*cases.make_providers(case, compiled=False), *cases.floor_providers()]
    assert {provider.name: cases.check(case, provider, one) for provider in providers} == {
        provider.name: "" for provider in providers
    }


def deafened(inputs):
    return cases.ours(inputs._replace(told={}))


def louder(inputs):
    return cases.embedding(inputs) + 2 * (cases.hf_hook(inputs) - cases.embedding(inputs))


@pytest.mark.parametrize(
    ("name", "run", "kind", "wrong"),
    [
        (cases.OURS, deafened, "ours", "noise on padding"),
        (cases.OURS, cases.embedding, "ours", "differs from the reference"),
        (cases.BASE, cases.hf_hook, "plain", "differs from F.embedding"),
        (cases.HOOK, louder, "rival", "largest"),
        (cases.OFFICIAL, cases.hf_hook, "rival", "instead of"),
    ],
)
def test_another_provider_is_not_timed(name, run, kind, wrong):
    case = case_of(cases.RAGGED)
    provider = cases.Provider(name, run, kind)
    assert wrong in cases.check(case, provider, cases.make_inputs(case)[0])


@pytest.mark.parametrize("way", calls.WAYS)
def test_ways_give_the_functions_noise(way, monkeypatch):
    case = case_of(cases.RAGGED)
    one = cases.make_inputs(case)[0]
    with calls.grad_mode_of(way):
        assert calls.check_way(way, case, one) == ""
        if way in (calls.FORWARD, calls.MODULE, calls.MODEL):
            monkeypatch.setattr(cases, "ours", cases.hf_hook)
            assert calls.check_way(way, case, one) != ""


def test_rounds_are_whole_and_rotate():
    seen = {"one": [], "other": []}
    runs = {name: met.append for name, met in seen.items()}
    taken = time_rounds(runs, range(7), rounds=5, most=10.0)
    assert [len(samples) for samples in taken.values()] == [5, 5]
    assert all(set(met) == set(range(7)) for met in seen.values())


def rows_with(others):
    """Seconds of two rounds: ours takes twice and four times as long as the lookup, 3 by median."""
    job = compare.Job(compare.SHAPE, calls.FORWARD, case_of(cases.RAGGED), 1)
    taken = {
        cases.BASE: [Sample(1.0, 7.0), Sample(2.0, 7.0)],
        cases.OURS: [Sample(2.0, 9.0), Sample(8.0, 9.0)],
    }
    floors = {name: Floors(1e9, {1: 1e9}) for name in cases.DTYPES}
    described = dict.fromkeys(("simd", "commit", "date"), "x") | {"cpu": "A CPU", "machine": "m"}
    described |= {"noise_alone_float32": "1", "noise_alone_bfloat16": "1", "copy_bytes": "1e9"}
    measured = compare.Measured(job, job.way, taken, {}, others)
    return list(compare.rows_of(measured, compare.Machine(described, floors)))


def test_ratios_are_of_a_round_and_over_the_column_that_is_shown(tmp_path):
    rows = rows_with(others=0.0)
    assert [row["ratio"] for row in rows] == ["1", "3"]
    assert {row["over"] for row in rows} == {cases.BASE}
    compare.write(tmp_path / "one.csv", rows)
    machines = compare_tables.read(tmp_path)
    text = compare_tables.markdown(machines)
    (line,) = [one for one in text.splitlines() if one.startswith("| (4, 64, 64)")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["(4, 64, 64)", "float32", "A CPU, x", "1.5e+03", "3.00", "-"]
    assert cells[-3:-1] == ["7", "9"]
    assert "VOID" not in text


def test_a_disturbed_run_is_void_in_table_and_verdict():
    rows = rows_with(others=0.5)
    text = compare_tables.markdown({"one": rows})
    (line,) = [one for one in text.splitlines() if one.startswith("| (4, 64, 64)")]
    assert line.count("VOID") == 3 and "3.00" not in line
    assert compare.verdicts(rows).startswith("VOID")


def test_a_disturbed_job_is_measured_again(monkeypatch):
    job, loads = compare.Job(compare.SHAPE, "", case_of(cases.RAGGED), 1), iter((0.5, 0.2, 0.0))

    def measure(job, effort):
        yield compare.Measured(job, "", {}, {}, next(loads))

    monkeypatch.setattr(compare, "measure_calls", measure)
    (one,) = compare.undisturbed(job, compare.QUICK)
    assert one.others == 0.0
    loads = iter((0.5, 0.2, 0.3, 0.0))
    (one,) = compare.undisturbed(job, compare.QUICK)
    assert one.others == 0.3


def test_a_part_anew_keeps_the_others(tmp_path):
    rows, path = rows_with(others=0.0), tmp_path / "one.csv"
    other = [row | {"section": compare.KERNEL, "commit": "y"} for row in rows]
    compare.write(path, other + [row | {"median_ms": "1"} for row in rows])
    both = compare.with_parts_before(path, rows, [compare.SHAPE])
    assert [row["section"] for row in both] == [compare.SHAPE] * 2 + [compare.KERNEL] * 2
    assert [row["median_ms"] for row in both[:2]] == [row["median_ms"] for row in rows]
    said = compare_tables.commits(both)
    assert said == "model shapes: commit x, x; kernel alone: commit y, x"
    assert compare_tables.commits(rows) == "commit x, x"


def test_limits_are_judged():
    rows = rows_with(others=0.0)
    rows[1]["limit"] = 2.9
    assert compare.verdicts(rows) == "0 of 1 limits met"
    rows[1]["limit"] = 3.0
    assert compare.verdicts(rows) == "1 of 1 limits met"


@pytest.mark.parametrize("parts", [list(compare.SECTIONS), [compare.SHAPE], [compare.STEP]])
def test_every_part_can_be_measured_drawn_and_read_again(parts, tmp_path, monkeypatch):
    """With all other parts left out, too; nothing here looks at a time."""
    figures = pytest.importorskip("bench.figures", exc_type=ImportError)
    monkeypatch.setattr(cases, "SHAPES", {"base": SHAPE[1:]})
    monkeypatch.setattr(compare, "SWEEPS", dict.fromkeys(compare.SWEEPS, (128, 256, 512)))
    monkeypatch.setitem(compare.SWEEPS, "threads", (1,))
    monkeypatch.setattr(compare, "last_level_cache", lambda: 1)
    small = compare.training_step.SMALL | {"hidden_size": 64, "intermediate_size": 64}
    small |= {"vocab_size": 100, "num_hidden_layers": 1}
    training = compare.training_step.Training("tiny", small, False)
    monkeypatch.setattr(compare.training_step, "SMALL_LLAMA", training)
    monkeypatch.setattr(compare.training_step, "TRAININGS", [training])
    monkeypatch.setattr(compare, "QUICK", compare.Effort(2, 0.01, 1, False))
    floors = {name: Floors(1e9, {1: 1e9}) for name in cases.DTYPES}
    described = dict.fromkeys(("simd", "commit", "date"), "x") | {"cpu": "A CPU", "machine": "m"}
    described |= {"noise_alone_float32": "1", "noise_alone_bfloat16": "1", "copy_bytes": "1e9"}
    options = argparse.Namespace(only=parts, dtypes=list(cases.DTYPES), threads=1, quick=True)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            rows = compare.measure_all(options, compare.Machine(described, floors))
    finally:
        torch.set_num_threads(threads)
    assert {row["section"] for row in rows} == set(parts)
    compare.write(tmp_path / "one.csv", rows)
    machines = compare_tables.read(tmp_path)
    text = compare_tables.markdown(machines)
    assert text.count("\n## ") == len(parts)
    figures.draw(tmp_path / "picture.png", machines)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
