"""What torch.compile makes of NEFTune for an NVIDIA GPU, without one: `python -m
bench.inductor_code [--json]`.

Both rivals, and the start of a Llama and of a GPT-2 up to the first matmul, are captured on the
CPU, their ATen graphs moved to a stubbed sm_90 device, and Inductor's Triton kernels compiled
offline.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import neftune_kernels  # noqa: F401  (its operators)
from bench.disassembly import loops, parsed, resources, sass

BATCH, LENGTH, VOCABULARY, D = 8, 512, 32000, 4096
ALPHA = 5.0
TARGET = GPUTarget("cuda", 90, 32)
ITEMSIZES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
UNIFORM_KERNELS = (
    "clone",
    "uniform_",
)  # what the extern call aten.uniform launches, read in ATen: a copy of its argument, then the draw
UNIFORM_BYTES = 3 * 2  # the copy's read and write, the draw's write
H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
)


def plain(input_ids: torch.Tensor, weight: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(input_ids, weight)


def hook(input_ids: torch.Tensor, weight: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
    """transformers' neftune_post_forward_hook behind an embedding."""
    output = torch.nn.functional.embedding(input_ids, weight)
    dims = torch.tensor(output.size(1) * output.size(2))
    mag_norm: Any = ALPHA / torch.sqrt(dims)
    return output + torch.zeros_like(output).uniform_(-mag_norm, mag_norm)


