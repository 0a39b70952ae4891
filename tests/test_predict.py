"""The model behind bench.predict: each limit by numbers that can be followed by hand."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="a triton that compiles for NVIDIA")

from bench import codegen, predict
from bench.predict import GPU, LATENCY, LAUNCH, Work

# 10 processors of 1 GHz that issue 4 warps' instructions a cycle, 8 lanes of float64; 1 GB/s
SMALL = GPU("small", "sm_90", 10, 1e9, 4, 8, 1e9, 2048, 32)


@pytest.mark.parametrize(
    "work, limit, seconds",
    [
        (Work(1, 2e6), "b", 2e6 / 1e9),
        (Work(1, 8.0, instructions=4e7), "i", 4e7 / (10 * 4 * 1e9)),
        (Work(1, 8.0, instructions=1e4, float64=1e4), "d", 1e4 * 32 / (10 * 8 * 1e9)),
        (Work(1, 8.0, instructions=10, chain=1000), "c", 1000 * 4 / 1e9),
    ],
)
def test_the_slowest_limit_binds(work, limit, seconds):
    found = predict.predict(work, SMALL)
    assert found.limit == limit
    assert found.seconds == pytest.approx(LAUNCH + seconds, rel=1e-12)
    assert predict.predict(work._replace(launches=3), SMALL).seconds - found.seconds == (
        pytest.approx(2 * LAUNCH, rel=1e-9)
    )


@pytest.mark.parametrize(
    "registers, threads, programs",
    [(32, 32, 32), (64, 256, 4), (255, 256, 1), (16, 1024, 2)],
)
def test_loads_in_flight_are_those_of_resident_programs(registers, threads, programs):
    """By the programs, the threads or the registers that a processor holds."""
    wide = SMALL._replace(bandwidth=1e15)
    work = Work(1, 1e9, reading=threads, in_flight=4, registers=registers)
    flying = 10 * programs * threads * 4 * 16
    found = predict.predict(work, wide)
    assert found.limit == "f"
    assert found.seconds == pytest.approx(LAUNCH + 0.5e9 / flying * LATENCY, rel=1e-12)


def test_our_work_is_that_of_the_compiled_code():
    (h100,) = [gpu for gpu in predict.GPUS if gpu.name == "H100"]
    code = codegen.measure(codegen.Configuration("sm_90", "bfloat16", 4096, "lengths"))
    work = predict.of_ours(h100, 1000, 4096, "lengths")
    warps = 1000 * 4096 / code.elements_per_thread / 32
    assert work.instructions == code.instructions * warps
    assert work.float64 == warps * sum(code.opcodes[name] for name in ("DFMA", "DMUL", "DADD"))
    assert work.bytes == 1000 * 4096 * 4
    assert work.in_flight == 4


def test_rows_of_small_calls_are_shared_out():
    (h100,) = [gpu for gpu in predict.GPUS if gpu.name == "H100"]
    shared = codegen.Configuration("sm_90", "bfloat16", 4096, "lengths", shares=16)
    code, work = codegen.measure(shared), predict.of_ours(h100, 8, 4096, "lengths")
    assert code.elements_per_thread == 8 and work.reading == 32
    assert work.chain == code.instructions and work.instructions == 8 * 16 * code.instructions


def test_a_mask_costs_the_launches_of_its_numbering():
    (h100,) = [gpu for gpu in predict.GPUS if gpu.name == "H100"]
    row = predict.of_ours(h100, 8 * 512, 4096, "numbering")
    plain, documents = (predict.of_masked(h100, 8, 512, 4096, is_plain) for is_plain in (1, 0))
    assert plain.launches == documents.launches == row.launches + 1
    assert 50 < plain.earlier < documents.earlier
    found = predict.predict(plain, h100).seconds - predict.predict(row, h100).seconds
    more_bytes = (plain.bytes - row.bytes) / h100.bandwidth
    assert found == pytest.approx(LAUNCH + plain.earlier * 4 / h100.clock + more_bytes, rel=1e-9)
