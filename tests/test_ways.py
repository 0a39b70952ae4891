"""What the pages of docs/ways show is what `make ways` runs; and the Lightning CLI, by a probe that
shares nothing with us. TRL's command line is in tests/test_neftune_run.py.
"""

import importlib.util
import json
import pathlib
import re
import runpy
import types

import pytest
import torch
import yaml
from torch import nn

from bench import ways
from neftune_kernels.integrations.litgpt import patch_gpt
from neftune_kernels.schedules import linear_schedule

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "docs" / "ways"


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [text for tongue, text in found if tongue == language]


SNIPPETS = {  # of docs/ways/others.md
    "torchtune": ("neftune.py",),
    "mmengine": ("neftune.py", "config.py"),
    "torchtitan": ("neftune.py",),
    "automodel": ("neftune.py", "sft.yaml"),
}


@pytest.mark.parametrize("name", ways.WAYS)
def test_a_page_shows_what_is_run(name):
    way = ways.WAYS[name]
    page = PAGES / ("others.md" if way.tool in SNIPPETS else f"{way.tool}.md")
    shown = [block for language in ("yaml", "python") for block in blocks(page, language)]
    for file in SNIPPETS.get(way.tool, (way.config,)):
        assert (ways.FILES / way.tool / file).read_text() in shown
    if way.command:
        assert f"{way.command}\n" in blocks(page, "")
    assert not way.before or way.before == way.ours or f"`{way.before}`" in page.read_text()


def test_the_launchers_page_shows_the_same_file():
    shown = blocks(ROOT / "docs" / "neftune_run.md", "yaml")
    assert (ways.FILES / "trl" / "sft.yaml").read_text() in shown


ROW = {"length": 4, "largest": 0.31, "square": 0.31**2 / 3, "padding": 0.0}


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "exact"),  # 5 / sqrt(4 * 64) = 0.3125
        ({"padding": 0.1}, "noise on padding"),
        ({"largest": 0.0, "square": 0.0}, "no noise"),
        ({"largest": 0.22, "square": 0.22**2 / 3, "padding": 0.22}, "the padded length"),
        ({"largest": 0.32}, "another noise"),
        ({"square": 0.31**2}, "another noise"),  # +-0.31, not uniform
        ({"largest": 0.6, "square": 0.36 / 3}, "another noise"),
    ],
)
def test_the_probes_words(changed, word):
    assert ways.word_for({**ROW, **changed}, columns=8, dim=64) == word


@pytest.fixture
def probed():
    """What arrives behind every lookup, as `make ways` sees it."""
    spec = importlib.util.spec_from_file_location("probe", ways.PROBE / "probe.py")
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    lines = []
    hooks = probe.watch(lines.append)
    yield lines
    for hook in hooks:
        hook.remove()


def words(lines):
    return [
        ways.word_for(row, line["columns"], line["dim"])
        for line in lines
        if line["grad"]
        for row in line["rows"]
    ]


def test_lightning_cli(probed, threads, tmp_path, monkeypatch):
    cli = pytest.importorskip("pytorch_lightning.cli").LightningCLI
    pytest.importorskip("jsonargparse")
    pytest.importorskip("transformers")
    threads(1)
    way = ways.WAYS["Lightning CLI"]
    ways.llama(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ways.texts())
    monkeypatch.chdir(tmp_path)
    program = runpy.run_path(str(ways.FILES / way.tool / "train.py"))
    for with_ours in (False, True):
        config = ways.changed(way, with_ours)
        pathlib.Path("fit.yaml").write_text(yaml.safe_dump(config))
        probed.clear()
        cli(program["CausalLM"], program["Texts"], args=["fit", "--config", "fit.yaml"])
        assert words(probed) == (["exact"] if with_ours else ["no noise"]) * 8
    (table, *_) = sorted(tmp_path.glob("lightning_logs/*/metrics.csv"))
    header = table.read_text().splitlines()[0]
    assert {"neftune/noise_alpha", "neftune/length_min", "neftune/magnitude_max"} <= set(
        header.split(",")
    )


OPTIONS = {
    "noise_alpha": 2.5,
    "model": "model",
    "log_stats": False,
    "embedding": "model.embed_tokens",
    "samples": {"attention_mask": "mask"},
    "replica": 3,
    "noise_without_grad": True,
    "distribution": "gaussian",
    "equal_variance": False,
    "backend": "reference",
    "fused": False,
    "batch_first": False,
    "embedding_multiplier": 2.0,
    "capturable": True,
}


@pytest.fixture
def parsed():
    """A callback of the Lightning CLI's parser, from its init_args."""
    jsonargparse = pytest.importorskip("jsonargparse")
    pl = pytest.importorskip("pytorch_lightning")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)

    def parse(**options):
        named = "neftune_kernels.integrations.lightning.NEFTuneCallback"
        given = {"callback": {"class_path": named, "init_args": options}}
        return parser.instantiate(parser.parse_object(given)).callback

    return parse


def test_lightning_cli_takes_every_option(parsed):
    callback = parsed(**OPTIONS)
    taken = {**vars(callback), **callback.options}
    assert {name: taken[name] for name in OPTIONS} == OPTIONS
    assert set(callback.options) < set(OPTIONS)  # an option that is new needs a value here


def test_lightning_cli_takes_a_schedule_and_a_function(parsed):
    path = "neftune_kernels.schedules.linear_schedule"
    given = {"start": 10, "end": 0, "num_steps": 4}
    callback = parsed(noise_alpha={"class_path": path, "init_args": given}, samples="json.dumps")
    expected = linear_schedule(10, 0, 4)
    assert [callback.schedule(step) for step in range(6)] == [expected(step) for step in range(6)]
    assert callback.options["samples"] is json.dumps


@pytest.mark.parametrize("wrong", [{"noise": 5}, {"noise_alpha": "much"}, {"fused": "maybe"}])
def test_lightning_cli_refuses(parsed, wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        parsed(**wrong)


def test_litgpt_models_have_noise_while_they_train(probed, capsys):
    """Its shape, in code of our own: no mask, and padding of id 0 on the right."""

    class GPT(nn.Module):
        def __init__(self, config):
            super().__init__()
            wte, block = nn.Embedding(ways.VOCABULARY, config), nn.Linear(config, config)
            self.transformer = nn.ModuleDict({"wte": wte, "h": block})

        def forward(self, idx):
            return self.transformer.h(self.transformer.wte(idx))

    module, began = types.ModuleType("litgpt.model"), []
    module.GPT = GPT
    patch_gpt(module, ways.ALPHA, lambda: began.append(True))
    model = GPT(64)
    ids = torch.tensor([[3, 4, 0, 5, 6, 1], [3, 4, 1, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert not began and capsys.readouterr().out == ""
    assert not any(row["largest"] for line in probed for row in line["rows"])
    probed.clear()
    for _ in range(2):
        model.train()(idx=ids)
    assert began == [True]
    said = capsys.readouterr().out
    assert said.startswith("noise by neftune_kernels, alpha 5, replica 0") and said.count("\n") == 1
    # the probe takes every 0 for padding; one among others is a token, with noise
    assert words(probed) == ["noise on padding", "exact", "exact"] * 2


def test_another_litgpt_is_refused():
    with pytest.raises(RuntimeError, match=r"litgpt\.model of this litgpt has no GPT"):
        patch_gpt(types.ModuleType("litgpt.model"), 5.0, print)
