"""Every example runs, its noise is the paper's noise on the real tokens of every training batch,
and nothing is left on the model.
"""

import importlib.util
import math
import os
import pathlib
import runpy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
accelerate_state = pytest.importorskip("accelerate.state")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NAMES = ("accelerate_loop", "compute_loss", "cuda_graph", "lightning_module", "trainer")
NEEDS = {"lightning_module": "pytorch_lightning", "compute_loss": "peft"}
HIDDEN = 48


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


@pytest.fixture(autouse=True)
def own_accelerate_state():
    """accelerate remembers device and precision for the whole process."""
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_state.GradientState._reset_state()


def load(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def embedded():
    """(in training, ids, noise that the module added) of every lookup of an nn.Embedding."""
    seen = []

    def record(module, args, output):
        if isinstance(module, nn.Embedding):
            seen.append(
                (
                    module.training,
                    args[0].clone(),
                    output.detach() - F.embedding(args[0], module.weight.detach()),
                )
            )

    hook = nn.modules.module.register_module_forward_hook(record)
    yield seen
    hook.remove()


def check_noise(noise, mask, alpha):
    """Real tokens have noise up to alpha/√(L·d) of their own row, padding has none."""
    assert torch.equal(noise.abs().sum(-1) > 0, (mask == 1) & (alpha > 0))
    bound = alpha / (mask.sum(1).float() * HIDDEN).sqrt()
    largest = noise.abs().amax((1, 2))
    assert torch.all(largest <= bound + 2**-20), (
        largest,
        bound,
    )  # the difference of two float32 sums carries their rounding
    assert torch.all(largest >= 0.85 * bound), (
        largest,
        bound,
    )  # the largest of at least 4·48 draws


def check_clean(model):
    for module in model.modules():
        assert (
            not hasattr(type(module), "_neftune_base")
            and "_neftune" not in module.__dict__
            and "forward" not in module.__dict__
        )
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not any("neftune" in type(hook).__module__ for hook in hooks)
    ids = torch.arange(8)[None]
    model.train()
    assert torch.equal(
        model(ids, attention_mask=torch.ones_like(ids)).logits, model.eval()(ids).logits
    )


def masks_of(module, rows, seed=1, batch=8):
    data = module.make_data(rows, seed)
    masks = torch.stack([row["attention_mask"] for row in data])
    assert 4 <= masks.sum(1).min() < masks.sum(1).max() <= module.LONGEST
    return masks.split(batch)


def same_weights(one, other):
    return all(
        torch.equal(left, right)
        for left, right in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_a_script(name, capsys, monkeypatch):
    load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "loss" in capsys.readouterr().out
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f".venv/bin/python examples/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help(path, capsys, monkeypatch):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {path.name} [-h]") and len(said.splitlines()) > 6


def test_accelerate_loop(embedded, capsys):
    example = load("accelerate_loop")
    result = example.main()
    masks = masks_of(example, 8 * example.OPTIMIZER_STEPS * example.ACCUMULATED)
    assert len(embedded) == len(masks) == 24
    for index, ((training, _, noise), mask) in enumerate(zip(embedded, masks, strict=True)):
        assert training
        check_noise(
            noise, mask, 5.0 * (1 - (index // 2) / 12)
        )  # both batches of a step have the step's alpha
    assert result["alphas"] == [5.0 + (0.0 - 5.0) * (step / 12) for step in range(12)]
    assert result["stats"]["calls"] == 24 and result["stats"]["length_max"] == int(
        masks[-1].sum(1).max()
    )
    assert (
        all(map(math.isfinite, result["losses"]))
        and result["losses"][-1] < result["losses"][0] - 0.2
    )
    check_clean(result["model"])
    assert "24 forwards had noise" in capsys.readouterr().out
    assert same_weights(result["model"], example.main()["model"])
    assert not same_weights(result["model"], example.main(noise_alpha=0.0)["model"])


def test_lightning_module(embedded, capsys):
    example = load("lightning_module")
    result = example.main()
    masks = masks_of(example, 8 * example.STEPS)
    trained = [noise for training, _, noise in embedded if training]
    validated = [noise for training, _, noise in embedded if not training]
    assert (
        len(trained) == len(masks) == 20 and len(validated) == 4
    )  # two before training as the sanity check, two after it
    for step, (noise, mask) in enumerate(zip(trained, masks, strict=True)):
        check_noise(noise, mask, 5.0 * min(step / 4, 1))
    assert all(noise.count_nonzero() == 0 for noise in validated)
    logged = result["logged"]
    lengths = masks[-1].sum(1)
    assert logged["neftune/noise_alpha"] == 5.0 and 0.9 < logged["neftune/max_noise_ratio"] < 1
    assert (logged["neftune/length_min"], logged["neftune/length_max"]) == (
        int(lengths.min()),
        int(lengths.max()),
    )
    assert logged["neftune/magnitude_max"] == pytest.approx(
        5.0 / math.sqrt(int(lengths.min()) * HIDDEN)
    )
    assert (
        logged["train_loss"] < 4.7 and logged["val_loss"] < 4.7
    )  # log(128) = 4.85 without training
    assert result["callback"].handle is None
    check_clean(result["model"])
    assert "neftune/length_min" in capsys.readouterr().out
    assert same_weights(result["model"], example.main()["model"])
    assert not same_weights(result["model"], example.main(noise_alpha=0.0)["model"])


def test_trainer(embedded, capsys):
    example = load("trainer")
    result = example.main()
    masks = masks_of(example, 8 * example.STEPS)
    seen = {tuple(mask.sum(1).tolist()) for mask in masks}
    assert len(embedded) == 2 * len(masks) == 32 and len(seen) == 16
    rows = {
        tuple(row["input_ids"].tolist()): row["attention_mask"]
        for row in example.make_data(8 * example.STEPS, 1)
    }
    for training, ids, noise in embedded:  # Trainer shuffles
        assert training
        check_noise(noise, torch.stack([rows[tuple(row)] for row in ids.tolist()]), 5.0)
    for (_, _, one), (_, _, other) in zip(embedded[:16], embedded[16:], strict=True):
        assert torch.allclose(one, other, atol=2**-20)
    assert (
        result["same"]
        and result["logged"]["neftune/calls"] == 16
        and 0.9 < result["logged"]["neftune/max_noise_ratio"] < 1
    )
    assert all(map(math.isfinite, result["losses"])) and result["losses"][-1] < result["losses"][0]
    check_clean(result["model"])
    check_clean(result["argument"])
    assert (
        sys.modules["transformers.trainer"].activate_neftune.__module__
        == "transformers.integrations.neftune"
    )
    assert "the same weights" in capsys.readouterr().out
    assert not same_weights(result["model"], example.main(noise_alpha=0.0)["model"])


def test_cuda_graph(embedded, capsys):
    """Here without a graph: the step's lines are the same."""
    example = load("cuda_graph")
    result = example.main()
    assert result["alphas"] == [10.0 + (0.0 - 10.0) * (step / 30) for step in range(30)]
    assert len(embedded) == example.STEPS == 30
    for step, (training, ids, noise) in enumerate(embedded):
        expected, mask = example.batch(step)
        assert training and torch.equal(ids, expected)
        check_noise(noise, mask, result["alphas"][step])
    assert result["losses"][-1] < 1 < result["losses"][0]
    assert "on cpu" in capsys.readouterr().out
    assert same_weights(result["model"], example.main()["model"])
    assert not same_weights(result["model"], example.main(noise_alpha=0.0)["model"])


def test_compute_loss(embedded, monkeypatch):
    example = load("compute_loss")
    added = []
    add_noise = example.add_noise

    def spy(inputs_embeds, noise_alpha, **options):
        out = add_noise(inputs_embeds, noise_alpha, **options)
        added.append((inputs_embeds, out))
        return out

    monkeypatch.setattr(example, "add_noise", spy)
    trained = example.main()
    assert len(added) == 2 * example.STEPS == 24 and len(embedded) == 24
    for (embeds, out), (_, ids, _) in zip(added, embedded, strict=True):
        assert (
            embeds.requires_grad and out.requires_grad
        )  # enable_input_require_grads reached the frozen embedding
        check_noise((out - embeds).detach(), (ids != 0).long(), 5.0)
    assert same_weights(
        trained[True].model, trained[False].model
    )  # both kinds of checkpointing recompute what ran
    for trainer in trained.values():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
        assert all(
            0 < entry["grad_norm"] < math.inf
            for entry in trainer.state.log_history
            if "grad_norm" in entry
        )
        lora = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
        assert lora and all(
            value.count_nonzero() > 0 for value in lora.values()
        )  # they begin as zeros
        frozen = trainer.model.get_input_embeddings().weight
        assert not frozen.requires_grad and frozen.grad is None
    calls = len(added)
    model = trained[True].model.eval()
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert (
        torch.equal(trained[True].compute_loss(model, batch), model(**batch).loss)
        and len(added) == calls
    )
    assert not same_weights(trained[True].model, example.main(noise_alpha=0.0)[True].model)


# ---- programs of several processes

PROGRAMS = ("data_parallel", "tensor_parallel", "sequence_parallel")


def run_programs(rank, folder):
    """All three in one pair of processes: starting them is what takes long."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        results = {name: load(name).main() for name in PROGRAMS}
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


def test_programs_of_several_processes(tmp_path):
    torch.multiprocessing.spawn(run_programs, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    losses = one["data_parallel"]["loss"], other["data_parallel"]["loss"]
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
    # DDP's mean is one gradient on both
    assert one["data_parallel"]["gradient"] == other["data_parallel"]["gradient"]
    for result in (one, other):
        for name in PROGRAMS[1:]:
            parts, whole = result[name]
            assert torch.equal(parts, whole), name
    assert torch.equal(one["tensor_parallel"][1], other["tensor_parallel"][1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_names_its_command(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    command = f".venv/bin/torchrun --nproc-per-node 2 examples/{name}.py"
    assert command in text.split('"""')[1]
