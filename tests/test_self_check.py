"""A kernel with a wrong bit is found at its first call and put out of service, with a warning.

The Triton kernels' own first launches are in tests/test_triton.py, which needs a device for them.
"""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import make_batch, same_bits

from neftune_kernels import __main__ as program
from neftune_kernels import backends, noisy_embedding, self_check

OPS = torch.ops.neftune_kernels
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def enabled(no_self_check, monkeypatch):
    monkeypatch.setattr(self_check, "ENABLED", True)
    monkeypatch.setattr(self_check, "passed", set())
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.setattr(program, "WIDTHS", (20, 64, 72))


def arguments(kind="numbered", width=24, dtype=torch.bfloat16):
    batch = make_batch(kind)
    weight = torch.randn(11, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    seed, alpha = torch.tensor(7), torch.tensor(5.0, dtype=torch.float64)
    layout = OPS.mask_layout(batch.attention_mask, None)
    return batch.input_ids, weight, seed, alpha, *layout, None, None, 3, 4, 5, -1, 1.5


def with_a_wrong_bit(*args, out):
    """The reference, but for one value of the last token."""
    OPS.reference_noisy_embedding.out(*args, out=out)
    out.view(-1, out.shape[-1])[-1, -1] += 1


def fresh(args):
    return args[1].new_full((*args[0].shape, args[1].shape[1]), float("nan"))


def test_a_right_kernel_serves_without_a_word():
    calls = []

    def serve(*args, out):
        calls.append(len(calls))
        OPS.noisy_embedding.out(*args, out=out)

    kernel = backends.compared("noisy_embedding", serve, None)
    args = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            out = fresh(args)
            kernel(*args, out=out)
            assert same_bits(out, OPS.reference_noisy_embedding(*args))
    assert calls == [0, 1] and self_check.passed == {("cuda", "cpu", "noisy_embedding")}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_one_wrong_bit_puts_a_backend_out_of_service(dtype):
    kernel = backends.compared(
        "noisy_embedding", with_a_wrong_bit, OPS.reference_noisy_embedding.out
    )
    args = arguments(dtype=dtype)
    expected = OPS.reference_noisy_embedding(*args)
    out = fresh(args)
    with pytest.warns(
        RuntimeWarning, match=rf"'cuda' is out of service.*{re.escape(torch.__version__)}"
    ):
        kernel(*args, out=out)
    assert same_bits(out, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(*args, out=out.fill_(float("nan")))
    assert same_bits(out, expected)
    assert "self-check failed" in self_check.failure("cuda", "cpu")
    assert (
        "self-check failed" in backends.available_backends()["cuda"] or backends.native_cuda.reason
    )


def test_a_failed_backend_is_not_chosen(monkeypatch):
    monkeypatch.setattr(backends, "_import_for", lambda device_type: "")
    monkeypatch.setattr(backends, "native_cuda", backends.NativeLibrary(None, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda")
    assert backends.choose_backend(None, gpu, torch.float32).name == "triton"
    self_check._failures["triton", "cuda"] = "self-check failed: here"
    assert backends.choose_backend(None, gpu, torch.float32).name == "cuda"
    with pytest.raises(ValueError, match="'triton' is not available: self-check failed: here"):
        backends.choose_backend("triton", gpu, torch.float32)
    self_check._failures["cuda", "cuda"] = "self-check failed: there"
    with pytest.warns(UserWarning, match="slow reference backend"):
        backends._warned_devices.discard("cuda")
        assert backends.choose_backend(None, gpu, torch.float32).name == "reference"


def test_noise_added_in_place_is_compared_with_what_was_there():
    ids, weight, seed, alpha, *rest = arguments()
    embeds = torch.nn.functional.embedding(ids, weight)
    add = backends.compared("add_noise", OPS.add_noise.out, None)
    expected = OPS.reference_add_noise(embeds, seed, alpha, *rest[:7])
    add(embeds, seed, alpha, *rest[:7], out=embeds)
    assert same_bits(embeds, expected) and self_check.passed == {("cuda", "cpu", "add_noise")}


def test_numbers_of_samples_are_compared():
    mask = make_batch("numbered").attention_mask

    def shifted(attention_mask, position_ids):
        document, position, lengths = OPS.mask_layout(attention_mask, position_ids)
        return document, position + 1, lengths

    right = OPS.mask_layout(mask, None)
    assert self_check.numbering_agrees("cuda", mask, None, right)
    document, position, lengths = right
    with pytest.warns(RuntimeWarning, match="numbers of the samples in a mask"):
        stray = document + 10**6
        assert not self_check.numbering_agrees("cuda", mask, None, (stray, position, lengths))
    self_check._failures.clear()
    number = backends.compared("mask_layout", shifted, OPS.mask_layout)
    with pytest.warns(RuntimeWarning, match="numbers of the samples in a mask"):
        found = number(mask, None)
    assert all(map(torch.equal, found, right))


def test_ids_out_of_range_and_odd_documents_are_no_fault():
    """On an accelerator such ids give rows of NaN, and nobody's process ends over an index."""
    ids, weight, seed, alpha = arguments()[:4]
    ids = ids.clone()
    ids[0, 0], ids[-1, -1] = -1, 11
    document = torch.full((ids.numel(),), 99)
    lengths = torch.ones(4, dtype=torch.int64)
    layout = self_check.Layout(document, torch.zeros_like(document), lengths)
    found = self_check.expected_rows(weight, ids.shape, seed, alpha, layout, (0, 0, 0), ids)
    assert found.rows[[0, -1]].isnan().all() and found.token[[0, -1]].tolist() == [0, 51]
    assert same_bits(found.rows[1:-1], weight[ids.flatten()[found.token[1:-1]]])


def test_never_inside_a_trace_or_a_mode(monkeypatch):
    assert self_check.wanted(CPU)
    monkeypatch.setattr(self_check, "ENABLED", False)
    assert not self_check.wanted(CPU)
    monkeypatch.setattr(self_check, "ENABLED", True)
    with torch._subclasses.FakeTensorMode():
        assert not self_check.wanted(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not self_check.wanted(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not self_check.wanted(torch.device("cuda"))


# ---- the long form


def test_long_form(capsys):
    assert program.check()
    assert "WRONG" not in capsys.readouterr().out
    assert len({case[1:4] for case in program.compare("reference", CPU)}) == 63


def test_long_form_sees_a_wrong_backend(monkeypatch, capsys):
    inner = noisy_embedding

    def wrong(input_ids, weight, noise_alpha, *, backend, **given):
        out = inner(input_ids, weight, noise_alpha, backend="reference", **given)
        if backend != "reference" and "lengths" in given and out.dtype == torch.float16:
            out[0, 0, 0] += 1
        return out

    monkeypatch.setattr(program, "noisy_embedding", wrong)
    monkeypatch.setattr(program, "available_backends", lambda device: {"cpp": "available"})
    assert not program.check()
    assert capsys.readouterr().out.count("WRONG: torch.float16") == 3


# ---- switches


def run(code, **switches):
    environment = {name: value for name, value in os.environ.items() if "NEFTUNE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | switches, capture_output=True, text=True
    )
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr


def test_triton_can_be_switched_off():
    code = "import neftune_kernels as n; print(n.available_backends('cuda')['triton'])"
    assert run(code, NEFTUNE_DISABLE_TRITON="1") == "switched off by NEFTUNE_DISABLE_TRITON=1"


CALL = (
    "import torch, neftune_kernels as n\n"
    "ids, weight = torch.tensor([[1, 2]]), torch.zeros(3, 8)\n"
    "from neftune_kernels import lookup\n"
    "seen = []\n"
    "inner = lookup.choose_backend\n"
    "lookup.choose_backend = lambda *args: seen.append(inner(*args)) or seen[-1]\n"
)


def test_backend_for_who_cannot_reach_the_code():
    code = CALL + "n.noisy_embedding(ids, weight, 5.0); print(seen[0].name)"
    assert run(code, NEFTUNE_BACKEND="reference") == "reference"
    said = CALL + "n.noisy_embedding(ids, weight, 5.0, backend='reference'); print(seen[0].name)"
    assert run(said, NEFTUNE_BACKEND="cpp") == "reference"
    expected = r"ValueError: backend 'triton' (NEFTUNE_BACKEND) is not available: wrong device"
    assert expected in run(code, NEFTUNE_BACKEND="triton")
    expected = "backend must be None or one of 'reference', 'cpp', 'triton', 'cuda', got 'C++'"
    assert f"{expected} (NEFTUNE_BACKEND)" in run(code, NEFTUNE_BACKEND="C++")


def test_report_names_the_switches(monkeypatch):
    monkeypatch.setenv("NEFTUNE_BACKEND", "reference")
    assert "NEFTUNE_BACKEND=reference" in program.report()


# ---- devices without float64


def test_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(
        backends, "_float64_error", lambda device_type: "TypeError: no float64 here"
    )
    message = r"on mps get no NEFTune noise: .*float64.*no float64 here.*Keep the embedding on the"
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=message):
            backends.choose_backend(backend, torch.device("mps"), torch.float32)
    assert backends.choose_backend("reference", torch.device("mps"), torch.float32, noisy=False)
    assert backends.choose_backend("reference", CPU, torch.float32).name == "reference"


def test_float64_is_asked_of_the_device(monkeypatch):
    assert backends._float64_error("cpu") == ""
    if not torch.xpu.is_available():  # nothing can lie there
        assert backends._float64_error.__wrapped__("xpu") == ""
        with monkeypatch.context() as patch:  # it raises as a device without float64 does
            patch.setattr(torch.xpu, "is_available", lambda: True)
            assert "Error: " in backends._float64_error.__wrapped__("xpu")
