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
    others: tuple[type[nn.Module], ...] = ()  # judged where neither of those can be


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


# Their decoders take codes of sound, several a place; their encoders take tokens.
CODES = ("dia", "musicgen", "musicgen_melody")
SEVERAL = "takes codes of sound, several a place"
NO_TOKENS = {
    "Qwen3OmniMoeCode2WavConfig": "its forward refuses input_ids",
    "blt_local_decoder": "its forward takes embeddings alone",
    "canine": "hashes characters; there is no table of tokens",
    "csm": SEVERAL,
    "csm_depth_decoder_model": SEVERAL,
    "dia_decoder": SEVERAL,
    "fine_acoustics": SEVERAL,
    "kyutai_speech_to_text": SEVERAL,
    "moshi_depth": SEVERAL,
    "musicgen_decoder": SEVERAL,
    "musicgen_melody_decoder": SEVERAL,
    "qwen3_omni_moe_talker_code_predictor": "its forward refuses input_ids",
    "qwen3_omni_moe_talker_text": "its forward looks up in a table that it does not have",
}


def taken(entry: Entry, model: type[nn.Module]) -> list[str]:
    """The parameters of a model's forward, without those that are no tokens; a mask may be told to
    one that takes any argument (VibeVoice hands it on).
    """
    given = inspect.signature(model.forward).parameters.values()
    found = parameters(model)
    if "input_ids" in found and any(one.kind is one.VAR_KEYWORD for one in given):
        found += ["attention_mask"] * ("attention_mask" not in found)
    return [one for one in found if one != "decoder_input_ids"] if entry.name in CODES else found


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
        others = tuple(one for one in models if one not in (head, base))
        found.append(Entry(kind, config, head, base if base is not head else None, others))
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
LARGEST = 100_000_000  # parameters of a model that is built
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
COMPASS = {
    "num_hidden_layers": 2,
    **BOTH_KINDS,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": None,
    },
}
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
STAGES = {
    "backbone_config.stage_names": ["stem", "stage1", "stage2"],
    "backbone_config.out_features": ["stem", "stage1", "stage2"],
    "backbone_config.out_indices": [0, 1, 2],
    "backbone_config.num_heads": [2, 4],
    "backbone_config.image_size": 64,
    "num_queries": 16,
}
SMALL_IMAGE = {
    "vision_config.backbone_config.image_size": 112,
    "vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "detr_decoder_config.num_queries": 8,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Qwen3OmniMoeTalkerConfig": {
        "text_config.shared_expert_intermediate_size": 32,
        "spatial_merge_size": 2,
    },
    "align": {"vision_config.image_size": 64},
    "bailing_hybrid": {**GROUPED, "num_experts_per_token": 2},
    "bamba": MAMBA,
    "blip-2": {"qformer_config.use_qformer_text_input": True},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config.hidden_size_global": 32,
        "decoder_config.hidden_size_global": 32,
    },
    "chameleon": {"vocabulary_map": IMAGES},
    "clvp": {"text_config.use_rotary_embedding": False},
    "cohere_compass": {f"text_config.{name}": value for name, value in COMPASS.items()},
    "cohere_compass_text": COMPASS,
    "colqwen2": sections("vlm_config.text_config.", 2, 1, 1),
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "decision_transformer": {"vocab_size": VOCAB},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        **{f"text_config.{name}": value for name, value in GROUPED.items()},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **GROUPED},
    "deepseek_v2": GROUPED,
    "diffusion_gemma": {f"text_config.{name}": value for name, value in EXPERTS.items()},
    "diffusion_gemma_text": EXPERTS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **GROUPED},
    "emu3": {"vocabulary_map": IMAGES},
    "ernie4_5_vl_moe": sections("text_config.", 1, 1, 2),
    "ernie4_5_vl_moe_text": sections("", 1, 1, 2),
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"vocab_size": VOCAB},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 0,
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "glm46v": sections("text_config.", 2, 1, 1),
    "glm4v": sections("text_config.", 2, 1, 1),
    "glm4v_moe": sections("text_config.", 1, 1, 0),
    "glm4v_moe_text": sections("", 1, 1, 0),
    "glm4v_text": sections("", 2, 1, 1),
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "glm_image": {**sections("text_config.", 2, 1, 1), "vision_config.image_size": 32},
    "glm_image_text": sections("", 2, 1, 1),
    "glm_ocr": sections("text_config.", 2, 1, 1),
    "glm_ocr_text": sections("", 2, 1, 1),
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "vision_config.hidden_size": 64,
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": MAMBA,
    "grounding-dino": STAGES,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config.head_dim": 8, **sections("text_config.", 1, 1, 1, 1)},
    "hunyuan_vl_text": {"head_dim": 8, **sections("", 1, 1, 1, 1)},
    "kimi_linear": {**GROUPED, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "ministral": {"head_dim": 8},
    "mm-grounding-dino": STAGES,
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "nemotron_h_omni": {"text_config.mamba_num_heads": 8, "text_config.n_groups": 1},
    "owlv2": {"vision_config.image_size": 64},
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
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp": {f"text_config.{name}": value for name, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "hash_seed": 3,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "num_hashes": 1,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "sam3": SMALL_IMAGE,
    "sam3_lite_text": SMALL_IMAGE,
    "shieldgemma2": {"yes_token_index": 91, "no_token_index": 92},
    "speecht5": {"num_feat_extract_layers": 7, "vocab_size": VOCAB},
    "step3p5": {"sliding_window": 8},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "tipsv2": {"vision_config.out_features": ["stage2"], "vision_config.out_indices": [2]},
    "tvp": {"max_img_size": 32, "visual_prompt_size": 4, "num_frames": 2},
    "vibevoice": {
        "audio_config.num_filters": 4,
        "audio_config.depths": [1] * 7,
        "semantic_model_config.num_filters": 4,
        "semantic_model_config.depths": [1] * 7,
    },
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config.{name}": value
        for kind in ("acoustic", "semantic")
        for name, value in (("num_filters", 4), ("depths", [1] * 7))
    },
    "videoprism": {"vision_config.num_frames": 4, "vision_config.image_size": 36},
    "vits": {
        "vocab_size": VOCAB,
        "upsample_initial_channel": 32,
        "flow_size": 32,
        "duration_predictor_filter_channels": 32,
    },
    "whisper": {"max_source_positions": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 2, "layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": {
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1],
        "attention_head_dim": 16,
    },
    "speech-encoder-decoder": {"encoder.num_feat_extract_layers": 7},
    "clap": {"audio_config.hidden_size": 64},
    "fastspeech2_conformer": {"vocab_size": VOCAB},
    "fastspeech2_conformer_with_hifigan": {
        "model_config.vocab_size": VOCAB,
        "vocoder_config.upsample_initial_channel": 32,
    },
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


