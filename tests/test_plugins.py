"""The plugins of axolotl and ms-swift, on stubs of what they take from these tools; `make ways`
runs them in the tools themselves.
"""

import importlib
import importlib.util
import pathlib
import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
pydantic = pytest.importorskip("pydantic")

from neftune_kernels.integrations.transformers import (  # noqa: E402
    AnnouncedCallback,
    unpatch_trainer,
)

ROOT = pathlib.Path(__file__).parent.parent
INTEGRATIONS = "neftune_kernels.integrations"


class Config(dict):
    """As axolotl's: a key that is missing is None as an attribute."""

    __getattr__ = dict.get


@pytest.fixture
def tool(monkeypatch):
    """Puts modules in place of a tool's, and imports our file for it; all is undone."""

    def load(name, **modules):
        for path, content in modules.items():
            stub = types.ModuleType(path.replace("__", "."))
            vars(stub).update(content)
            monkeypatch.setitem(sys.modules, stub.__name__, stub)
        ours = f"{INTEGRATIONS}.{name}"
        monkeypatch.delitem(sys.modules, ours, raising=False)
        module = importlib.import_module(ours)
        monkeypatch.setitem(sys.modules, ours, module)
        return module

    yield load
    unpatch_trainer()


@pytest.fixture
def axolotl(tool):
    base = {"BasePlugin": type("BasePlugin", (), {})}
    return tool("axolotl", axolotl={}, axolotl__integrations={}, axolotl__integrations__base=base)


@pytest.mark.parametrize("name", ["axolotl", "swift", "lightning"])
def test_without_the_tool_the_error_names_the_extra(name, monkeypatch):
    for missing in ("axolotl", "swift", "pytorch_lightning", "lightning"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"{INTEGRATIONS}.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'neftune_kernels\[{name}\]'"):
        importlib.import_module(f"{INTEGRATIONS}.{name}")
    assert f"\n{name} = [" in (ROOT / "pyproject.toml").read_text()


def test_swift(tool):
    known = {}
    swift = tool("swift", swift={}, swift__callbacks={"callbacks_map": known})
    assert known == {"neftune": swift.make_callback}
    activate = vars(transformers.trainer).get("activate_neftune", transformers.Trainer.train)
    assert activate.__module__ == f"{INTEGRATIONS}.transformers"
    args = types.SimpleNamespace(neftune_noise_alpha=2.5)
    callback = known["neftune"](args, None)
    assert isinstance(callback, AnnouncedCallback) and callback.noise_alpha == 2.5
    args.neftune_noise_alpha = None
    with pytest.raises(ValueError, match="no neftune_noise_alpha: set it"):
        known["neftune"](args, None)


def test_swift_refuses_its_path():
    """swift imports a plugin by its path, and would find our files in place of others'."""
    spec = importlib.util.find_spec(INTEGRATIONS)
    file = pathlib.Path(spec.submodule_search_locations[0]) / "swift.py"
    spec = importlib.util.spec_from_file_location("_swift_external_1", file)
    with pytest.raises(ImportError, match="name a file of your own there"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "neftune_noise_alpha is not set: set it"),
        (
            {"neftune_noise_alpha": 5, "neftune_warm_up": 3},
            "takes the keys .*, got neftune_warm_up",
        ),
        ({"neftune_noise_alpha": 5, "neftune_final_alpha": 0}, "neftune_schedule: linear or cos"),
        (
            {"neftune_noise_alpha": 5, "neftune_final_alpha": 1, "neftune_schedule": "constant"},
            "neftune_schedule: linear or cosine",
        ),
    ],
)
def test_axolotl_refuses(axolotl, config, said):
    with pytest.raises(ValueError, match=said):
        axolotl.NEFTunePlugin().register(Config(config))


def test_axolotl_takes_its_keys(axolotl):
    full = {
        "neftune_noise_alpha": 5,
        "neftune_schedule": "cosine",
        "neftune_final_alpha": 1,
        "neftune_warmup_steps": 2,
        "neftune_distribution": "gaussian",
        "neftune_samples": {"attention_mask": "mask"},
    }
    plugin = axolotl.NEFTunePlugin()
    plugin.register(Config(full))
    plugin.register(Config(noisy_embedding_alpha=5))  # its old name, which axolotl still takes
    assert plugin.get_input_args() == f"{INTEGRATIONS}.axolotl.NEFTuneArgs"
    assert set(axolotl.NEFTuneArgs.model_fields) == set(full) - {"neftune_noise_alpha"}
    axolotl.NEFTuneArgs(**full)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("schedule", "exponential"),
        ("final_alpha", -1),
        ("final_alpha", float("nan")),
        ("warmup_steps", -1),
        ("distribution", "normal"),
        ("samples", {"mask": "attention_mask"}),
        ("samples", "attention_mask"),
    ],
)
def test_axolotls_parser_checks_the_values(axolotl, key, wrong):
    with pytest.raises(pydantic.ValidationError, match=f"neftune_{key}"):
        axolotl.NEFTuneArgs(**{f"neftune_{key}": wrong})


@pytest.mark.parametrize(
    ("keys", "alphas"),
    [
        ({}, [8.0] * 6),
        ({"neftune_schedule": "linear"}, [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]),
        ({"neftune_schedule": "linear", "neftune_final_alpha": 4}, [8.0, 7.0, 6.0, 5.0, 4.0, 4.0]),
        ({"neftune_warmup_steps": 2}, [0.0, 4.0, 8.0, 8.0, 8.0, 8.0]),
        (
            {"neftune_schedule": "cosine", "neftune_warmup_steps": 2},
            [0.0, 4.0, 8.0, 4.0, 0.0, 0.0],
        ),
    ],
)
def test_axolotls_alpha(axolotl, keys, alphas):
    """Over 4 steps, the warm-up among them."""
    given = axolotl.NEFTuneArgs(**keys).model_dump(exclude_none=True)
    config = Config(given, neftune_noise_alpha=8.0)
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(max_steps=4))
    (callback,) = axolotl.NEFTunePlugin().add_callbacks_post_trainer(config, trainer)
    found = [callback.alpha_at(step) for step in range(6)]
    assert found == pytest.approx(alphas)
    assert callback.options["distribution"] == "uniform" and callback.options["samples"] is None


def test_axolotls_callback_is_the_only_noise(axolotl, tmp_path, capsys, threads):
    """Where axolotl hands its alpha to the trainer, too, as it does in SFT; and it is said once."""
    threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, 32, (4, 9))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            neftune_noise_alpha=5.0,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    given = axolotl.NEFTuneArgs().model_dump(exclude_none=True)
    given = Config(given, neftune_noise_alpha=5.0)
    for callback in axolotl.NEFTunePlugin().add_callbacks_post_trainer(given, trainer):
        trainer.add_callback(callback)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "neftune/max_noise_ratio" in line]
    assert len(logged) == 2 and all(0.9 < line["neftune/max_noise_ratio"] <= 1 for line in logged)
    assert [line["neftune/calls"] for line in logged] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("noise by neftune_kernels, alpha 5, replica 0") == 1
