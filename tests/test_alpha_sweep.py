"""examples/alpha_sweep.py on a tiny random model: its statistics against scipy and by hand, what a
run is made of, and a sweep that was interrupted.
"""

import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import alpha_sweep  # noqa: E402
from parts import seed_statistics, splits, sweep_report, sweep_runs  # noqa: E402
from parts.seed_statistics import Point  # noqa: E402
from parts.sweep_runs import HOOK, NONE, OURS, Arm, Encoded, Recipe, Run, Task  # noqa: E402

PROGRAM = pathlib.Path(alpha_sweep.__file__)
NO_NOISE = Arm(NONE, 0.0)
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model, its tokenizer and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    names = ["<unk>", "<eos>", "Question", ":", "Answer", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    questions = [draw.sample(WORDS, draw.randint(2, 9)) for _ in range(30)]
    rows = [{"question": " ".join(q), "answer": " ".join(q[:2])} for q in questions]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def loaded_anew():
    """A process's one model is the test's own."""
    yield
    sweep_runs.prepare.cache_clear()


def options(tiny, out, jobs=1):
    text = "--alphas 5 --hook-alphas 5 --seeds 2 --train 12 --train-measured 8 --held-out 8 "
    text += f"--batch-size 4 --epochs 1 --evaluate-every 1 --learning-rate 0.01 --jobs {jobs}"
    places = ["--model", tiny / "model", "--data", tiny / "data.jsonl"]
    return [*text.split(), *map(str, [*places, "--output", out / "out", "--runs", out / "runs"])]


def sweep(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["alpha_sweep.py", *arguments])
    alpha_sweep.main()


def recipe_of(tiny, **changes):
    recipe = Recipe(
        model=str(tiny / "model"),
        data=str(tiny / "data.jsonl"),
        system=None,
        train=12,
        train_measured=12,
        held_out=8,
        max_length=96,
        epochs=1,
        batch_size=4,
        learning_rate=0.01,
        evaluate_every=2,
        device="cpu",
        threads=1,
    )
    return recipe._replace(**changes)


# ---- statistics


def test_student_quantiles():
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 41):
        # Both are within units in the last place of P; the flattest density, at one degree of
        # freedom, makes 500 times that of it.
        expected = stats.t.ppf(0.975, freedom)
        assert seed_statistics.student_quantile(freedom) == pytest.approx(expected, rel=1e-12)
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}  # in every table
    for freedom, value in printed.items():
        assert round(seed_statistics.student_quantile(freedom), 3) == value


def test_an_interval_by_hand():
    found = seed_statistics.interval([1.0, 2.0, 3.0])  # standard deviation 1, t = 4.302653
    assert found.mean == 2.0 and round(found.half, 6) == round(4.302653 / 3**0.5, 6)
    assert not found.excludes_zero and seed_statistics.Interval(-2.0, 1.9).excludes_zero
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        seed_statistics.interval([1.0])


def made_run(arm, seed, *losses):
    points = [Point(step, *pair) for step, pair in enumerate(losses, start=1)]
    return Run(arm, seed, points, 0.0, 1.0, 1.0)


def made_sweep(tiny):
    """Three seeds that differ far more than the arms do, their runs in no order."""
    noisy = Arm(OURS, 5.0)
    runs = []
    for seed, (base, more) in enumerate([(3.0, 0.11), (2.0, 0.1), (5.0, 0.12)]):
        runs.append(made_run(NO_NOISE, seed, (4.0, base + 1), (1.0, base), (0.25, base + 2)))
        runs.append(made_run(noisy, seed, (4.0, base + 1), (2.0, base - more), (0.5, base + 1)))
    random.Random(0).shuffle(runs)
    return sweep_report.Sweep(runs, recipe_of(tiny), 3, "the command"), noisy


