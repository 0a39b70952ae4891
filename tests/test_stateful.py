"""Histories of a model with apply_neftune, as hypothesis draws them: each state is compared with a
record of what must be true, and with a twin that was never touched.

`make test` runs the same few every time; the long ones are drawn anew, as many as
NEFTUNE_HISTORIES says.
"""

import contextlib
import copy
import inspect
import os
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")

from histories import (
    ARRIVED,
    BATCHES,
    DEFAULTS,
    FOREIGN_BATCHES,
    HIDDEN,
    KINDS,
    SETTINGS,
    VOCAB,
    arrival,
    build,
    everything,
    first_draw,
    inner_of,
    noise_of,
    same_state,
    settings_of,
    told_of,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_interrupts import Interrupt
from torch.utils.checkpoint import checkpoint

from neftune_kernels import apply_neftune
from neftune_kernels.integrations import probe
from neftune_kernels.integrations.running import RUNNING

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

COMPILE = inspect.unwrap(torch.compile)  # Lightning puts a wrapper there, which marks the model
OURS = re.compile("neftune|noise|multiplies its embeddings", re.IGNORECASE)
FOUND = "multiplies its embeddings by 4 after looking them up"
UNKNOWN = "it is not known whether"
TAKEN_OFF = "NEFTune was taken off|number of tensors"
COPIED = "copied or unpickled while it had NEFTune noise"
# of ours that run, about: in models of one's own, whose first forward is looked at, and in others
LINES = {
    True: {"apply": 1450, "forward": 2000, "remove": 330, "exit": 1030, "alpha": 80},
    False: {"apply": 2750, "forward": 450, "remove": 780, "exit": 2250, "alpha": 80},
}
ADAPTERS = {
    "Llama": {
        "LoRA": {"target_modules": ["q_proj"]},
        "LoRA on the table": {"target_modules": ["q_proj", "embed_tokens"]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "trainable tokens": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [4, 5]},
        },
    },
    "GPT-2": {"LoRA": {"target_modules": ["c_attn"], "fan_in_fan_out": True}},
}
SHARDED = {"FSDP1", "FSDP2"}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


