"""The tools people run, each by its own command and config file: `make ways`.

    python -m bench.ways            goes on where it stopped; writes bench/results/ways.md
    python -m bench.ways NAMES      only these, and prints what was found

Each tool has an environment below build/ways/environments, with exactly what bench/pins/ names.
It runs two steps of a tiny model by the files of examples/ways, as docs/ways shows them, with
model, data and size replaced: before, as it would run without this package, and with it. Every
sample is judged by bench/ways_probe, which shares no code with the package: what arrives behind
the embedding must be at most alpha / sqrt(L d) away from the table's row and come near that, L
being the sample's own tokens; padding must not be touched, and a forward without grad neither.
A sample that is as long as its padded batch is exact either way.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from .resumed import ROOT, digest_of, fingerprint, judged_one_by_one

RESULT = ROOT / "bench/results/ways.md"
BUILD = ROOT / "build/ways"
PINS = ROOT / "bench/pins"
DONE = BUILD / "done.jsonl"
FILES = ROOT / "examples/ways"
PROBE = ROOT / "bench/ways_probe"
ALPHA = 5.0
SECONDS = 600  # of one command
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 11))]
VOCABULARY = len(WORDS)
LENGTHS = [9, 5, 3, 2, 8, 4, 6, 7]


class Way(NamedTuple):
    tool: str  # bench/pins/ways-TOOL.txt, examples/ways/TOOL
    config: str  # the file that the command reads
    before: str  # the command as people run it; "": without us it is not run
    ours: str  # and with this package
    tiny: dict[str, Any]  # what replaces keys of the config; without one, arguments of the command
    added: tuple[str, ...] = ()  # paths in the config of what is to be added to it
    data: Callable[[], str] | None = None  # data/train.jsonl
    prepare: Callable[[pathlib.Path], None] | None = None  # in the tool's environment
    packed: int | None = None  # the token that opens every document of a packed row
    stops: str = ""  # of what needs a GPU: the error that ends it on a CPU

    @property
    def command(self) -> str:
        """What its page shows; of a part of the tool, which bench drives, there is none."""
        return "" if self.stops or " -m bench." in self.ours else self.ours


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def texts() -> str:
    return _lines([{"text": " ".join([f"w{3 + i}"] * n)} for i, n in enumerate(LENGTHS)])


def alpaca() -> str:
    """Long answers, beside which the prompt's words count little."""
    answers = [" ".join([f"w{3 + i}"] * 20 * n) for i, n in enumerate(LENGTHS)]
    return _lines([{"instruction": "w3", "input": "", "output": answer} for answer in answers])


def preferences() -> str:
    def answer(i: int, words: int) -> dict[str, str]:
        return {"role": "assistant", "content": " ".join([f"w{3 + i}"] * words)}

    question = [{"role": "user", "content": "w3"}]
    return _lines([
        {"conversation": question, "chosen": answer(i, 20 * n), "rejected": answer(i, 9 * n)}
        for i, n in enumerate(LENGTHS)
    ])  # fmt: skip


HUGGING_FACE = {  # transformers' TrainingArguments, by whichever tool
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1.0e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


AXOLOTL = {"base_model": "model", "max_steps": 2, "logging_steps": 1, "bf16": False}
JSON_LINES = {"path": "data/train.jsonl", "ds_type": "json"}
AXOLOTL |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "flash_attention": False}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def llama(folder: pathlib.Path) -> None:
    """model/: a tiny Llama and its tokenizer, whose padding is no other token."""
    import transformers

    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **SPECIAL)
    made.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")


