"""What is known of other people's models, keyed by what their forward is called: samples told under
names of their own, and what embeddings are multiplied by after the lookup.

A row is found by (top package, forward.__qualname__): a namesake in a user's own package has none.
A test reads transformers' sources and holds its rows against them.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import parameter_names, takes_any
from .telling import documents_of

Given = dict[str, Any]
Row = Callable[[Given], Given]  # a forward's arguments → those that transformers would call them


def _renamed(ids: str, name: str, word: str) -> Row:
    def read(given: Given) -> Given:
        return {"input_ids": given.get(ids), word: given.get(name)}

    return read


def _by_lengths(ids: str, name: str) -> Row:
    """Documents' lengths, as a mask that numbers them."""

    def read(given: Given) -> Given:
        tokens, lengths = given.get(ids), given.get(name)
        if lengths is None or not isinstance(tokens, Tensor):
            return {"input_ids": tokens}
        return {"input_ids": tokens, "attention_mask": documents_of(lengths, tokens)}

    return read


def _by_lists(ids: str, name: str) -> Row:
    """The same as a list of whole numbers that add up to the tokens, all in one row; anything else
    of that name says nothing.
    """
    by_lengths = _by_lengths(ids, name)

    def read(given: Given) -> Given:
        tokens, lengths = given.get(ids), given.get(name)
        known = (
            isinstance(tokens, Tensor)
            and tokens.dim() == 1
            and isinstance(lengths, (list, tuple))
            and all(type(one) is int for one in lengths)
            and sum(lengths) == tokens.numel()
        )
        return by_lengths(given) if known else {}

    return read


def _by_padding_idx(ids: str, decoder_ids: str = "") -> Row:
    """Padding is what the embeddings' padding_idx says, on whichever side: fairseq counts its
    lengths by that.
    """
    return lambda given: {
        "input_ids": given.get(ids),
        "decoder_input_ids": given.get(decoder_ids),
    }


def _by_sequence_id(ids: str) -> Row:
    """Documents' numbers from 0, negative or False for padding; a mask beside them counts too."""

    def read(given: Given) -> Given:
        number, mask = given.get("sequence_id"), given.get("attention_mask")
        if not isinstance(number, Tensor):
            return {"input_ids": given.get(ids)}
        if number.dtype != torch.bool:
            number = (number + 1).clamp(min=0)
        if isinstance(mask, Tensor) and mask.shape == number.shape:
            number = number * (mask != 0)
        return {"input_ids": given.get(ids), "attention_mask": number}

    return read


def _presence(given: Given) -> Given:
    """2 is attention to all tokens, no document of its own."""
    mask = given.get("attention_mask")
    return {"attention_mask": mask != 0} if isinstance(mask, Tensor) else {}


# ---- factors after the lookup: of the model that multiplies, and of the embeddings' dtype

Factor = Callable[[Any, torch.dtype], float]


def _attribute(name: str) -> Factor:
    return lambda model, dtype: float(getattr(model, name))


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype, device="cpu").item()  # type: ignore[return-value]


def _afmoe(model: Any, dtype: torch.dtype) -> float:
    return float(model.config.hidden_size**0.5) if model.config.mup_enabled else 1.0


def _fastspeech2(model: Any, dtype: torch.dtype) -> float:
    """In its positional encoding, a module beside the embedding."""
    return float(model.pos_enc.input_scale)


def _big_bird(model: Any, dtype: torch.dtype) -> float:
    return float(model.hidden_size**0.5) if model.rescale_embeddings else 1.0


def _ctrl(model: Any, dtype: torch.dtype) -> float:
    return float(model.d_model_size**0.5)


def _recurrent_gemma(model: Any, dtype: torch.dtype) -> float:
    """Its buffer is bfloat16 in every model; a meta one has no value yet."""
    return _rounded(model.config.hidden_size**0.5, torch.bfloat16)


def _t5gemma(model: Any, dtype: torch.dtype) -> float:
    return _rounded(model.config.hidden_size**0.5, dtype)


def _vits(model: Any, dtype: torch.dtype) -> float:
    return float(model.config.hidden_size**0.5)


# ---- factors that each sample has of its own: of the arguments of the model that multiplies

Each = Callable[[Given], Tensor]  # (rows,) or (rows, tokens)
TOKEN_DROPOUT = 1 - 0.15 * 0.8  # what ESM's training left of tokens


def _token_dropout(model: Any) -> Each | None:
    """Samples are scaled by what is left of their tokens once those to be guessed are zeroed."""
    return functools.partial(_by_masked, model.mask_token_id) if model.token_dropout else None


def _by_masked(mask_token: int, given: Given) -> Tensor:
    ids: Tensor = given["input_ids"]
    mask = given.get("attention_mask")
    length = ids.shape[1] if mask is None else mask.sum(-1)
    return TOKEN_DROPOUT / (1 - (ids == mask_token).sum(-1).float() / length)