def fsdp1(module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


WRAPPERS = {
    "FSDP1": fsdp1,
    "checkpoint": checkpointed,
    "torch.compile": lambda module: COMPILE(module, backend="eager"),
}


def begin_group():
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class Struck(Interrupt):
    """Knows in which function it was."""

    function = None

    def line(self, frame, event, arg):
        self.function = frame.f_code.co_name
        return super().line(frame, event, arg)


class Histories(RuleBasedStateMachine):
    """`model` has what apply_neftune did; `twin` what everybody else did. `settings` is what the
    last apply that is in force said, None without noise.
    """

    kinds = tuple(KINDS)
    compiles = True

    def __init__(self):
        super().__init__()
        self.model = self.handle = self.settings = None
        self.withs = []  # (handle, settings before)
        self.old = []  # embeddings that somebody replaced
        self.around = set()  # what is around the embedding or the model
        self.adapter = None
        self.moved = False  # nothing of ours has run since a module changed
        self.steered = True  # False: a copy that nobody has taken over
        self.group = self.compiled = False
        self.seed = 0

    @initialize(data=st.data())
    def begin(self, data):
        probe.KEPT.clear()
        self.kind = data.draw(st.sampled_from(self.kinds))
        self.how = KINDS[self.kind]
        self.model, self.twin = build(self.kind), build(self.kind)
        self.weight = self.table(self.twin).weight.detach().clone()
        if data.draw(st.booleans()):
            self.applied(data.draw(settings_of(self.kind)), False)

    def teardown(self):
        try:
            if self.model is not None and sys.exc_info()[0] is None:
                self.end()
        finally:
            RUNNING.forwards.clear()
            RUNNING.told.clear()
            if self.compiled:
                torch.compiler.reset()
            if self.group:
                torch.distributed.destroy_process_group()

    def end(self):
        self.unwind()
        if self.settings is not None:
            if not self.steered:
                self.handle = apply_neftune(self.model)
            self.handle.remove()
            self.settings = None
        self.is_as_its_twin()

    # ---- what is there

    @property
    def has_noise(self):
        """Noise that a handle steers."""
        return self.settings is not None and self.steered

    def table(self, model):
        return model.get_input_embeddings()

    def both(self, function):
        """The same change of the model and of its twin."""
        for name in ("model", "twin"):
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(getattr(self, name))
            if result is not None:
                setattr(self, name, result)

    def target(self, inner):
        return inner_of(self.model) if inner else self.model

    def read_weight(self):
        for module in self.twin.modules():
            if isinstance(module, nn.Embedding) and module.weight.shape[0] >= VOCAB:
                self.weight = module.weight.detach().clone()
                return

    # ---- apply and undo

    def applied(self, said, inner):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = self.settings if self.steered else None
            held = self.handle
            # who takes a copy over takes all of it
            self.handle = apply_neftune(self.target(inner and self.steered), **said)
        assert before is None or self.handle is held, "applying twice returns the same handle"
        self.settings = {**DEFAULTS, "sign": 1, **said}
        self.steered, self.moved = True, False
        return before

    @rule(data=st.data(), inner=st.booleans())
    def apply(self, data, inner):
        self.applied(data.draw(settings_of(self.kind)), inner)

    @rule(data=st.data(), inner=st.booleans())
    def enter(self, data, inner):
        before = self.applied(data.draw(settings_of(self.kind)), inner)
        assert self.handle.__enter__() is self.handle
        self.withs.append((self.handle, before))

    @precondition(lambda self: self.withs)
    @rule()
    def leave(self):
        handle, before = self.withs.pop()
        was_removed = handle.removed
        handle.__exit__(None, None, None)
        if not was_removed and handle is self.handle:
            self.settings = before
            self.moved = False

    def unwind(self):
        while self.withs:
            self.leave()

    @precondition(lambda self: self.has_noise)
    @rule()
    def remove(self):
        self.handle.remove()
        assert self.handle.removed
        self.handle.remove()
        self.settings = None

    @precondition(lambda self: self.has_noise)
    @rule(data=st.data(), name=st.sampled_from([*sorted(SETTINGS), "sign"]))
    def set(self, data, name):
        value = -1 if name == "sign" else data.draw(SETTINGS[name])
        setattr(self.handle, name, value)
        assert getattr(self.handle, name) == value
        self.settings = {**self.settings, name: value}

    @precondition(lambda self: self.steered)
    @rule(bad=st.sampled_from(["noise_alpha", "backend", "fused", "word"]), inner=st.booleans())
    def be_refused(self, bad, inner):
        said = {"noise_alpha": -1.0} if bad == "noise_alpha" else {"backend": "tpu"}
        if bad == "word":
            said = {"noise_alfa": 5.0}
        if bad == "fused" and not self.how.fusable:
            said = {"fused": True}
        with pytest.raises((ValueError, TypeError)):
            apply_neftune(self.target(inner), **said)

    # ---- forwards

    @rule(training=st.booleans())
    def mode(self, training):
        self.both(lambda model: model.train(training) and None)

    def batch(self, data):
        batch = data.draw(BATCHES if self.how.own else FOREIGN_BATCHES)
        return batch.turned() if self.how.time_first else batch

    def given(self, batch):
        return batch.given() if self.how.own else {**batch.given(), "use_cache": False}

    def call(self, model, how, batch):
        given = self.given(batch)
        if how == "checkpoint":
            return checkpoint(model, use_reentrant=False, **given)
        if how == "compiled":
            model = COMPILE(model, backend="eager")
        with torch.no_grad() if how == "no grad" else contextlib.nullcontext():
            return model(**given)

    def loss(self, out):
        out = out if isinstance(out, (torch.Tensor, tuple)) else out.logits
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    def reason(self, how):
        """Why a forward has no noise; empty where it has."""
        if self.settings is None:
            return "no apply"
        if not self.twin.training:
            return "eval mode"
        if not self.settings["noise_alpha"] and not self.settings["capturable"]:
            return "noise_alpha is 0"
        if how == "no grad" and not self.settings["noise_without_grad"]:
            return "no grad"
        return ""

    @rule(
        data=st.data(),
        how=st.sampled_from(["eager", "eager", "eager", "no grad", "checkpoint"]),
        word=st.sampled_from([None, None, None, "attention_mask", "key_padding_mask", "lengths"]),
        change=st.sampled_from([None, "alpha", "mode", "forward", "apply", "remove"]),
    )
    def forward(self, data, how, word, change):
        batch = self.batch(data)
        said = data.draw(settings_of(self.kind)) if change == "apply" else None
        self.check_forward(batch, how, word, change, said)

    @precondition(lambda self: self.compiles and self.how.own and self.steered)
    @precondition(lambda self: not self.moved and not self.around)
    @rule(data=st.data(), word=st.sampled_from([None, None, "attention_mask", "lengths"]))
    def compiled_forward(self, data, word):
        if not self.compiled:
            torch.compiler.reset()
            self.compiled = True
        if self.settings is not None and self.settings.get("embedding_multiplier") is None:
            self.handle.embedding_multiplier = 1.0  # else its first forward would have to be eager
            self.settings = {**self.settings, "embedding_multiplier": 1.0}
        self.check_forward(self.batch(data), "compiled", word)

    def check_forward(self, batch, how, word=None, change=None, said=None):
        """One forward of the model and of its twin: what enters the first block, the generator, the
        statistics, what is said, and what a checkpoint runs again.
        """
        self.seed += 1
        drawn, behind = first_draw(self.seed)
        reason, steers = self.reason(how), self.settings is not None and self.steered
        told = told_of(batch, word, self.how.time_first) if word and steers else None
        before = self.handle.stats() if steers else None
        noise, lengths = None, []
        if not reason:
            noise, lengths = noise_of(self.settings, batch, told, drawn, self.how.factor)
        clean = arrival(self.kind, self.twin, self.weight, batch)
        expected = arrival(self.kind, self.twin, self.weight, batch, noise)

        ARRIVED.clear()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            within = self.handle.told(**{told.word: told.value}) if told else None
            with within or contextlib.nullcontext():
                torch.manual_seed(self.seed)
                out = self.call(self.model, how, batch)
            state = torch.get_rng_state()
        found, _ = ARRIVED[-1]
        self.moved = False
        assert torch.equal(found, expected), f"{how}: not the paper's noise ({reason or 'noise'})"
        if reason:
            torch.manual_seed(self.seed)
            behind = torch.get_rng_state()
        assert torch.equal(state, behind), "one draw for a noisy forward, none for another"
        self.hear([str(one.message) for one in heard], not reason)
        if steers and how in ("eager", "no grad") and "torch.compile" not in self.around:
            self.check_stats(before, reason, lengths)

        ARRIVED.clear()
        self.call(self.twin, "eager" if how == "compiled" else how, batch)
        assert torch.equal(ARRIVED[-1][0], clean), "the record's own clean model"
        if how == "checkpoint":
            self.check_backward(out, found, change, batch, reason, said)

    def check_backward(self, out, found, change, batch, reason, said):
        """The second pass is the first's, whatever has changed in between."""
        alpha = None
        if change == "alpha" and self.settings is not None and self.steered:
            alpha = self.settings["noise_alpha"]
            self.handle.noise_alpha = 1.0
        elif change == "mode":
            self.mode(not self.twin.training)
        elif change == "forward":
            self.check_forward(batch, "eager")
        elif change == "apply" and self.settings is not None:
            self.applied(said, False)
        elif change == "remove" and self.has_noise:
            self.remove()
        ARRIVED.clear()
        state = torch.get_rng_state()
        loss = self.loss(out)
        if change == "remove" and not reason and loss.requires_grad:
            with pytest.raises(RuntimeError, match=TAKEN_OFF):
                loss.backward()
            ARRIVED.clear()
        elif loss.requires_grad:  # else PEFT has frozen all there is
            loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        again = [one for one, grad in ARRIVED if grad]  # without grad the model is looked at
        assert all(torch.equal(one, found) for one in again), "recomputed with other noise"
        self.model.zero_grad()
        self.same_buffers()
        if alpha is not None:
            self.handle.noise_alpha = alpha

    def same_buffers(self):
        """What counts forwards has counted those that ended early, too."""
        counts = [one for name, one in self.model.named_buffers() if name.endswith("calls")]
        others = [one for name, one in self.twin.named_buffers() if name.endswith("calls")]
        for one, other in zip(counts, others, strict=True):
            other.copy_(one)

    def hear(self, said, noisy):
        ours = {message for message in said if OURS.search(message)}
        for message in ours:
            asks = self.settings.get("embedding_multiplier") is None
            known = {
                FOUND: asks and self.how.factor != 1,
                UNKNOWN: asks and "torch.compile" in self.around,
                COPIED: not self.steered,
            }
            assert any(true and text in message for text, true in known.items()), message
            assert noisy, message

    def check_stats(self, before, reason, lengths):
        stats = self.handle.stats()
        assert stats["calls"] == before["calls"] + (not reason)
        if reason:
            assert stats["skipped"][reason] == before["skipped"].get(reason, 0) + 1
            return
        assert stats["samples"] == len(lengths)
        if lengths:
            assert (stats["length_min"], stats["length_max"]) == (min(lengths), max(lengths))
            alpha = self.settings["noise_alpha"]
            assert stats["magnitude_max"] == alpha / (min(lengths) * HIDDEN) ** 0.5
            largest = stats["max_noise_ratio"]
            assert largest > 0 or not alpha
            assert largest < 1 or self.settings["distribution"] != "uniform"

    @precondition(lambda self: self.has_noise and not self.around)
    @rule(data=st.data())
    def check(self, data):
        """It leaves no trace."""
        if not self.settings["noise_alpha"]:
            return
        batch = self.batch(data)
        _, lengths = noise_of(self.settings, batch, None, 0, 1.0)
        given = self.given(batch)
        stats, modes = self.handle.stats(), [one.training for one in self.model.modules()]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        checked = self.handle.check(**given)
        assert checked["ok"], str(checked)
        assert sorted(checked["sites"][0]["lengths"]) == sorted(lengths)
        assert torch.equal(torch.get_rng_state(), state)
        assert [one.training for one in self.model.modules()] == modes
        assert self.handle.stats()["calls"] == stats["calls"]
        self.moved = False

    # ---- what others do with the model

    @precondition(lambda self: self.steered and not self.around and self.adapter is None)
    @rule(rows=st.sampled_from([VOCAB, VOCAB + 4]))
    def replace(self, rows):
        self.old.append(self.table(self.model))
        if self.how.own:
            kind = type(self.table(self.twin))

            def change(model):
                table = kind(rows, HIDDEN).to(self.weight.dtype)
                model.set_input_embeddings(table.train(model.training))
        else:

            def change(model):
                model.resize_token_embeddings(rows)
                model.train(model.training)

        self.both(change)
        if self.table(self.model) is self.old[-1]:
            self.old.pop()
        else:
            self.moved = True
        self.read_weight()

    @precondition(lambda self: not self.around & SHARDED)
    @rule(trains=st.booleans())
    def freeze(self, trains):
        def change(model):
            self.table(model).requires_grad_(trains)

        self.both(change)

    @precondition(lambda self: not self.around and self.adapter is None)
    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float64, torch.float32]))
    def cast(self, dtype):
        self.both(lambda model: model.to(dtype) and None)
        self.weight = self.weight.to(dtype)

    @precondition(lambda self: self.steered and self.how.own and not self.around)
    @rule(name=st.sampled_from(sorted(WRAPPERS)))
    def wrap(self, name):
        if name == "FSDP1":
            begin_group()
            self.group = True
        if name == "torch.compile":
            if not self.compiles or self.how.factor != 1:  # nobody can look at what is compiled
                return
            if not self.compiled:
                torch.compiler.reset()
            self.compiled = True

        def change(model):
            wrapped = WRAPPERS[name](self.table(model))
            model.set_input_embeddings(wrapped.train(model.training))

        self.both(change)
        self.around.add(name)
        self.moved = True

    @precondition(lambda self: self.steered and not self.around)
    @rule()
    def shard(self):
        from torch.distributed.fsdp import fully_shard

        begin_group()
        self.group = True
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        self.both(lambda model: fully_shard(model, mesh=mesh) and None)
        self.around.add("FSDP2")

    @precondition(lambda self: not self.around and self.adapter is None)
    @rule(whole=st.booleans())
    def hook(self, whole):
        """accelerate's."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        def change(model):
            module = model if whole else self.table(model)
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

        self.both(change)
        self.around.add("accelerate")

    @precondition(lambda self: "accelerate" in self.around)
    @rule()
    def unhook(self):
        from accelerate.hooks import remove_hook_from_module

        self.both(lambda model: remove_hook_from_module(model, recurse=True) and None)
        self.around.discard("accelerate")

    @precondition(lambda self: self.steered and self.kind in ADAPTERS)
    @precondition(lambda self: self.adapter is None and not self.around)
    @rule(data=st.data())
    def adapt(self, data):
        name = data.draw(st.sampled_from(sorted(ADAPTERS[self.kind])))
        config = ADAPTERS[self.kind][name]

        def change(model):
            given = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **copy.deepcopy(config))
            return peft.get_peft_model(model, given).train(model.training)

        self.both(change)
        self.adapter, self.moved = name, True

    @precondition(lambda self: self.adapter is not None and self.steered)
    @precondition(lambda self: not self.around)
    @rule()
    def merge(self):
        self.both(lambda model: model.merge_and_unload().train(model.training))
        self.adapter, self.moved = None, True

    # ---- copies

    @precondition(lambda self: not self.moved and not self.around & SHARDED)
    @precondition(lambda self: "accelerate" not in self.around)
    @rule(
        data=st.data(),
        way=st.sampled_from(["deepcopy", "pickle"]),
        then=st.sampled_from(["forward", "take over", "clean", "drop"]),
    )
    def copy(self, data, way, then):
        """One goes on with the copy, or with the original; the other is taken off and compared."""
        if way == "pickle" and self.around:
            return
        copied = copy.deepcopy if way == "deepcopy" else _pickled
        self.unwind()
        if self.settings is None:
            self.both(copied)
            return
        original, handle, said = self.model, self.handle, self.settings
        other, clean = copied(original), copied(self.twin)
        if then == "drop":
            if self.steered or data.draw(st.booleans()):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    apply_neftune(other).remove()
                assert everything(other) == everything(clean)
            return
        if self.steered:
            handle.remove()
        else:
            apply_neftune(original).remove()
        assert everything(original) == everything(self.twin)
        assert same_state(original, self.twin)
        self.model, self.twin, self.handle = other, clean, None
        self.settings, self.steered = said, False
        if then == "forward":
            self.check_forward(self.batch(data), "eager")
        elif then == "take over":
            self.applied(data.draw(settings_of(self.kind)), False)
        else:
            apply_neftune(other).remove()
            self.settings, self.steered = None, True

    # ---- interrupts

    @precondition(lambda self: self.steered)
    @rule(
        data=st.data(),
        what=st.sampled_from(sorted(LINES[True])),
        where=st.floats(0, 1),
        then=st.sampled_from(["apply", "remove", "with"]),
        inner=st.booleans(),
    )
    def interrupt(self, data, what, where, then, inner):
        """KeyboardInterrupt at a line of ours. A forward changes nothing; after anything else the
        next apply_neftune is as on a clean model.
        """
        said = data.draw(settings_of(self.kind))
        batch = self.batch(data)
        if self.settings is None and what != "forward":
            what = "apply"
        elif what == "exit" and not self.withs:
            what = "alpha"

        def run():
            if what == "apply":
                apply_neftune(self.target(inner), **said)
            elif what == "forward":
                loss = self.loss(self.call(self.model, "eager", batch))
                if loss.requires_grad:
                    loss.backward()
            elif what == "remove":
                self.handle.remove()
            elif what == "exit":
                self.withs.pop()[0].__exit__(None, None, None)
            else:
                self.handle.noise_alpha = 1.0

        struck = Struck(1 + int(where * LINES[self.how.own][what]))
        torch.manual_seed(self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            was_struck = struck.run(run)
        if what == "apply" and (not was_struck or struck.function == "apply_neftune"):
            then = "remove"  # it may have come to its end, and is what a `with` puts back
        elif what != "apply" or self.settings is not None:
            then = "remove" if then == "with" else then
        assert torch.is_grad_enabled()
        self.model.zero_grad()
        self.same_buffers()
        if what == "forward":
            self.check_forward(batch, "eager")
            return
        while self.withs:  # it goes up through them
            self.withs.pop()[0].__exit__(None, None, None)
        again = data.draw(settings_of(self.kind))
        self.handle = apply_neftune(self.model, **again)  # what is around a part is not the part's
        self.settings, self.moved = {**DEFAULTS, "sign": 1, **again}, False
        if then == "with":
            self.handle.__enter__()
            self.check_forward(batch, "eager")
            self.handle.__exit__(None, None, None)
            self.settings = None
        elif then == "remove":
            self.handle.remove()
            self.settings = None

    # ---- always

    @invariant()
    def is_as_told(self):
        if self.model is None:
            return
        assert torch.is_grad_enabled() and not RUNNING.told
        assert same_state(self.model, self.twin)
        if self.settings is None:
            self.is_as_its_twin()
        elif self.steered:
            assert not self.handle.removed
            for name, value in self.settings.items():
                assert getattr(self.handle, name) == value, name
        if not self.moved:
            for old in self.old:
                assert "_neftune" not in vars(old) and not old._forward_hooks
                assert "_neftune_base" not in vars(type(old))

    def is_as_its_twin(self):
        one, other = everything(self.model), everything(self.twin)
        assert one.keys() == other.keys()
        for name, (kind, own) in one.items():
            assert kind == other[name][0], name
            left = {key: value for key, value in own.items() if value != other[name][1].get(key)}
            assert not left and own.keys() == other[name][1].keys(), (name, left, other[name][1])


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


QUICK = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def run(settings, **words):
    machine = type("Histories", (Histories,), words)
    run_state_machine_as_test(machine, settings=settings)


@pytest.mark.parametrize("kinds", [("own", "behind", "factor", "time first"), ("Llama", "GPT-2")])
def test_the_same_histories_every_time(kinds):
    run(QUICK, kinds=kinds)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_histories_that_are_drawn_anew(kind):
    count = int(os.environ.get("NEFTUNE_HISTORIES", "200"))
    run(
        settings(QUICK, derandomize=False, max_examples=count, stateful_step_count=25),
        kinds=(kind,),
    )