def _kosmos(rows: int, columns: int) -> dict[str, Any]:
    return {
        "image_embeds": torch.zeros(rows, 0, 32),
        "image_embeds_position_mask": torch.zeros(rows, columns, dtype=torch.bool),
    }


def _idefics(rows: int, columns: int) -> dict[str, Any]:
    return {
        "image_encoder_embeddings": torch.zeros(rows, 1, 5, 32),
        "image_attention_mask": torch.ones(rows, columns, 1, dtype=torch.int64),
    }


def _fastspeech(rows: int, columns: int) -> dict[str, Any]:
    return {
        "duration_labels": torch.ones(rows, columns, dtype=torch.int64),
        "pitch_labels": torch.zeros(rows, columns, 1),
        "energy_labels": torch.zeros(rows, columns, 1),
        "spectrogram_labels": torch.zeros(rows, columns, 80),
    }


def _siglip2(rows: int, columns: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.zeros(rows, 4, 768),
        "pixel_attention_mask": torch.ones(rows, 4, dtype=torch.int64),
        "spatial_shapes": torch.full((rows, 2), 2),
    }


def _blt(rows: int, columns: int) -> dict[str, Any]:
    return {"patch_lengths": torch.full((rows, columns // 4), 4)}


def _codes(rows: int, columns: int) -> dict[str, Any]:
    return {"decoder_input_ids": torch.zeros(rows * 4, 8, dtype=torch.int64)}


def _jev(rows: int, columns: int) -> dict[str, Any]:
    return {
        "marks": torch.full((rows, 1), columns),
        "num_options": torch.full((rows, 1), 2),
        "question_type_ids": torch.zeros(rows, 1, dtype=torch.int64),
    }


# What a forward asks for beside its tokens that no parameter's name tells.
OTHERS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "blt": _blt,
    "fastspeech2_conformer": _fastspeech,
    "fastspeech2_conformer_with_hifigan": _fastspeech,
    "idefics": _idefics,
    "jev": _jev,
    "kosmos-2": _kosmos,
    "blt_local_encoder": lambda rows, columns: {
        "patch_ids": torch.zeros(rows, columns, dtype=torch.int64),
        "num_patches": 1,
    },
    "molmo2": lambda rows, columns: {
        "mm_token_type_ids": torch.zeros(rows, columns, dtype=torch.int64)
    },
    "musicgen": _codes,
    "musicgen_melody": _codes,
    "pi0": lambda rows, columns: {
        "action_embeds": torch.zeros(rows, 4, 32),
        "pixel_values": torch.zeros(rows, 1, 3, 224, 224),
        "pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool),
    },
    "t5gemma2_decoder": lambda rows, columns: {"encoder_hidden_states": torch.zeros(rows, 4, 32)},
    "pix2struct": lambda rows, columns: {"flattened_patches": torch.zeros(rows, 8, 2 + 32)},
    "siglip2": _siglip2,
    "speech-encoder-decoder": lambda rows, columns: {"input_values": torch.zeros(rows, 4000)},
    "tvp": lambda rows, columns: {"pixel_values": torch.zeros(rows, 2, 3, 32, 32)},
    "voxtral_realtime_text": lambda rows, columns: {"t_cond": torch.zeros(1, 1, 32)},
}


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
        {"input_features": (rows, bins, 128), "flattened_patches": (rows, 8, 2 + 32)},
        {"input_features": (rows, 1, 1001, bins), "pixel_values": (rows, 2, *picture)},
    ]
    takes = parameters(type(model))
    tried = [made(rows, columns)] if (made := OTHERS.get(entry.name)) is not None else []
    for shape in shapes:
        filled: dict[str, Any] = {
            name: torch.randn(size, generator=generator)
            for name, size in {**shapes[0], **shape}.items()
        }
        filled["bbox"] = torch.zeros(rows, columns, 4, dtype=torch.int64)
        filled["qformer_input_ids"] = torch.ones(rows, 4, dtype=torch.int64)
        tried.append({name: value for name, value in filled.items() if name in takes})
        if "bbox" in takes:
            tried.append({**tried[-1], "bbox": filled["bbox"].float()})
    return [one for one in tried if one]