def test_differences_are_paired_by_seed(tiny):
    stats = pytest.importorskip("scipy.stats")
    made, noisy = made_sweep(tiny)
    assert [run.seed for run in made.of(noisy)] == [0, 1, 2]
    values = sweep_report.paired(made, noisy, NO_NOISE, "best held-out loss")
    assert values == pytest.approx([-0.11, -0.1, -0.12], rel=1e-13)  # differences of numbers < 8
    found = seed_statistics.interval(values)
    low, high = stats.ttest_rel(
        [3.0 - 0.11, 2.0 - 0.1, 5.0 - 0.12], [3.0, 2.0, 5.0]
    ).confidence_interval()
    # values carry 1e-15 of rounding, their standard deviation is 1e-2
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), 1e-11)
    assert found.excludes_zero  # unpaired, the seeds would hide it
    losses = sweep_report.paired(made, noisy, NO_NOISE, "training loss at the end")
    assert losses == [0.25, 0.25, 0.25]


def test_held_out_loss_at_a_training_loss():
    points = [Point(1, 4.0, 3.0), Point(2, 1.0, 2.0), Point(3, 0.25, 4.0)]
    at = seed_statistics.held_out_at
    assert at(points, 4.0) == 3.0 and at(points, 1.0) == 2.0 and at(points, 0.25) == 4.0
    assert at(points, 2.0) == pytest.approx(2.5, rel=1e-15)  # the middle of 4 and 1, in logarithms
    assert at(points, 0.5) == pytest.approx(3.0, rel=1e-15)
    assert at(points, 5.0) is None and at(points, 0.2) is None
    again = [*points, Point(4, 2.0, 9.0), Point(5, 0.5, 9.0)]
    assert at(again, 0.5) == pytest.approx(3.0, rel=1e-15)  # where it first falls to it


def test_difference_at_equal_training_loss():
    further = [Point(1, 4.0, 3.0), Point(2, 1.0, 2.0), Point(3, 0.25, 4.0)]
    slower = [Point(1, 4.0, 3.0), Point(2, 2.0, 2.0), Point(3, 0.5, 2.0)]
    at_equal = seed_statistics.differences_at_equal_training_loss
    assert at_equal(slower, further) == pytest.approx(-1.0, rel=1e-15)  # at 0.5: 2 and 3
    assert at_equal(further, slower) == pytest.approx(1.0, rel=1e-15)
    assert at_equal(further, [Point(1, 6.0, 3.0), Point(2, 5.0, 3.0)]) is None


def test_the_tables(tiny, tmp_path):
    made, _ = made_sweep(tiny)
    sweep_report.write_report(tmp_path / "out", made)
    text = (tmp_path / "out.md").read_text()
    # best: 3, 2, 5 and 2.89, 1.9, 4.88. t = 4.302653 with standard deviations 1.52753 and 1.51771
    assert "| no noise | 0.000 | 3.333 ± 3.795 | 2 to 2 | 0.250 ± 0.000 |" in text
    assert "| ours, alpha 5 | 0.000 | 3.223 ± 3.770 | 2 to 2 | 0.500 ± 0.000 |" in text
    # at equal training loss, 0.5: base + 1 in each arm
    cells = "-0.110 ± 0.025 * | +0.250 ± 0.000 * | +0.000 ± 0.000"
    assert f"| ours, alpha 5 − no noise | {cells} |" in text
    assert "excludes 0: 2 of 3. Without any effect 0.1 of 3 would" in text
    assert "`the command`." in text and "3 of 3 seeds" in text
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 18 and set(rows[0]) == set(sweep_report.COLUMNS)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# ---- splits


def test_near_duplicates_stay_together():
    questions = [
        "What is government?",
        "Who are you",
        "What is a government",
        "who are you?",
        "Why",
    ]
    groups = splits.groups_of_near_duplicates(questions)
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4]]
    # a chain: the ends are not alike
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    chain = [letters[i : i + 20] for i in (0, 4, 8)]
    assert len(splits.groups_of_near_duplicates(chain)) == 1
    assert len(splits.groups_of_near_duplicates(chain[::2])) == 2


