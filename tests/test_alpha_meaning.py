"""The table of what alpha is on a model: what arrives, and what a hook before a factor makes."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bench import alpha_meaning  # noqa: E402


def test_noise_beside_the_embeddings():
    config = transformers.GraniteConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, embedding_multiplier=12.0
    )
    one = alpha_meaning.published("Granite", config)
    torch.manual_seed(0)
    config.vocab_size, config.pad_token_id = alpha_meaning.ROWS, 0
    table = transformers.AutoModel.from_config(config).get_input_embeddings().weight.detach()
    rms = table[alpha_meaning.drawn(len(table))].square().mean().sqrt().item()
    noise = 5.0 / (3 * 512 * 64) ** 0.5  # uniform on +-alpha / sqrt(L d)
    assert (one.d, one.factor) == (64, 12.0)
    assert one.rms == pytest.approx(rms, rel=1e-6)  # float32 means
    assert one.ratio == pytest.approx(noise / (12.0 * rms), rel=1e-6)
    assert f"| {one.ratio * 12:.2%} |" in alpha_meaning.report([one])