def litgpt(folder: pathlib.Path) -> None:
    """The same as LitGPT keeps it."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config

    (folder / "model").mkdir()
    tokenizer().save(str(folder / "model/tokenizer.json"))
    named = {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model/tokenizer_config.json").write_text(json.dumps(named))
    config = Config(
        name="tiny", block_size=512, padded_vocab_size=VOCABULARY, vocab_size=VOCABULARY,
        n_layer=1, n_head=2, n_embd=64, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=64,
    )  # fmt: skip
    torch.save(GPT(config).state_dict(), folder / "model/lit_model.pth")
    save_config(config, folder / "model")


TORCHTUNE_WORDS = """
class Words:
    pad_id, eos_id = 0, 1

    def __init__(self, max_seq_len):
        self.max_seq_len = max_seq_len

    def encode(self, text, add_bos, add_eos):
        return [int(word[1:]) for word in text.split()] + [self.eos_id] * add_eos
"""


def torchtune(folder: pathlib.Path) -> None:
    """A tiny Llama, and a tokenizer, since torchtune brings none but other people's files."""
    import torch
    from torchtune.models.llama3 import llama3

    (folder / "words.py").write_text(TORCHTUNE_WORDS)
    (folder / "model").mkdir()
    model = llama3(VOCABULARY, 1, 2, 2, 64, max_seq_len=512)
    torch.save(model.state_dict(), folder / "model/model.pt")