def test_splits_by_groups():
    groups = [[i, i + 1, i + 2] for i in range(0, 60, 3)] + [[i] for i in range(60, 100)]
    drawn = [splits.split_by_groups(groups, 50, 30, seed) for seed in range(20)]
    for split in drawn:
        assert len(set(split.train)) == 50 and len(set(split.held_out)) == 30
        for group in groups:
            assert not (set(group) & set(split.train) and set(group) & set(split.held_out))
    assert drawn[0] == splits.split_by_groups(groups, 50, 30, 0)
    assert len({tuple(split.held_out) for split in drawn}) == 20
    with pytest.raises(SystemExit, match=r"90 training pairs and 30 held-out .* the data has 100"):
        splits.split_by_groups(groups, 90, 30, 0)


# ---- one run


class Counting(nn.Module):
    """Predicts after each id the next number, by a logit of 100."""

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        logits = 100.0 * nn.functional.one_hot(input_ids + 1, 30).float()
        self.kept = logits_to_keep.tolist()
        return type("Output", (), {"logits": logits[:, logits_to_keep]})


def test_the_loss_is_of_the_answers():
    # prompts that it predicts wrongly, answers that it predicts
    rows = [Encoded([9, 3], [4, 5, 6]), Encoded([9, 9, 9, 2, 7, 1], [2, 3]), Encoded([8], [9])]
    batch = sweep_runs.make_batch(rows, "cpu")
    assert batch.attention_mask.sum(1).tolist() == [5, 8, 2]
    assert batch.input_ids[2].tolist() == [8, 9, 0, 0, 0, 0, 0, 0]
    model = Counting()
    loss, tokens = sweep_runs.summed_loss(model, batch)
    assert (float(loss), tokens) == (0.0, 6) and model.kept == [0, 1, 2, 3, 5, 6]
    rows[1] = Encoded([9, 9, 9, 2, 7, 1], [2, 4])
    loss, tokens = sweep_runs.summed_loss(model, sweep_runs.make_batch(rows, "cpu"))
    assert (float(loss), tokens) == (100.0, 6)
    # over tokens, not over batches
    many = rows * (sweep_runs.EVALUATION_BATCH // 2)
    assert sweep_runs.mean_loss(model, many, "cpu") == 100.0 / 6
    assert model.training


def test_batches_are_the_seeds():
    rows = [Encoded([i], [i + 1] * (i % 3 + 1)) for i in range(10)]
    recipe = Recipe._make([None] * len(Recipe._fields))
    recipe = recipe._replace(epochs=2, batch_size=4, device="cpu")

    def firsts(seed):
        batches = sweep_runs.training_batches(recipe, rows, seed)
        return [batch.input_ids[:, 0].tolist() for batch in batches]

    assert firsts(0) == firsts(0) != firsts(1)
    one, other, *second = firsts(0)
    assert len(second) == 2 and len({*one, *other}) == 8 and [one, other] != second


def test_noise_of_the_arms(tiny):
    """ours counts real tokens, transformers' hook the padding, too."""
    runs = {
        arm: sweep_runs.train(Task(recipe_of(tiny), arm, 0))
        for arm in (NO_NOISE, Arm(OURS, 5.0), Arm(OURS, 10.0), Arm(HOOK, 5.0))
    }
    ratios = {arm: run.noise_to_embedding for arm, run in runs.items()}
    assert ratios[NO_NOISE] == 0 < ratios[Arm(HOOK, 5.0)] < ratios[Arm(OURS, 5.0)]
    # twice the alpha and the same draws, beside embeddings that three steps of 0.01 have moved
    assert 1.5 < ratios[Arm(OURS, 10.0)] / ratios[Arm(OURS, 5.0)] < 2.5
    assert [point.step for point in runs[NO_NOISE].points] == [2, 3]
    again = sweep_runs.train(Task(recipe_of(tiny), Arm(OURS, 5.0), 0))
    assert again.points == runs[Arm(OURS, 5.0)].points != runs[NO_NOISE].points
    model = sweep_runs.prepare(recipe_of(tiny)).model
    assert not model.get_input_embeddings()._forward_hooks  # a run leaves the next one nothing


def test_an_evaluation_with_noise_is_an_error(tiny, monkeypatch):
    def always(model, arm):
        model.get_input_embeddings().register_forward_hook(lambda *seen: seen[2] + 0.5)

    monkeypatch.setattr(sweep_runs, "turn_on", always)
    with pytest.raises(RuntimeError, match="an evaluation had noise"):
        sweep_runs.train(Task(recipe_of(tiny), Arm(OURS, 5.0), 0))


def test_what_a_run_is_known_by(tiny):
    task = Task(recipe_of(tiny), Arm(OURS, 5.0), 0)
    others = [
        task._replace(seed=1),
        task._replace(arm=Arm(HOOK, 5.0)),
        task._replace(recipe=recipe_of(tiny, epochs=2)),
    ]
    assert len({task.key, *(other.key for other in others)}) == 4
    assert task.key == Task(recipe_of(tiny), Arm(OURS, 5.0), 0).key


# ---- the program


def results(folder):
    """All but the last lines, which say when and how long."""
    text = (folder / "out.md").read_text().split("on average:")[0]
    return (folder / "out.csv").read_text(), text


def test_an_interrupted_sweep_goes_on(tiny, tmp_path, monkeypatch):
    whole, halted = (tmp_path / name for name in ("whole", "halted"))
    monkeypatch.setattr(sweep_report, "draw", lambda path, made: path.touch())
    sweep(monkeypatch, options(tiny, whole))
    assert len((whole / "runs").read_text().splitlines()) == 6
    assert len((whole / "out.csv").read_text().splitlines()) == 1 + 6 * 3
    trained = []
    train = alpha_sweep.train

    def train_some(task):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(task)
        return train(task)

    monkeypatch.setattr(alpha_sweep, "train", train_some)
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, options(tiny, halted))
    assert not (halted / "out.md").exists()  # one seed is whole: no interval yet
    file = halted / "runs"
    torn = file.read_text()[:-20]  # killed while the fourth was being written
    file.write_text(torn)
    monkeypatch.setattr(alpha_sweep, "train", lambda task: trained.append(task) or train(task))
    sweep(monkeypatch, options(tiny, halted))
    assert len(trained) == 4 + 3 and trained[3] == trained[4]
    assert results(halted) == results(whole)
    sweep(monkeypatch, options(tiny, halted))  # nothing is left
    assert len(trained) == 4 + 3 and results(halted) == results(whole)


