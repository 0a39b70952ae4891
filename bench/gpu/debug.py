"""NEFTUNE_DEBUG=1, good calls pass, a bad one dies of the assert: `python -m bench.gpu.debug`."""

import os
import sys

from . import process
from .report import fenced, table
from .step import FAILED, PASSED, Setting, log_of, parser_of, setting_of

PROGRAM = """
import sys, torch
from neftune_kernels import noisy_embedding
device, bad = sys.argv[1], sys.argv[2] == "bad"
synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
ids = torch.randint(30, (3, 41), device=device)
if bad:
    ids[1, 7] = 99
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    weight = torch.randn(30, 64, device=device).to(dtype)
    mask = torch.randint(0, 3, (3, 41), device=device)
    place = torch.arange(41, device=device)[None] % 11
    for given in (
        {},
        {"attention_mask": mask},
        {"lengths": torch.tensor([41, 0, 7], device=device)},
        {"cu_seqlens": torch.tensor([0, 50, 50, 123], device=device)},
        {"position_ids": place},
        {"padding_idx": 0, "embed_scale": 1.7},
    ):
        out = noisy_embedding(ids, weight, 5.0, **given)
        synchronise()
        if not bool(out.isfinite().all()):
            sys.exit(f"not finite with {dtype} {list(given)}")
print("every call passed")
"""
MESSAGE = "input_ids must lie in [0, num_embeddings"


def debug(setting: Setting) -> int:
    failed, lines = False, []
    for kind in ("good", "bad"):
        log = log_of(setting.folder, f"{setting.name}-{kind}")
        log.unlink(missing_ok=True)
        command = [sys.executable, "-c", PROGRAM, setting.device, kind]
        limit = max(1.0, setting.left / 2)
        ended = process.run(command, limit, log, env=os.environ | {"NEFTUNE_DEBUG": "1"})
        if kind == "good":
            right, expected = ended.code == 0, "exit status 0"
        else:
            right = bool(ended.code) and MESSAGE in log.read_text(errors="replace")
            expected = f"an exit status that is not 0, and {MESSAGE!r}"
        failed = failed or not right
        outcome, note = "passed" if right else "failed", str(ended)
        if not right:
            note += f", expected {expected}"
        setting.write(f"a {kind} call", outcome, seconds=ended.seconds, note=note)
        lines.append((f"a {kind} call", outcome, note))
        if not right:
            print(f"A {kind} call:\n{fenced(process.tail(log, 15))}")
    print(table(("NEFTUNE_DEBUG=1", "", ""), lines))
    return FAILED if failed else PASSED


def main(arguments: list[str] | None = None) -> int:
    return debug(setting_of(parser_of(__doc__, "debug"), arguments))


if __name__ == "__main__":
    sys.exit(main())