def rewrite(input_ids: torch.Tensor, weight: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
    output = torch.nn.functional.embedding(input_ids, weight)
    return output + (torch.rand_like(output) * 2 - 1) * (
        ALPHA / math.sqrt(output.size(1) * output.size(2))
    )


class Case(NamedTuple):
    function: Callable[..., Any]
    d: int
    inputs: tuple[torch.Tensor, ...]


def lookup_inputs(d: int) -> tuple[torch.Tensor, ...]:
    """Ids, the table, and what ours has drawn: a seed, and alpha, which stays with the host."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    alpha = torch.full((), ALPHA, dtype=torch.float64)
    table = torch.empty(VOCABULARY, d, dtype=torch.bfloat16)
    return ids, table, torch.zeros((), dtype=torch.int64), alpha


RIVALS = {
    "HF hook, compiled": Case(hook, D, lookup_inputs(D)),
    "rand_like rewrite, compiled": Case(rewrite, D, lookup_inputs(D)),
}


def ours(input_ids: torch.Tensor, weight: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
    """The operator that a compiled module calls."""
    out: torch.Tensor = torch.ops.neftune_kernels.noisy_embedding(input_ids, weight, *drawn)
    return out


Lookup = Callable[..., torch.Tensor]
LOOKUPS: dict[str, Lookup] = {
    "no noise": plain,
    "rand_like rewrite": rewrite,
    "HF hook": hook,
    "ours": ours,
}


def llama(lookup: Lookup) -> Callable[..., Any]:
    """LlamaModel up to the first block's first matmul: the residual and its RMSNorm."""

    def start(norm: torch.Tensor, *looked_up: torch.Tensor) -> Any:
        hidden = lookup(*looked_up)
        wide = hidden.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        return hidden, norm * (wide * torch.rsqrt(variance + 1e-6)).to(hidden.dtype)

    return start


def gpt2(lookup: Lookup) -> Callable[..., Any]:
    """GPT2Model, likewise: the positions' rows are added, then LayerNorm."""

    def start(
        positions: torch.Tensor, norm: torch.Tensor, bias: torch.Tensor, *looked_up: torch.Tensor
    ) -> Any:
        hidden = lookup(*looked_up) + positions
        return hidden, torch.nn.functional.layer_norm(hidden, norm.shape, norm, bias)

    return start


def start_cases() -> dict[str, Case]:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    cases = {}
    for name, lookup in LOOKUPS.items():
        inputs = ones(D), *lookup_inputs(D)
        cases[f"Llama, d = {D}, {name}"] = Case(llama(lookup), D, inputs)
    d = 1024
    for name, lookup in LOOKUPS.items():
        inputs = ones(LENGTH, d), ones(d), ones(d), *lookup_inputs(d)
        cases[f"GPT-2, d = {d}, {name}"] = Case(gpt2(lookup), d, inputs)
    return cases


@contextlib.contextmanager
def stubbed_device() -> Iterator[None]:
    """torch.cuda as it would answer on an H100; nothing is ever launched."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "_lazy_init": lambda: None,
    }
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch.utils._triton import has_triton

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            for holder in (
                CudaInterface,
                CudaInterface.Worker,
            ):  # they keep their own references, taken at import
                if hasattr(holder, name):
                    stack.enter_context(mock.patch.object(holder, name, staticmethod(answer)))
        has_triton.cache_clear()  # the capture on the CPU asked before
        stack.enter_context(
            mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None)
        )  # the driver wants libcuda
        stack.enter_context(
            mock.patch.object(
                triton.runtime.driver,
                "_active",
                types.SimpleNamespace(get_current_target=lambda: TARGET),
            )
        )
        yield


class Captured(Exception):
    pass


def captured_graph(case: Case) -> torch.fx.GraphModule:
    """The ATen graph that AOTAutograd and the joint-graph passes hand to Inductor's lowering; fails
    at a graph break.
    """
    from torch._inductor.compile_fx import compile_fx

    graphs: list[torch.fx.GraphModule] = []

    def stop(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        raise Captured

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=stop)  # type: ignore[arg-type]

    torch._dynamo.reset()
    with contextlib.suppress(
        Exception
    ):  # Captured comes back wrapped in the compiler's own exceptions
        torch.compile(case.function, backend=backend, fullgraph=True)(*case.inputs)
    if len(graphs) != 1:
        raise RuntimeError(f"{len(graphs)} graphs captured instead of one")
    return graphs[0]


def on_gpu(graph: torch.fx.GraphModule, alpha_too: bool = False) -> list[torch.Tensor]:
    """Moves devices and fake values from CPU to GPU in place and returns the inputs. Running the
    operators on fake GPU tensors instead would ask for device guards that a CPU build lacks.
    """
    gpu = torch.device("cuda", 0)
    inputs: list[torch.Tensor] = []

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cpu":
            return gpu
        if isinstance(value, torch._subclasses.FakeTensor):
            if value.dtype == torch.float64 and not value.dim() and not alpha_too:  # alpha
                return value
            with value.fake_mode:
                return torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=gpu
                )
        return value

    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        if node.op == "placeholder":
            inputs.append(node.meta["val"])
    graph.recompile()
    return inputs


def partitions(case: Case) -> tuple[int, set[str]]:
    """How many functions Inductor makes of a call for CUDA graphs, and why more than one."""
    from torch._inductor import config
    from torch._inductor.scheduler import Scheduler

    reasons: set[str | None] = set()
    asked = Scheduler.should_partition

    def noted(self: Any, node: Any) -> str | None:
        reasons.add(asked(self, node))
        return asked(self, node)

    with (
        config.patch({"triton.cudagraphs": True, "graph_partition": True}),
        mock.patch.object(Scheduler, "should_partition", noted),
    ):
        code = wrapper_code(case, alpha_on_gpu=True)
    return code.count("def partition_"), {reason for reason in reasons if reason}


def wrapper_code(case: Case, alpha_on_gpu: bool = False) -> str:
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graph = captured_graph(case)
    with stubbed_device():
        inputs = on_gpu(graph, alpha_on_gpu)
        record_original_output_strides(graph)
        fake_mode = inputs[0].fake_mode  # type: ignore[attr-defined]
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=fake_mode.shape_env)
        with (
            V.set_fake_mode(fake_mode),
            V.set_graph_handler(lowering),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return str(code.value)


def load(name: str, source: str, folder: pathlib.Path) -> Any:
    """Inductor's autotuner of one kernel; Triton wants the source in a file."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def measure(name: str, source: str) -> dict[str, Any]:
    """Compiled with the first configuration of Inductor's heuristics; the autotuner of a GPU may
    settle on another.
    """
    with tempfile.TemporaryDirectory() as folder, stubbed_device():
        tuner = load(name, source, pathlib.Path(folder))
        meta, config = tuner.triton_meta, tuner.configs[0]
        constants = {**meta.get("constants", {}), **config.kwargs}
        signature = {n: meta["signature"].get(n, "constexpr") for n in tuner.fn.arg_names}
        constants = {n: value for n, value in constants.items() if n in signature}
        signature.update(dict.fromkeys(constants, "constexpr"))
        options = {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "debug": True,
            "sanitize_overflow": False,
        }
        options["enable_fp_fusion"] = meta.get("enable_fp_fusion", True)
        kernel: Any = triton.compile(
            ASTSource(tuner.fn, signature, constants, meta["configs"][0]),
            target=TARGET,
            options=options,
        )
    code = parsed(name, sass(kernel.asm["cubin"]))
    block = math.prod(value for key, value in config.kwargs.items() if key.endswith("BLOCK"))
    instructions, elements = float(len(code.lines)), block
    rows = re.search(r"r0_numel = (\d+)", source)
    if rows:  # a reduction: a program walks whole rows, and the compiler may unroll its loops
        elements = int(rows[1]) * config.kwargs.get("XBLOCK", 1)
        trips = math.ceil(int(rows[1]) / config.kwargs.get("R0_BLOCK", elements))
        walks = loops(code)
        if walks and trips != 2:  # two trips are a loop or unrolled, nothing between
            raise RuntimeError(f"{name}: {len(walks)} loops of {trips} trips or of fewer")
        instructions += (trips - 1) * sum(loop.last + 1 - loop.first for loop in walks)
    threads = config.num_warps * TARGET.warp_size
    return {
        "per_element": instructions / (elements / threads),
        "bytes": sum(ITEMSIZES.get(str(meta["signature"].get(one)), 0) for one in rows_of(source)),
        "registers": resources(kernel.asm["cubin"]).registers,
        "choice": f"{block} elements and {config.num_warps} warps",
    }


def rows_of(source: str) -> list[str]:
    """The tensors that a kernel reads or writes for every token, those that it does both to twice:
    what it has written or read before comes from a cache, and so do a norm's weights.
    """
    accesses = re.findall(r"tl\.(load|store)\((\w+) \+ \((.*?)\), ", source)
    moved = {
        (kind, pointer)
        for kind, pointer, index in accesses
        if not re.fullmatch(r"r0_\d+", index) and not (kind == "load" and pointer[:4] == "out_")
    }
    return [pointer for _, pointer in moved]


def measured(name: str, case: Case) -> dict[str, Any]:
    code = wrapper_code(case)
    sources = dict(
        re.findall(
            r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'",
            code,
            re.DOTALL | re.MULTILINE,
        )
    )
    body = code[code.index("def call(") :].split("def benchmark_compiled_module")[0]
    kernels = {
        kernel: measure(kernel, sources[kernel])
        for kernel in re.findall(r"^\s+(\w+)\.run\(", body, re.MULTILINE)
    }
    uniforms = body.count("torch.ops.aten.uniform.default(")
    seeds = len(re.findall(r"aten\.randint\.\w+\(", body))
    own = body.count("torch.ops.neftune_kernels.noisy_embedding.default(")
    return {
        "name": name,
        "d": case.d,
        "ours": own,  # of the project's own kernels, which bench.codegen counts
        "launches": len(kernels) + uniforms * len(UNIFORM_KERNELS) + seeds + own,
        "bytes_per_element": float(
            sum(found["bytes"] for found in kernels.values()) + uniforms * UNIFORM_BYTES
        ),
        "instructions_per_element": round(
            sum(found["per_element"] for found in kernels.values()), 2
        ),
        "uncounted": [*UNIFORM_KERNELS] * uniforms,  # ATen's own kernels: no code here to count
        "registers": max(found["registers"] for found in kernels.values()),
        "kernels": [
            *(f"{kernel} ({found['choice']})" for kernel, found in kernels.items()),
            *([*UNIFORM_KERNELS] * uniforms + ["randint"] * seeds),
        ],
    }


def rivals() -> list[dict[str, Any]]:
    return _elsewhere("rivals")


def starts() -> list[dict[str, Any]]:
    """From the ids to the first matmul."""
    return _elsewhere("starts")


def _elsewhere(what: str) -> list[dict[str, Any]]:
    """In a process of their own, so that no stub or compiler cache is left behind in this one."""
    root = pathlib.Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.inductor_code", what, "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        version = torch.__version__
        about = f"bench.inductor_code failed with torch {version}: it follows Inductor's internals"
        raise RuntimeError(f"{about}\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'rival':30}{'launches':>9}{'bytes/element':>15}{'instructions/element':>22}{'regs':>6}"
    )
    for row in rows:
        uncounted = f" + {' and '.join(row['uncounted'])}, not counted" if row["uncounted"] else ""
        print(
            f"{row['name']:30}{row['launches']:9}{row['bytes_per_element']:15}{row['instructions_per_element']:22.2f}{row['registers']:6}"
            f"{uncounted}\n  {', '.join(row['kernels'])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", nargs="?", default="rivals", choices=("rivals", "starts"))
    parser.add_argument("--json", action="store_true", help="only JSON on stdout")
    parser.add_argument("--code", action="store_true", help="print Inductor's wrapper code instead")
    arguments = parser.parse_args()
    cases = RIVALS if arguments.what == "rivals" else start_cases()
    if arguments.code:
        print("\n".join(map(wrapper_code, cases.values())))
        return
    found = [measured(name, case) for name, case in cases.items()]
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"torch {torch.__version__}, triton {triton.__version__}, sm_90, bfloat16, ({BATCH}, "
        f"{LENGTH}); instructions up to EXIT\n"
    )
    print_rows(found)


if __name__ == "__main__":
    main()
