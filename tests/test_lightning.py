"""The Lightning callback: noise in training only, taken off whatever ends it, and loud where the
model would get none.
"""

import signal

import pytest
import torch
from torch import nn

from neftune_kernels import apply_neftune
from neftune_kernels.schedules import linear_schedule

pl = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

from neftune_kernels.integrations.lightning import NEFTuneCallback  # noqa: E402

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
VOCAB, HIDDEN = 64, 32


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


class Module(pl.LightningModule):
    def __init__(self, fails_with=None):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
        )
        self.model = transformers.LlamaForCausalLM(config).train()
        self.fails_with = fails_with
        self.alphas, self.noisy_in = [], set()

    def forward(self, batch):
        return self.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss

    def see(self, where):
        if any("_neftune" in vars(inner) for inner in self.modules()):
            self.noisy_in.add(where)

    def training_step(self, batch, index):
        self.see("training")
        loss = self(batch)
        if self.fails_with is not None and index == 2:
            raise self.fails_with
        return loss

    def validation_step(self, batch, index):
        self.see("validation")
        clean = self(batch)
        assert torch.equal(clean, self(batch))
        self.log("val_loss", clean)

    def test_step(self, batch, index):
        self.see("test")
        self.log("test_loss", self(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def data(rows=16):
    ids = torch.randint(1, VOCAB, (rows, 8), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=2)


def trainer(callback, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        **{"max_epochs": 1, "log_every_n_steps": 1, **QUIET, **options},
    )


def check_clean(module, callback):
    assert callback.handle is None
    for inner in module.modules():
        assert not hasattr(type(inner), "_neftune_base") and "_neftune" not in inner.__dict__
        hooks = [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]
        assert not any("neftune" in type(hook).__module__ for hook in hooks)
    batch = next(iter(data()))
    assert torch.equal(module.train()(batch), module.eval()(batch))
    module.train()


@pytest.fixture
def sigint():
    """Lightning ignores further SIGINTs once it has met one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (ValueError("in training_step"), ValueError),
        (KeyboardInterrupt(), SystemExit),
        (SystemExit(3), SystemExit),
    ],
)
def test_nothing_is_left_after_a_failure(failure, raised, sigint):
    module, callback = Module(failure), NEFTuneCallback(5.0)
    with pytest.raises(raised):
        trainer(callback).fit(module, data(), data(4))
    assert module.noisy_in == {"training"}
    check_clean(module, callback)
    module.fails_with = None
    run = trainer(callback)
    run.fit(module, data())  # the same callback again
    assert run.global_step == 8 and run.logged_metrics["neftune/max_noise_ratio"] > 0.9
    check_clean(module, callback)


def test_failure_in_validation_leaves_nothing():
    class Fails(Module):
        def validation_step(self, batch, index):
            if not self.trainer.sanity_checking:
                self.see("validation")
                raise ValueError("in validation_step")

    module, callback = Fails(), NEFTuneCallback(5.0)
    with pytest.raises(ValueError, match="in validation_step"):
        trainer(callback).fit(module, data(), data(4))
    assert module.noisy_in == {"training", "validation"}  # it was on, in eval mode, when it failed
    check_clean(module, callback)


def test_schedule_accumulation_and_logs():
    class Records(Module):
        def on_train_batch_end(self, *_):
            state = self.trainer.callbacks[0].handle
            self.alphas.append(state.noise_alpha)

    module, callback = Records(), NEFTuneCallback(linear_schedule(8.0, 0.0, 4))
    run = trainer(callback, accumulate_grad_batches=2)
    run.fit(module, data())
    assert module.alphas == [8.0, 8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0]
    logged = run.logged_metrics
    assert (
        logged["neftune/noise_alpha"] == 2.0
        and logged["neftune/length_min"] == logged["neftune/length_max"] == 8
    )
    assert logged["neftune/magnitude_max"] == pytest.approx(2.0 / (8 * HIDDEN) ** 0.5)
    check_clean(module, callback)
    callback = NEFTuneCallback(5.0, log_stats=False)
    run = trainer(callback)
    run.fit(Module(), data())
    assert [name for name in run.logged_metrics if name.startswith("neftune/")] == [
        "neftune/noise_alpha"
    ]


def test_testing_and_validation_have_no_noise():
    module, callback = Module(), NEFTuneCallback(5.0)
    run = trainer(callback)
    run.validate(module, data(), verbose=False)
    run.test(module, data(), verbose=False)
    assert module.noisy_in == set()


def test_a_model_left_in_eval_mode_warns():
    module = Module()
    module.model.eval()
    with pytest.warns(
        UserWarning, match=r"skipped: eval mode\. .*call its train\(\) before fit"
    ) as caught:
        trainer(NEFTuneCallback(5.0)).fit(module, data())
    assert sum("noisy forward" in str(warning.message) for warning in caught) == 1


def test_what_was_applied_before_goes_on_after_the_callback():
    module = Module()
    handle = apply_neftune(module.model, 3.0, replica=7)
    trainer(NEFTuneCallback(5.0), max_steps=2).fit(module, data())
    assert handle.noise_alpha == 3.0 and handle.replica == 7 and handle.stats()["calls"] == 2
    handle.remove()
    assert type(module.model.get_input_embeddings()) is nn.Embedding


def test_which_model_is_noised():
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.reference = transformers.LlamaForCausalLM(self.model.config)

    callback = NEFTuneCallback(5.0)
    with pytest.raises(
        ValueError,
        match=r"2 children with one \(model, "
        r"reference\).*NEFTuneCallback\(model='path.in.module'\)",
    ):
        trainer(callback).fit(Two(), data())
    module, callback = Two(), NEFTuneCallback(5.0, model="model")
    trainer(callback).fit(module, data())
    assert module.noisy_in == {"training"}
    check_clean(module, callback)

    class Bare(Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, 1))

        def forward(self, batch):
            return self.model(batch).square().mean()

    with pytest.raises(ValueError, match="0 children with one: name the one"):
        trainer(NEFTuneCallback(5.0)).fit(Bare(), data())
    callback = NEFTuneCallback(5.0, embedding="model.0")
    calls = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            calls.append(callback.handle.stats()["calls"])

    run = trainer(callback)
    run.callbacks.append(Watch())
    with pytest.warns(UserWarning, match="samples="):
        run.fit(Bare(), data())
    assert calls == list(range(1, 9))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"NEFTuneCallback\(\) takes no stream=: .* is replica="):
        NEFTuneCallback(5.0, stream=0)
    with pytest.raises(ValueError, match="noise_alpha must be finite and >= 0"):
        NEFTuneCallback(-1.0)
    with pytest.raises(TypeError, match="alpha_noise"):
        NEFTuneCallback(alpha_noise=5.0)
