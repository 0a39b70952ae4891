"""A tiny random model of every model type of the installed transformers that takes tokens.

Configurations are shrunk by the names of their fields, those of parts as well; what that does not
build is in the table of exceptions.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

VOCAB = 128
FIRST_ID, LAST_ID = 24, 90  # data; special tokens are moved out of this range
ROWS, COLUMNS = 3, 16
REAL = (16, 9, 4)  # tokens of each row
DOCUMENTS = [7, 5, 4]  # of the packed row
IDS = ("input_ids", "decoder_input_ids")


class Entry(NamedTuple):
    """A model type: its configuration class and the model classes that take token ids."""

    name: str
    config: type
    head: type[nn.Module] | None  # outermost
    base: type[nn.Module] | None


HEADS = (
    "ForConditionalGeneration",
    "ForCausalLM",
    "LMHeadModel",
    "MTModel",
    "ForMaskedLM",
    "WithLMHeadModel",
    "ForPreTraining",
    "For",
)


def parameters(model: type[nn.Module]) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def modelling_classes() -> list[type[nn.Module]]:
    """Every PreTrainedModel of transformers.models, by module and name."""
    import transformers

    found: list[type[nn.Module]] = []
    root = transformers.models.__path__[0]
    for package in pkgutil.iter_modules([root]):
        for module in pkgutil.iter_modules([f"{root}/{package.name}"]):
            if not module.name.startswith("modeling_"):
                continue
            name = f"transformers.models.{package.name}.{module.name}"
            try:
                loaded = importlib.import_module(name)
            except ImportError:  # torchaudio and the like
                continue
            found += [
                one
                for one in vars(loaded).values()
                if isinstance(one, type)
                and issubclass(one, transformers.PreTrainedModel)
                and one.__module__ == name
            ]
    return found


def entries() -> list[Entry]:
    by_config: dict[type, list[type[nn.Module]]] = {}
    for model in modelling_classes():
        config: Any = getattr(model, "config_class", None)
        if config is not None and any(name in IDS for name in parameters(model)):
            by_config.setdefault(config, []).append(model)
    found = []
    for config, models in by_config.items():
        kind: str = getattr(config, "model_type", "") or config.__name__
        head, base = _outermost(models), _base(models)
        found.append(Entry(kind, config, head, base if base is not head else None))
    names = [one.name for one in found]
    return sorted(
        one._replace(name=f"{one.name} ({one.config.__name__})")
        if names.count(one.name) > 1
        else one
        for one in found
    )


def _outermost(models: list[type[nn.Module]]) -> type[nn.Module]:
    for ending in HEADS:
        for model in models:
            if ending in model.__name__ and not model.__name__.endswith("PreTrainedModel"):
                return model
    return models[-1]


def _base(models: list[type[nn.Module]]) -> type[nn.Module]:
    bases = [one for one in models if one.__name__.endswith("Model")]
    bases = [one for one in bases if not one.__name__.endswith(("LMHeadModel", "MTModel"))]
    return min(bases or models, key=lambda one: len(one.__name__))


# ---- configurations

Rule = tuple[str, Callable[[int], int]]


def at_most(most: int) -> Callable[[int], int]:
    return lambda value: min(value, most)


def constant(value: int) -> Callable[[int], int]:
    return lambda _: value


def same(value: int) -> int:
    return value


def divided(by: int) -> Callable[[int], int]:
    return lambda value: value // by if value % by == 0 else value


# The first name that matches the whole field decides.
COUNTS: tuple[Rule, ...] = (
    (r".*vocab_size|n_vocab|vocab_size_.*|codebook_size|.*codebook_size", at_most(VOCAB)),
    (r"max_2d_position_embeddings|max_.*source_positions|position_buckets", same),
    (r".*max_position.*|n_positions|max_.*positions|n_ctx|max_seq_len|seq_length", constant(256)),
    (r".*window.*|local_attention|attention_chunk_size", at_most(8)),
    (r".*num_(hidden_)?layers|n_layers?|.*_layers|num_blocks|.*depth", at_most(2)),
    (r"n_group|topk_group|num_expert_group|.*limited_groups", constant(1)),
    (r".*num_experts_per_tok.*|moe_top_?k|router_top_?k|moe_k|top_k_experts", at_most(2)),
    (r"num_selected_experts|top_?k_experts|index_topk", at_most(4)),
    (r".*num_(local_|routed_)?experts|n_routed_experts|.*num_experts.*", at_most(4)),
    (r".*shared_experts", at_most(1)),
)
WIDTHS: tuple[Rule, ...] = (
    (r".*(num_)?(key_value|kv)_heads|.*num_.*kv_heads|.*n_head_kv|.*query_groups", constant(2)),
    (r".*num_key_heads|.*num_value_heads|.*v_heads|.*k_heads", at_most(4)),
    (r".*num_(attention_)?heads|.*n_heads?|.*attention_heads", at_most(4)),
    (r"attention_head_size|.*head_size", constant(8)),
    (r".*(head_dim|kv_channels|d_kv|nope_head_dim|rope_head_dim)", constant(8)),
    (r".*lora_rank|.*_rank|rank", at_most(16)),
    (r".*(intermediate|ffn|feed_forward|d_ff|inner|mlp).*(size|dim)?", at_most(64)),
    (r"num_mel_bins|.*conv_kernel.*|.*kernel.*|.*stride.*|.*groups.*|.*num_.*", same),
    (
        r".*(d_model|hidden_size|n_embd|hidden_dim|embed_dim|_dim|embedding_size|width)",
        constant(32),
    ),
    (r"dim|emb_dim|hidden|d_embed|d_state|.*state_size|.*projection_size", at_most(32)),
)
RATIOS: tuple[Rule, ...] = (
    (r".*num.*|.*heads?|.*kernel.*|.*stride.*|.*patch.*|.*image.*", same),
    (r".*(size|dim|d_model|n_embd|width|d_ff|d_kv|hidden|rank|inner|channels)", divided(8)),
)
# Tried in this order until one builds and runs.
WAYS = {"narrow": (*COUNTS, *WIDTHS), "an eighth": (*COUNTS, *RATIOS), "short": COUNTS}
PATTERNS = {
    way: tuple((re.compile(pattern), rule) for pattern, rule in rules)
    for way, rules in WAYS.items()
}
LARGEST = 70_000_000  # parameters of a model that is built
KEPT_OUT = ("transformers_version", "architectures", "_name_or_path", "id2label", "label2id")
LAYERS = re.compile(r"num_(hidden_)?layers|n_layers?|num_hidden_layers")
TOKEN = re.compile(r".*token_(id|index|ids)|.*_token|.*_id")
HEADS_OF = re.compile(r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads")
# What multiplies embeddings, by default 1 for most: here it does.
SCALES = re.compile(
    r"embedding_multiplier|scale_emb|(re)?scale_embeddings?|embedding_scale|embed_scale|mup_enabled"
)
DROPPED = re.compile(r".*(drop|dropout|dropout_rate|_prob|layerdrop|_pdrop|dropout_prob|_rate)")


class Shrunk:
    """One configuration as a dictionary with small numbers; token ids stay apart from the data."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.next_id = LAST_ID + 1
        self.moved: dict[int, int] = {}

    def token(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.token(one) for one in value]
        if isinstance(value, bool) or not isinstance(value, int) or value < FIRST_ID:
            return value
        if value not in self.moved:
            self.moved[value] = self.next_id
            self.next_id = min(self.next_id + 1, VOCAB - 1)
        return self.moved[value]

    def number(self, name: str, value: int) -> int:
        for pattern, rule in PATTERNS[self.way]:
            if pattern.fullmatch(name):
                return rule(value)
        return value

    def dictionary(self, data: dict[str, Any]) -> dict[str, Any]:
        layers = next(
            (n for name, n in data.items() if LAYERS.fullmatch(str(name)) and isinstance(n, int)), 0
        )
        kinds = data.get("layer_types") or data.get("layers_block_type")
        kept = list(range(min(layers, 2)))
        if isinstance(kinds, list) and len(kinds) == layers:
            firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
            kept = sorted({*firsts, *kept[: max(0, 2 - len(firsts))]})
        made = {
            name: self.field(name, value, layers, kept) if isinstance(name, str) else value
            for name, value in data.items()
            if name not in KEPT_OUT
        }
        heads = next((data[name] for name in data if HEADS_OF.fullmatch(str(name))), None)
        if self.way == "narrow" and heads is not None and data.get("num_key_value_heads") == heads:
            made["num_key_value_heads"] = self.number("num_attention_heads", heads)
        return made

    def field(self, name: str, value: Any, layers: int, kept: list[int]) -> Any:
        if isinstance(value, dict):
            if name == "per_layer_config":  # keyed by layer
                by_layer = {int(layer): one for layer, one in value.items()}
                return {
                    new: self.dictionary(by_layer[old])
                    for new, old in enumerate(kept)
                    if old in by_layer
                }
            return self.rope(value) if "rope" in name else self.dictionary(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1:
            return 0.0 if DROPPED.fullmatch(name) else value
        if name in ("use_cache", "output_router_logits"):
            return False
        if SCALES.fullmatch(name) and isinstance(value, (bool, int, float)):
            return True if isinstance(value, bool) else 3.0
        if name in ("router_jitter_noise", "jitter_eps", "input_jitter_eps", "layerdrop"):
            return 0.0
        if TOKEN.fullmatch(name):
            return self.token(value)
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            return [value[place] for place in kept]
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if LAYERS.fullmatch(name) and value == layers:
            return len(kept)
        return self.number(name, value)

    def rope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Sections of a head's dimensions; heads are 8 wide where they are narrow."""
        made = {
            name: self.rope(one) if isinstance(one, dict) else one for name, one in value.items()
        }
        if self.way == "narrow" and "mrope_section" in made:
            made["mrope_section"] = [2, 1, 1]
        return made


def shrunk_config(kind: type, way: str, changes: dict[str, Any] | None = None) -> Any:
    """A small configuration of the class; changes: of fields, "text_config.vocab_size" of parts."""
    made: Any = kind
    data = Shrunk(way).dictionary(made().to_dict())
    for path, value in (changes or {}).items():
        inner = data
        *parts, last = path.split(".")
        for part in parts:
            if inner.get(part) is None:
                inner[part] = {}
            inner = inner[part]
        inner[last] = value
    data.pop("model_type", None)
    return made(**data)


# ---- exceptions: fields that their names do not tell


def sections(prefix: str, *widths: int) -> dict[str, Any]:
    """Of a head's rotary dimensions for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(widths)}
    return {f"{prefix}rope_parameters.{name}": value for name, value in rope.items()}


INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
GROUPED = {"num_expert_group": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
IMAGES = {"<image>": 99, "<|extra_200|>": 98, "IMGIMGA": 97}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Qwen3OmniMoeTalkerConfig": {"text_config.shared_expert_intermediate_size": 32},
    "align": {"vision_config.image_size": 64},
    "bailing_hybrid": {**GROUPED, "num_experts_per_token": 2},
    "bamba": MAMBA,
    "chameleon": {"vocabulary_map": IMAGES},
    "cohere_compass_text": BOTH_KINDS,
    "colqwen2": sections("vlm_config.text_config.", 2, 1, 1),
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **GROUPED},
    "deepseek_v2": GROUPED,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **GROUPED},
    "emu3": {"vocabulary_map": IMAGES},
    "ernie4_5_vl_moe": sections("text_config.", 1, 1, 2),
    "ernie4_5_vl_moe_text": sections("", 1, 1, 2),
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"vocab_size": VOCAB},
    "glm46v": sections("text_config.", 2, 1, 1),
    "glm4v": sections("text_config.", 2, 1, 1),
    "glm4v_moe": sections("text_config.", 1, 1, 0),
    "glm4v_moe_text": sections("", 1, 1, 0),
    "glm4v_text": sections("", 2, 1, 1),
    "glm_image_text": sections("", 2, 1, 1),
    "glm_ocr": sections("text_config.", 2, 1, 1),
    "glm_ocr_text": sections("", 2, 1, 1),
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "kimi_linear": {**GROUPED, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "paddleocr_vl": sections("text_config.", 2, 1, 1),
    "paddleocr_vl_text": sections("", 2, 1, 1),
    "perceiver": {"d_latents": 32, "num_latents": 8, "image_size": 16, "train_size": [16, 16]},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen2_5_omni_talker": sections("", 2, 1, 1),
    "qwen2_5_omni_text": sections("", 2, 1, 1),
    "qwen2_5_omni_thinker": sections("text_config.", 2, 1, 1),
    "qwen2_5_vl": sections("text_config.", 2, 1, 1),
    "qwen2_5_vl_text": sections("", 2, 1, 1),
    "qwen2_vl": sections("text_config.", 2, 1, 1),
    "qwen2_vl_text": sections("", 2, 1, 1),
    "qwen4_exp": {f"text_config.{name}": value for name, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "num_hashes": 1,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "step3p5": {"sliding_window": 8},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "whisper": {"max_source_positions": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8},
}


def build(entry: Entry, model: type[nn.Module], way: str) -> nn.Module:
    config = shrunk_config(entry.config, way, EXCEPTIONS.get(entry.name))
    made: Any = model
    with torch.device("meta"):
        size = sum(one.numel() for one in made(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    built: nn.Module = made(config)
    return built.float().train()


# ---- inputs


def _sub_configs(config: Any) -> list[Any]:
    values = vars(config).values()
    return [
        config,
        *(two for one in values if hasattr(one, "to_dict") for two in _sub_configs(one)),
    ]


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    for one in _sub_configs(config):
        for name in names:
            if isinstance(getattr(one, name, None), (int, list, tuple)):
                return getattr(one, name)
    return default


def other_inputs(entry: Entry, model: nn.Module, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What a forward may need beside its tokens, by its parameters' names: in the shapes that
    models take them in, to be tried in turn.
    """
    config: Any = model.config
    rows, columns = next(iter(given.values())).shape
    generator = torch.Generator().manual_seed(3)
    image = _first(config, ("image_size",), 32)
    image = image if isinstance(image, int) else image[0]
    channels = _first(config, ("num_channels", "in_channels"), 3)
    bins = _first(config, ("num_mel_bins", "feature_size", "input_feat_per_channel"), 80)
    picture = (channels, image, image)
    shapes: list[dict[str, tuple[int, ...]]] = [
        {
            "pixel_values": (rows, *picture),
            "pixel_values_videos": (rows, 4, *picture),
            "input_features": (rows, bins, 64),
            "input_values": (rows, 4000),
            "flattened_patches": (rows, 8, 2 + 768),
            "visual_feats": (rows, 4, 2048),
            "visual_pos": (rows, 4, 4),
        },
        {"pixel_values": (rows, 8, *picture), "input_features": (rows, 64, bins)},
        {"input_values": (rows, 1, 4000), "pixel_values": (rows, *picture)},
    ]
    takes = parameters(type(model))
    tried = []
    for shape in shapes:
        made: dict[str, Any] = {
            name: torch.randn(size, generator=generator)
            for name, size in {**shapes[0], **shape}.items()
        }
        made["bbox"] = torch.zeros(rows, columns, 4, dtype=torch.int64)
        tried.append({name: value for name, value in made.items() if name in takes})
        if "bbox" in takes:
            tried.append({**tried[-1], "bbox": made["bbox"].float()})
    return [one for one in tried if one]