def _fair_esm(model: Any) -> Each:
    tokens = model.mask_idx, model.padding_idx
    return functools.partial(_by_masked_tokens, *tokens, model.token_dropout, model.embed_scale)


def _by_masked_tokens(
    mask_token: int, padding: int, dropout: bool, scale: float, given: Given
) -> Tensor:
    ids: Tensor = given["tokens"]
    if not dropout:
        return torch.full_like(ids[:, 0], scale, dtype=torch.float32)
    told = {"input_ids": ids, "attention_mask": ids != padding}
    return _by_masked(mask_token, told) * scale


class Quirks(NamedTuple):
    """What a model does that its arguments' names do not say."""

    samples: Row | None = None
    factor: Factor | None = None  # of what it looks up in its own forward
    embeds_too: bool = False  # the factor is that of inputs_embeds as well
    each: Callable[[Any], Each | None] | None = None  # a factor of each sample; None: 1
    keeps_mask: bool = False  # what it is told of samples is not handed on to its inner model
    ids_transposed: bool = False  # it looks tokens up time first
    # it looks its tokens up with the padding of a window behind them, or such padding apart
    pads_window: bool = False
    # all its forward's, where its package's name is anybody's
    parameters: tuple[str, ...] | None = None
    prompts: int | None = None  # its padding's id; it looks up prompts of its own before its tokens
    phrases: bool = False  # its inner model is told of parts of a sample that it makes itself


NO_QUIRKS = Quirks()
SCALED = Quirks(factor=_attribute("embed_scale"))
SCALED_TOO = Quirks(factor=_attribute("embed_scale"), embeds_too=True)
MULTIPLIED = Quirks(factor=_attribute("embedding_multiplier"), embeds_too=True)

QUIRKS: dict[tuple[str, str], Quirks] = {
    ("torchtune", "TransformerDecoder.forward"): Quirks(
        _renamed("tokens", "input_pos", "position_ids")
    ),
    ("torchtitan", "Transformer.forward"): Quirks(_renamed("tokens", "positions", "position_ids")),
    ("torchtitan", "Decoder.forward"): Quirks(_renamed("tokens", "positions", "position_ids")),
    ("olmo", "OLMo.forward"): Quirks(_by_lengths("input_ids", "doc_lens")),
    ("olmo_core", "Transformer.forward"): Quirks(_by_lengths("input_ids", "doc_lens")),
    ("llmfoundry", "MPTModel.forward"): Quirks(_by_sequence_id("input_ids")),
    ("transformers", "MPTModel.forward"): Quirks(_by_sequence_id("input_ids")),
    ("esm", "ESM2.forward"): Quirks(_by_padding_idx("tokens"), each=_fair_esm),
    ("esm", "ESMC.forward"): Quirks(_by_sequence_id("sequence_tokens")),
    ("fairseq", "FairseqEncoderDecoderModel.forward"): Quirks(
        _by_padding_idx("src_tokens", "prev_output_tokens")
    ),
    ("fairseq", "TransformerEncoderBase.forward"): Quirks(_by_padding_idx("src_tokens")),
    ("fairseq", "TransformerDecoderBase.forward"): Quirks(_by_padding_idx("prev_output_tokens")),
    ("model", "Transformer.forward"): Quirks(  # mistral-finetune
        _by_lists("input_ids", "seqlens"), parameters=("input_ids", "seqlens")
    ),
    ("x_transformers", "TransformerWrapper.forward"): Quirks(
        _renamed("x", "mask", "attention_mask")
    ),
    ("transformers", "LongformerModel.forward"): Quirks(_presence, pads_window=True),
    ("transformers", "LEDEncoder.forward"): Quirks(_presence, pads_window=True),
    ("transformers", "LEDModel.forward"): Quirks(_presence),
    ("transformers", "AfmoeModel.forward"): Quirks(factor=_afmoe, embeds_too=True),
    ("transformers", "BigBirdEmbeddings.forward"): Quirks(factor=_big_bird, embeds_too=True),
    ("transformers", "BigBirdModel.forward"): Quirks(pads_window=True),
    ("transformers", "BlenderbotSmallEncoder.forward"): SCALED,
    ("transformers", "CTRLModel.forward"): Quirks(factor=_ctrl, embeds_too=True),
    ("transformers", "CpmAntForCausalLM.forward"): Quirks(keeps_mask=True, prompts=0),
    ("transformers", "CpmAntModel.forward"): Quirks(prompts=0),
    ("transformers", "EsmEmbeddings.forward"): Quirks(each=_token_dropout),
    ("transformers", "EvollaSaProtEmbeddings.forward"): Quirks(each=_token_dropout),
    ("transformers", "FSMTDecoder.forward"): SCALED_TOO,
    ("transformers", "FSMTEncoder.forward"): SCALED_TOO,
    ("transformers", "FastSpeech2ConformerEncoder.forward"): Quirks(factor=_fastspeech2),
    ("transformers", "FalconH1Model.forward"): MULTIPLIED._replace(embeds_too=False),
    ("transformers", "Granite4VisionTextModel.forward"): MULTIPLIED,
    ("transformers", "GraniteDoclingTextModel.forward"): MULTIPLIED,
    ("transformers", "GraniteModel.forward"): MULTIPLIED,
    ("transformers", "GraniteMoeHybridModel.forward"): MULTIPLIED,
    ("transformers", "GraniteMoeModel.forward"): MULTIPLIED,
    ("transformers", "GraniteMoeSWAModel.forward"): MULTIPLIED,
    ("transformers", "GraniteMoeSharedModel.forward"): MULTIPLIED,
    ("transformers", "GraniteSWAModel.forward"): MULTIPLIED,
    ("transformers", "GroundingDinoModel.forward"): Quirks(phrases=True),
    ("transformers", "HrmTextModel.forward"): Quirks(
        factor=_attribute("embedding_scale"), embeds_too=True
    ),
    ("transformers", "HyperCLOVAXModel.forward"): MULTIPLIED,
    ("transformers", "Kosmos2TextTransformer.forward"): SCALED_TOO,
    ("transformers", "Kosmos2_5TextTransformer.forward"): SCALED_TOO,
    ("transformers", "MMGroundingDinoModel.forward"): Quirks(phrases=True),
    ("transformers", "MarianDecoder.forward"): SCALED_TOO,
    ("transformers", "MarianEncoder.forward"): SCALED,
    ("transformers", "MvpDecoder.forward"): SCALED,
    ("transformers", "MvpEncoder.forward"): SCALED,
    ("transformers", "PegasusDecoder.forward"): SCALED_TOO,
    ("transformers", "PegasusEncoder.forward"): SCALED,
    ("transformers", "Qwen2_5OmniTalkerForConditionalGeneration.forward"): Quirks(keeps_mask=True),
    ("transformers", "RecurrentGemmaModel.forward"): Quirks(
        factor=_recurrent_gemma, embeds_too=True
    ),
    ("transformers", "RwkvForCausalLM.forward"): Quirks(keeps_mask=True),
    ("transformers", "Speech2TextDecoder.forward"): SCALED,
    ("transformers", "SpeechT5TextDecoderPrenet.forward"): SCALED,
    ("transformers", "T5GemmaDecoder.forward"): Quirks(factor=_t5gemma, embeds_too=True),
    ("transformers", "T5GemmaEncoder.forward"): Quirks(factor=_t5gemma, embeds_too=True),
    ("transformers", "Tipsv2TextEmbeddings.forward"): SCALED_TOO,
    ("transformers", "VideoPrismTextEmbeddings.forward"): Quirks(
        factor=_attribute("scaling"), embeds_too=True
    ),
    ("transformers", "VitsTextEncoder.forward"): Quirks(factor=_vits),
    ("transformers", "XLNetModel.forward"): Quirks(ids_transposed=True),
}
# The versions whose every class the test has been held against: one without a row multiplies by 1.
SCANNED = ("5.23.0",)


