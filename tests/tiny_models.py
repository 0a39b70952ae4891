"""Tiny models that more than one test file needs."""

import torch


def make_llava(library, text):
    """A LLaVA around a language model's config; library: transformers."""
    torch.manual_seed(0)
    vision = library.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = library.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return library.LlavaForConditionalGeneration(config).train()
