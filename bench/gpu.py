"""Time on a GPU: `python -m bench.gpu [--device cuda] [--shapes ...] [--dtypes ...] [--rounds N]`.

Every shape: ours beside F.embedding without noise, the time a device copy of the same bytes takes,
HF's hook, the official code and both compiled; interleaved rounds on rotating inputs, device
events, medians with p10 and p90. Writes results/gpu.{csv,md,png}.
"""

import argparse
import csv
import pathlib
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from neftune_kernels import available_backends, noisy_embedding

from . import cases
from .compare import relative, spread
from .figures import draw

RESULTS = pathlib.Path(__file__).parent / "results"
ROTATED_BYTES = 256 << 20  # more than any GPU's cache


def to_device(inputs: list[cases.Inputs], device: torch.device) -> list[cases.Inputs]:
    """alpha stays on the CPU, as the operators take it; the weight is shared."""
    weight = inputs[0].weight.to(device)
    return [
        cases.Inputs(
            i.input_ids.to(device),
            i.attention_mask.to(device),
            weight,
            i.out.to(device),
            i.seed.to(device),
            i.alpha,
        )
        for i in inputs
    ]


def copy(inputs: cases.Inputs) -> Tensor:
    """As many bytes as lookup and noise must move: every output row read and written once."""
    return inputs.out.clone()


def with_lengths(inputs: cases.Inputs) -> Tensor:
    lengths = inputs.attention_mask[:, 0] * inputs.attention_mask.shape[1]
    return noisy_embedding(
        inputs.input_ids, inputs.weight, cases.NOISE_ALPHA, lengths=lengths, seed=inputs.seed
    )


def by_cuda(inputs: cases.Inputs) -> Tensor:
    return noisy_embedding(
        inputs.input_ids, inputs.weight, cases.NOISE_ALPHA, seed=inputs.seed, backend="cuda"
    )


def by_cuda_masked(inputs: cases.Inputs) -> Tensor:
    mask = inputs.attention_mask
    return noisy_embedding(
        inputs.input_ids,
        inputs.weight,
        cases.NOISE_ALPHA,
        attention_mask=mask,
        seed=inputs.seed,
        backend="cuda",
    )


def cuda_providers(device: torch.device) -> list[cases.Provider]:
    """The CUDA C++ kernels' rows, equal to the default backend's bit for bit or there is nothing to
    time.
    """
    if device.type == "cpu" or (reason := available_backends(device.type)["cuda"]) != "available":
        print(
            f"no rows of the CUDA C++ kernels: {'not on a CPU' if device.type == 'cpu' else reason}"
        )
        return []
    return [
        cases.Provider("ours, CUDA C++", by_cuda, "ours"),
        cases.Provider("ours, CUDA C++, attention_mask", by_cuda_masked, "ours"),
    ]


def seconds(
    run: Callable[[cases.Inputs], Tensor], inputs: list[cases.Inputs], device: torch.device
) -> float:
    """Per call, over the whole rotation."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for one in inputs:
            run(one)
        return (time.perf_counter() - begin) / len(inputs)
    accelerator = torch.get_device_module(device)
    begin_event, end_event = (
        accelerator.Event(enable_timing=True),
        accelerator.Event(enable_timing=True),
    )
    accelerator.synchronize()
    begin_event.record()
    for one in inputs:
        run(one)
    end_event.record()
    accelerator.synchronize()
    return float(begin_event.elapsed_time(end_event)) * 1e-3 / len(inputs)


def measure(case: cases.Case, device: torch.device, rounds: int) -> dict[str, list[float]]:
    inputs = to_device(
        cases.make_inputs(case, ROTATED_BYTES if device.type != "cpu" else 0), device
    )
    providers = [cases.Provider("copy", copy, "plain"), *cases.make_providers()]
    providers.append(cases.Provider("ours, lengths", with_lengths, "ours"))
    for provider in (cuda := cuda_providers(device)):
        if not torch.equal(provider.run(inputs[0]), cases.ours(inputs[0])):
            raise AssertionError(f"{provider.name} gives other bits than the default backend")
    providers += cuda
    taken: dict[str, list[float]] = {provider.name: [] for provider in providers}
    for round_ in range(rounds + 1):
        for provider in providers if round_ % 2 else reversed(providers):
            value = seconds(provider.run, inputs, device)
            if round_:  # the first compiles
                taken[provider.name].append(value)
    return taken


def describe(device: torch.device) -> str:
    name = (
        platform.processor() or "cpu"
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_name(device)
    )
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    backends = available_backends(device.type)
    return f"{name}, torch {torch.__version__}, triton {version}, backends {backends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shapes", nargs="+", default=list(cases.SHAPES), choices=list(cases.SHAPES)
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=list(cases.DTYPES), choices=list(cases.DTYPES)
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        parser.exit(
            2,
            f"torch sees no {device.type} device: nothing was measured (--device cpu checks this "
            f"program, not a GPU)\n",
        )
    machine = describe(device)
    print(machine)
    rows: list[dict[str, object]] = []
    ratios: dict[cases.Case, dict[str, float]] = {}
    lines = [
        "| shape | dtype | provider | median ms | p10 | p90 | GB/s | over F.embedding |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for key in arguments.shapes:
        for dtype in arguments.dtypes:
            case = cases.make_case(key, cases.DTYPES[dtype])
            taken = measure(case, device, arguments.rounds)
            ratios[case] = relative(taken)
            for name, values in taken.items():
                median, low, high = spread(values)
                ratio = 1.0 if name == "F.embedding" else ratios[case][name]
                row = {
                    "shape": f"{case.model} {case.shape}",
                    "dtype": dtype,
                    "provider": name,
                    "median_ms": median * 1e3,
                    "p10_ms": low * 1e3,
                    "p90_ms": high * 1e3,
                    "gb_per_s": case.bytes_moved / median / 1e9,
                    "over_embedding": ratio,
                }
                rows.append(row)
                numbers = [
                    f"{row[column]:.4g}" for column in ("median_ms", "p10_ms", "p90_ms", "gb_per_s")
                ]
                lines.append(
                    f"| {row['shape']} | {dtype} | {name} | {' | '.join(numbers)} | {ratio:.2f}x |"
                )
                print(lines[-1])
    arguments.results.mkdir(parents=True, exist_ok=True)
    with (arguments.results / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows(row | {"machine": machine} for row in rows)
    (arguments.results / "gpu.md").write_text(
        "\n".join(lines) + f"\n\n{machine}. Medians of {arguments.rounds} interleaved rounds.\n"
    )
    draw(arguments.results / "gpu.png", ratios, machine)
    print(f"wrote {arguments.results}/gpu.csv, gpu.md, gpu.png")


if __name__ == "__main__":
    main()
