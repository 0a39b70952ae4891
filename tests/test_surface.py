"""The frozen surface: tests/golden/surface.txt is what tests/surface.py finds, and every error that
a public docstring promises is raised by a call.
"""

import builtins
import difflib
import importlib
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import surface
import torch
from torch import nn

import neftune_kernels
from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    apply_neftune,
    available_backends,
    neftune_noise,
    noisy_embedding,
    ops,
    schedules,
)
from neftune_kernels.distributed import data_parallel_index

TEXT = surface.PATH.read_text(encoding="utf-8")
ON_PURPOSE = """
The public surface is another than tests/golden/surface.txt. A line with "-" is what somebody's code
or file may hold; docs/stability.md says what its end demands: a DeprecationWarning for as long as
that page says, and a line in CHANGELOG.md. A line with "+" is promised from now on. If it is meant:

    python tests/surface.py --write
"""


def test_surface_is_what_was_promised():
    command = [sys.executable, surface.__file__]
    environment = {**os.environ, "PYTHONPATH": str(surface.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, promised = done.stdout.splitlines(), TEXT.splitlines()
    changes = "\n".join(difflib.unified_diff(promised, found, lineterm="", n=1))
    assert not changes, f"{ON_PURPOSE}\n{changes}"


def test_all_that_is_exported_is_on_the_page():
    """docs/api.md has every name of __all__, and no name that is private."""
    listed = {one.path.removeprefix("neftune_kernels.") for one in surface.public_names()}
    assert set(neftune_kernels.__all__) - listed == {"SPEC_VERSION", "__version__"}
    assert len(listed) > 15 and not any("._" in name or name.startswith("_") for name in listed)


def test_operators_are_those_that_torch_knows():
    """No operator is registered past the table of ops.py, by C++ code neither."""
    known = {
        name.removeprefix("neftune_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("neftune_kernels::")
    }
    assert known == {one.name for one in ops.OPERATORS}


def test_every_switch_is_in_the_documentation():
    pages = [surface.ROOT / "README.md", *(surface.ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert {switch for switch in surface.switches() if switch not in text} == set()


# ---- errors

IDS, WEIGHT, MASK = torch.tensor([[1, 2]]), torch.ones(3, 4), torch.ones(1, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


def neftune_post_forward_hook(module, args, output):
    """By its name transformers' own."""


def with_two_noises(module):
    module.neftune_noise_alpha = 5.0
    module.register_forward_hook(neftune_post_forward_hook)
    return module


def forward_mode(function):
    torch.func.jvp(function, (WEIGHT,), (WEIGHT,))


def held(change):
    """A handle, changed; its model lives as long."""
    model = Model()
    handle = apply_neftune(model, embedding="embed")
    change(handle, model)


def removed(change):
    def call(handle, model):
        handle.remove()
        change(handle)

    held(call)


def parametrised(handle, model):
    nn.utils.parametrizations.weight_norm(model.embed)
    handle.remove()


def told(**words):
    def call(handle, model):
        with handle.told(**words):
            pass

    held(call)


def integration(name):
    package = {"transformers": "transformers", "lightning": "pytorch_lightning"}[name]
    pytest.importorskip(package)
    return importlib.import_module(f"neftune_kernels.integrations.{name}")


def trained_with_two_noises():
    model = Model()
    model.get_input_embeddings = lambda: model.embed
    with_two_noises(model.embed)
    callback = integration("transformers").NEFTuneCallback(5.0)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)


def patched_in_another_transformers():
    module = integration("transformers")
    foreign = SimpleNamespace(trainer=SimpleNamespace(), __version__="99")
    with (
        mock.patch.object(module, "transformers", foreign),
        mock.patch.object(module, "Trainer", SimpleNamespace),
    ):
        module.patch_trainer()


def index_beside_dtensors():
    """An ordinary weight, other parameters DTensors, four processes of which this is one."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        model = nn.Module()
        sharded = DTensor.from_local(torch.zeros(2), mesh, [Replicate()], run_check=False)
        model.register_parameter("other", nn.Parameter(sharded))
        data_parallel_index(WEIGHT, model=model)
    finally:
        dist.destroy_process_group()


def plugin(name, *stubs):
    """Our file for a tool that is a stub."""
    trainers = integration("transformers")
    modules = {stub.__name__: stub for stub in stubs}
    try:
        with mock.patch.dict(sys.modules, modules):
            return importlib.import_module(f"neftune_kernels.integrations.{name}")
    finally:
        trainers.unpatch_trainer()


def stub(name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    return module


def axolotl():
    pytest.importorskip("pydantic")
    base = stub("axolotl.integrations.base", BasePlugin=object)
    return plugin("axolotl", stub("axolotl"), stub("axolotl.integrations"), base)


def swift():
    return plugin("swift", stub("swift"), stub("swift.callbacks", callbacks_map={}))


SCHEDULES = {
    "linear_schedule": lambda alpha: schedules.linear_schedule(alpha, 0.0, 4),
    "cosine_schedule": lambda alpha: schedules.cosine_schedule(alpha, 0.0, 4),
    "warmup_schedule": lambda alpha: schedules.warmup_schedule(4, alpha),
    "constant_schedule": schedules.constant_schedule,
}
E = NEFTuneEmbedding
PROMISED = {
    "noisy_embedding": {
        "TypeError": lambda: noisy_embedding(IDS, nn.Embedding(3, 4), 5.0),
        "ValueError": lambda: noisy_embedding(IDS, WEIGHT, -1.0),
        "IndexError": lambda: noisy_embedding(IDS + 2, WEIGHT, 5.0),
        "NotImplementedError": lambda: forward_mode(lambda w: noisy_embedding(IDS, w, 5.0)),
    },
    "add_noise": {
        "TypeError": lambda: add_noise([1.0], 5.0),
        "ValueError": lambda: add_noise(WEIGHT, 5.0, sign=2),
    },
    "neftune_noise": {
        "TypeError": lambda: neftune_noise(3, 4, 5.0),
        "ValueError": lambda: neftune_noise((1, 2), -1, 5.0),
    },
    "available_backends": {"ValueError": lambda: available_backends("abacus")},
    "NEFTuneEmbedding": {
        "TypeError": lambda: E(3, 4, noise_alpha="5"),
        "ValueError": lambda: E(3, 4, backend="abacus"),
    },
    "NEFTuneEmbedding.forward": {
        "TypeError": lambda: E(3, 4)(IDS, mask=MASK),
        "ValueError": lambda: E(3, 4)(IDS, attention_mask=-MASK),
        "IndexError": lambda: E(3, 4)(IDS + 2),
        "RuntimeError": lambda: with_two_noises(E(3, 4))(IDS),
        "NotImplementedError": lambda: forward_mode(
            lambda w: torch.func.functional_call(E(3, 4), {"weight": w}, (IDS,))
        ),
    },
    "NEFTuneEmbedding.from_embedding": {
        "TypeError": lambda: E.from_embedding(WEIGHT),
        "ValueError": lambda: E.from_embedding(nn.Embedding(3, 4), -1.0),
    },
    "NEFTuneEmbedding.from_pretrained": {
        "TypeError": lambda: E.from_pretrained(nn.Embedding(3, 4)),
        "ValueError": lambda: E.from_pretrained(WEIGHT[0]),
    },
    "apply_neftune": {
        "TypeError": lambda: apply_neftune("a model"),
        "ValueError": lambda: apply_neftune(nn.Linear(2, 2)),
    },
    "NEFTuneHandle": {
        "TypeError": lambda: held(lambda handle, _: setattr(handle, "fused", "yes")),
        "ValueError": lambda: held(lambda handle, _: setattr(handle, "noise_alpha", -1.0)),
        "AttributeError": lambda: held(lambda handle, _: setattr(handle, "alpha", 5.0)),
        "RuntimeError": lambda: removed(lambda handle: handle.noise_alpha),
    },
    "NEFTuneHandle.check": {
        "RuntimeError": lambda: removed(lambda handle: handle.check(input_ids=IDS))
    },
    "NEFTuneHandle.remove": {"RuntimeError": lambda: held(parametrised)},
    "NEFTuneHandle.check_single_noise": {
        "RuntimeError": lambda: held(
            lambda handle, model: (with_two_noises(model.embed), handle.check_single_noise())
        )
    },
    "NEFTuneHandle.told": {
        "TypeError": lambda: told(mask=MASK),
        "ValueError": lambda: told(attention_mask=MASK, lengths=torch.tensor([2])),
    },
    "integrations.transformers.NEFTuneCallback": {
        "TypeError": lambda: integration("transformers").NEFTuneCallback("5"),
        "ValueError": lambda: integration("transformers").NEFTuneCallback(-1.0),
        "RuntimeError": trained_with_two_noises,
    },
    "integrations.transformers.patch_trainer": {
        "TypeError": lambda: integration("transformers").patch_trainer("5"),
        "ValueError": lambda: integration("transformers").patch_trainer(-1.0),
        "RuntimeError": patched_in_another_transformers,
    },
    "integrations.lightning.NEFTuneCallback": {
        "TypeError": lambda: integration("lightning").NEFTuneCallback("5"),
        "ValueError": lambda: integration("lightning").NEFTuneCallback(-1.0),
    },
    **{
        f"schedules.{name}": {
            "TypeError": lambda schedule=schedule: schedule("5"),
            "ValueError": lambda schedule=schedule: schedule(-1.0),
        }
        for name, schedule in SCHEDULES.items()
    },
    "distributed.data_parallel_index": {"RuntimeError": index_beside_dtensors},
    "integrations.axolotl.NEFTunePlugin": {
        "ValueError": lambda: axolotl().NEFTunePlugin().register({})
    },
    "integrations.swift.make_callback": {
        "ValueError": lambda: swift().make_callback(SimpleNamespace(neftune_noise_alpha=None), None)
    },
}


def test_every_promised_error_has_its_call():
    lines = TEXT.split("\n## errors\n\n")[1].split("\n\n")[0].splitlines()
    written = dict(line.removeprefix("neftune_kernels.").split(": ") for line in lines)
    assert written == {name: ", ".join(sorted(calls)) for name, calls in PROMISED.items()}


@pytest.mark.parametrize(
    "name, error", [(name, error) for name, calls in PROMISED.items() for error in calls]
)
def test_promised_errors(name, error):
    with pytest.raises(Exception) as raised:
        PROMISED[name][error]()
    assert type(raised.value) is getattr(builtins, error)