def llama_and_list(folder: pathlib.Path) -> None:
    """And LLaMA-Factory's list of the files in data/."""
    llama(folder)
    listed = {"tiny": {"file_name": "train.jsonl"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(listed))


# What torchrun says to a process.
ONE_RANK = (
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 TORCHELASTIC_RUN_ID=1"
)
WAYS: dict[str, Way] = {
    "TRL, SFT": Way(
        "trl",
        "sft.yaml",
        "trl sft --config sft.yaml",
        "neftune-run trl sft --config sft.yaml",
        {"model_name_or_path": "model", "dataset_name": "data", "dtype": "float32", **HUGGING_FACE},
        data=texts,
        prepare=llama,
    ),
    "axolotl, SFT": Way(
        "axolotl",
        "sft.yaml",
        "axolotl train sft.yaml",
        "axolotl train sft.yaml",
        {**AXOLOTL, "datasets": [{**JSON_LINES, "type": "alpaca"}]},
        added=("plugins",),
        data=alpaca,
        prepare=llama,
    ),
    "axolotl, DPO": Way(
        "axolotl",
        "dpo.yaml",
        "axolotl train dpo.yaml",
        "axolotl train dpo.yaml",
        {
            **AXOLOTL,
            "chat_template": "chatml",
            "datasets": [
                {
                    **JSON_LINES,
                    "split": "train",
                    "type": "chat_template.default",
                    "field_messages": "conversation",
                }
            ],
        },
        added=("plugins",),
        data=preferences,
        prepare=llama,
    ),
    "ms-swift, SFT": Way(
        "swift",
        "sft.yaml",
        "swift sft sft.yaml",
        "swift sft sft.yaml",
        {
            "model": "model",
            "model_type": "llama",
            "template": "dummy",
            "dataset": ["data/train.jsonl"],
            "torch_dtype": "float32",
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            **HUGGING_FACE,
        },
        added=("external_plugins", "callbacks"),
        data=alpaca,
        prepare=llama,
    ),
    "LLaMA-Factory, SFT": Way(
        "llamafactory",
        "sft.yaml",
        "llamafactory-cli train sft.yaml",
        "neftune-run llamafactory-cli train sft.yaml",
        {
            "model_name_or_path": "model",
            "dataset": "tiny",
            "dataset_dir": "data",
            "template": "default",
            **HUGGING_FACE,
        },
        data=alpaca,
        prepare=llama_and_list,
    ),
    "LitGPT, finetune_full": Way(
        "litgpt",
        "full.yaml",
        "litgpt finetune_full --config full.yaml",
        "neftune-run --alpha 5 litgpt finetune_full --config full.yaml",
        {
            "checkpoint_dir": "model",
            "precision": "32-true",
            "data": {
                "init_args": {
                    "json_path": "data/train.jsonl",
                    "val_split_fraction": 0.25,
                    "num_workers": 0,
                }
            },
            "train": {"epochs": 2, "max_steps": 2},
        },
        data=alpaca,
        prepare=litgpt,
    ),
    "torchtune, full_finetune_single_device": Way(
        "torchtune",
        "",
        "",
        "tune run full_finetune_single_device --config llama3_2/1B_full_single_device "
        "model._component_=neftune.neftune model.builder=torchtune.models.llama3_2.llama3_2_1b "
        "model.noise_alpha=5 model.pad_id=128004",
        {
            "model.builder": "torchtune.models.llama3.llama3",
            "model.vocab_size": VOCABULARY,
            "model.num_layers": 1,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "model.embed_dim": 64,
            "model.max_seq_len": 512,
            "model.pad_id": 0,
            "tokenizer._component_": "words.Words",
            "~tokenizer.path": "",
            "~dataset.packed": "",
            "dataset._component_": "torchtune.datasets.text_completion_dataset",
            "dataset.source": "json",
            "dataset.data_files": "data/train.jsonl",
            "dataset.split": "train",
            "checkpointer._component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpointer.checkpoint_dir": "model",
            "checkpointer.checkpoint_files": "[model.pt]",
            "output_dir": "out",
            "optimizer._component_": "torch.optim.AdamW",
            "optimizer_in_bwd": False,
            "device": "cpu",
            "dtype": "fp32",
            "log_peak_memory_stats": False,
            "max_steps_per_epoch": 2,
        },
        data=texts,
        prepare=torchtune,
    ),
    "torchtitan, the model alone": Way(
        "torchtitan",
        "",
        "",
        "python -m bench.ways_torchtitan --module llama3 --config llama3_debugmodel "
        """--override.imports 'neftune.neftune={"noise_alpha": 5}'""",
        {},
        packed=2,
    ),
    "torchtitan, its Trainer": Way(
        "torchtitan",
        "",
        "",
        f"env {ONE_RANK} python -m torchtitan.train --module llama3 --config llama3_debugmodel "
        """--override.imports 'neftune.neftune={"noise_alpha": 5}'""",
        {},
        stops="module 'torch._C' has no attribute '_cuda_setDevice'",
    ),
    "NeMo Automodel, its recipe": Way(
        "automodel",
        "sft.yaml",
        "",
        f"env {ONE_RANK} python -m nemo_automodel.cli.app sft.yaml",
        {},
        stops="module 'torch._C' has no attribute '_cuda_resetPeakMemoryStats'",
    ),
    "NeMo Automodel, around its recipe": Way(
        "automodel", "", "", "python -m bench.ways_automodel", {}, prepare=llama
    ),
    "MMEngine": Way(
        "mmengine",
        "config.py",
        "",
        "python training.py config.py",
        {
            "model": {"pretrained": "model"},
            "train_dataloader": {"dataset": {"file": "data/train.jsonl", "pretrained": "model"}},
        },
        data=texts,
        prepare=llama,
    ),
    "Lightning CLI": Way(
        "lightning",
        "fit.yaml",
        "python train.py fit --config fit.yaml",
        "python train.py fit --config fit.yaml",
        {
            "model": {"pretrained": "model", "learning_rate": 1e-3},
            "data": {"file": "data/train.jsonl", "pretrained": "model"},
            "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1},
        },
        added=("trainer.callbacks",),
        data=texts,
        prepare=llama,
    ),
}
# Nothing is sent anywhere, nothing is looked for.
SILENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "2",
    "NEFTUNE_SELF_CHECK": "0",
}


# Compiled for CUDA, which a torch for the CPU cannot load; the package does without. So it does
# without torchvision, which its pins leave out; NeMo Automodel's leave out a triton too new for it.
WITHOUT = {"llamafactory": "torchaudio/lib"}