@pytest.mark.long
def test_a_killed_sweep_goes_on(tiny, tmp_path, monkeypatch):
    """SIGKILL, with two workers, which end with their program."""
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    killed.mkdir()
    command = [sys.executable, str(PROGRAM), *options(tiny, killed, jobs=2)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent.parent)}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (killed / "runs").exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = (killed / "runs").read_text()
    assert kept
    while session_lives(first.pid):
        time.sleep(0.05)
    subprocess.run(command, env=environment, check=True)
    assert (killed / "runs").read_text().startswith(kept)
    fresh = [sys.executable, str(PROGRAM), *options(tiny, whole, jobs=2)]
    subprocess.run(fresh, env=environment, check=True)
    assert results(killed) == results(whole)


def session_lives(session):
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("--alphas 0 5", "--alphas: each alpha once and above 0"),
        ("--hook-alphas 5 5", "--hook-alphas: each alpha once"),
        ("--alphas -1", "must be a finite number >= 0, got '-1'"),
        ("--seeds 1", "--seeds: an interval needs at least 2, got 1"),
        ("--learning-rate 0", "--learning-rate: must be above 0, got 0"),
        ("--train 4", "--batch-size: at most --train, which is 4, got 8"),
        ("--data nowhere.jsonl", "--data: no such file: nowhere.jsonl"),
    ],
)
def test_wrong_arguments(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alpha_sweep.py", *arguments.split()])
    with pytest.raises(SystemExit, match="^2$"):
        alpha_sweep.parse_arguments()
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_wrong_data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(SystemExit, match="line 2: .* every line must be an object like"):
        sweep_runs.read_pairs(str(file))