def package_of(model: nn.Module) -> str:
    """The top package whose code a model runs: FSDP2 gives models a class of torch's."""
    forward = getattr(type(model), "forward", None)  # a scripted module's class has none
    return str(getattr(forward, "__module__", "").split(".")[0])


def key_of(model: nn.Module) -> tuple[str, str]:
    forward = type(model).forward
    package = package_of(model)
    if package == "transformers_modules":  # code that came with a checkpoint
        package = "transformers"
    return package, getattr(forward, "__qualname__", "")


def quirks_of(model: nn.Module) -> Quirks:
    quirks = QUIRKS.get(key_of(model), NO_QUIRKS)
    names = quirks.parameters
    return NO_QUIRKS if names and names != tuple(parameter_names(model)) else quirks


def row_of(model: nn.Module) -> Row | None:
    return quirks_of(model).samples


def is_scanned(model: nn.Module) -> bool:
    """Whether it is a class of a transformers that the table has been held against."""
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    return package_of(model) == "transformers" and version in SCANNED


def hands_on(model: nn.Module) -> bool:
    """Whether what it is told of samples by its inner model's names, in **kwargs, reaches that:
    transformers' models of several parts (VibeVoice).
    """
    return package_of(model) == "transformers" and looks_up_inside(model) and takes_any(model)


def looks_up_inside(model: nn.Module) -> bool:
    """Whether a model around the one that is told of samples may look tokens up itself, or be told
    what it does not hand on: in transformers those of several parts, in PEFT prompt learning, and
    anybody else's.
    """
    package = package_of(model)
    if package == "peft":
        config = getattr(model, "active_peft_config", None)
        return bool(getattr(config, "is_prompt_learning", False))
    if package != "transformers":
        return True
    parts = getattr(getattr(model, "config_class", None), "sub_configs", None)
    return bool(parts) or quirks_of(model).keeps_mask