def environment(tool: str) -> pathlib.Path:
    """Of its own, with what the pins say and no more."""
    folder, pins = BUILD / "environments" / tool, PINS / f"ways-{tool}.txt"
    ready = folder / ".ready"
    if not ready.exists() or ready.read_text() != pins.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "-r", str(pins)], check=True)
        if tool in WITHOUT:
            (part,) = folder.glob(f"lib/*/site-packages/{WITHOUT[tool]}")
            shutil.rmtree(part)
        script = folder / "bin/neftune-run"
        script.write_text(f"#!{folder}/bin/python\nfrom neftune_run import main\n\nmain()\n")
        script.chmod(0o755)
        ready.write_text(pins.read_text())
    return folder


def variables(tool: str, folder: pathlib.Path) -> dict[str, str]:
    """Of a command in the tool's environment; its caches and settings are the folder's."""
    inherited = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    path = f"{environment(tool) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT)}
    return {**inherited, **SILENT, **own}


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {**config, **changes}
    return both | {
        key: merged(config[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }


def changed(way: Way, with_ours: bool) -> dict[str, Any]:
    """The way's config, tiny; without ours it is what it was before the added lines."""
    import yaml

    config = merged(yaml.safe_load((FILES / way.tool / way.config).read_text()), way.tiny)
    for added in () if with_ours else way.added:
        *path, last = added.split(".")
        del functools.reduce(dict.__getitem__, path, config)[last]
    return config


def prepared(name: str, way: Way, folder: pathlib.Path, with_ours: bool) -> None:
    """The folder that a command runs in: the files of docs/ways, a tiny model and some data."""
    import yaml

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FILES / way.tool, folder)
    (folder / "probe").mkdir()
    file = folder / way.config
    if file.suffix == ".py":  # MMEngine's
        file.rename(folder / "base.py")
        lines = [f"{key} = {value!r}" for key, value in way.tiny.items()]
        file.write_text("\n".join(["_base_ = './base.py'", *lines, ""]))
    elif way.config:
        file.write_text(yaml.safe_dump(changed(way, with_ours), sort_keys=False))
    if way.data is not None:
        (folder / "data").mkdir()
        (folder / "data/train.jsonl").write_text(way.data())
    if way.prepare is not None:
        inside = ["python", "-m", "bench.ways", "--prepare", str(folder), name]
        given = variables(way.tool, folder)
        subprocess.run(inside, env=given, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def is_near(row: dict[str, float], dim: int, length: float, alpha: float) -> bool:
    """Whether a row's noise is uniform of alpha / sqrt(L d)."""
    bound, drawn = alpha / math.sqrt(length * dim), row["length"] * dim
    spread = 3 * row["square"] / bound**2  # 1, with a deviation of sqrt(4 / 5) over drawn
    return 0.9 < row["largest"] / bound < 1.0001 and abs(spread - 1) < 6 * math.sqrt(0.8 / drawn)


def word_for(row: dict[str, float], columns: int, dim: int) -> str:
    if not row["largest"] and not row["padding"]:
        return "no noise"
    if is_near(row, dim, row["length"], ALPHA):
        return "noise on padding" if row["padding"] else "exact"
    if is_near(row, dim, columns, ALPHA):
        return "the padded length"
    return "another noise"


def verdict(folder: pathlib.Path) -> dict[str, Any]:
    files = sorted((folder / "probe").iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    trained = [line for line in lines if line["grad"]]
    words = Counter(
        word_for(row, line["columns"], line["dim"]) for line in trained for row in line["rows"]
    )
    clean = [not (row["largest"] or row["padding"]) for line in lines if not line["grad"]
             for row in line["rows"]]  # fmt: skip
    return {"forwards": len(trained), "words": words, "clean": clean.count(True),
            "disturbed": clean.count(False)}  # fmt: skip


def ran(name: str, way: Way, with_ours: bool) -> dict[str, Any]:
    folder = BUILD / "runs" / name.replace(" ", "-").replace(",", "") / str(int(with_ours))
    try:
        prepared(name, way, folder, with_ours)
        given = variables(way.tool, folder)
    except subprocess.CalledProcessError as error:  # pip, or the tiny model
        return stopped(f"{shlex.join(error.cmd)} ended with {error.returncode}")
    given["PYTHONPATH"] = os.pathsep.join([str(PROBE), given["PYTHONPATH"]])
    given["PROBE"] = str(folder / "probe")
    if way.packed is not None:
        given["PROBE_FIRST"] = str(way.packed)
    command = shlex.split(way.ours if with_ours else way.before)
    if not way.config:
        command += [f"{key}={value}" for key, value in way.tiny.items()]
    with (folder / "log").open("w") as log:
        try:
            code = subprocess.run(
                command, env=given, cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, timeout=SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return stopped(f"not done after {SECONDS} s")
    text = (folder / "log").read_text()
    said = re.findall(r"noise by neftune_kernels,.*", text)
    lines = [line for line in text.splitlines() if line and not line.startswith("neftune-run: ")]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    last = [*lines[-1:], *errors[-1:]][-1] if code and lines else ""
    return {**verdict(folder), "code": code, "said": said, "stopped": last}


def judged(name: str) -> dict[str, Any]:
    way = WAYS[name]
    found = {"before": ran(name, way, False) if way.before else None, "ours": ran(name, way, True)}
    return {**found, "date": time.strftime("%Y-%m-%d")}


def stopped(why: str) -> dict[str, Any]:
    """Of a command that did not come as far as its end, or to its beginning."""
    none = {"forwards": 0, "words": {}, "clean": 0, "disturbed": 0}
    return {**none, "code": 1, "said": [], "stopped": why}


def is_right(found: dict[str, Any], stops: str = "") -> bool:
    if stops:
        return bool(found["code"]) and stops in found["stopped"]
    return (
        found["code"] == 0
        and found["forwards"] >= 2
        and set(found["words"]) == {"exact"}
        and not found["disturbed"]
    )


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if found["code"]:
        return f"stops: `{found['stopped'][:150]}`"
    counts = found["words"]
    total = sum(counts.values())
    told = [f"{word} {count} of {total}" for word, count in sorted(counts.items())]
    if found["disturbed"]:
        told += [f"noise without grad {found['disturbed']}"]
    return ", ".join(told) or "no forward"


def pinned(tool: str) -> str:
    own, *others = (PINS / f"ways-{tool}.txt").read_text().split()
    return f"{own} and {len(others)} more"


def written(entries: list[dict[str, Any]]) -> str:
    lines = ["# The tools people run", "", __doc__.split("\n\n")[-1].strip(), ""]
    lines += ["| tool | pins | command | without us | with us | date |", "|" + "---|" * 6]
    for found in entries:
        way = WAYS[found["name"]]
        cells = [found["name"], pinned(way.tool), f"`{way.ours}`"]
        cells += [cell(found["before"]), cell(found["ours"]), found["date"]]
        lines.append(f"| {' | '.join(one.replace('|', '/') for one in cells)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=", ".join(WAYS))
    parser.add_argument("--prepare", type=pathlib.Path, help="model and data here, for one")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare = WAYS[arguments.names[0]].prepare
        assert prepare is not None
        prepare(arguments.prepare)
        return 0
    names = arguments.names or list(WAYS)
    own = [
        "ways.py",
        "ways_torchtitan.py",
        "ways_automodel.py",
        *(f"pins/{one.name}" for one in PINS.glob("ways-*.txt")),
    ]
    files = [one for place in (FILES, PROBE, ROOT / "neftune_run") for one in place.rglob("*.*")]
    files = sorted(one for one in files if one.is_file() and one.suffix != ".pyc")
    sources = fingerprint(own) + digest_of(files)
    done = judged_one_by_one(names, DONE, sources, judged, anew=bool(arguments.names))
    if arguments.names:
        print(json.dumps(done, indent=1))
        return 0
    entries = [done[name] for name in names]
    RESULT.write_text(written(entries))
    return int(not all(is_right(found["ours"], WAYS[found["name"]].stops) for found in entries))


if __name__ == "__main__":
    sys.exit(main())
