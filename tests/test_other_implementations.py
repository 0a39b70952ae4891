"""What today's NEFTune implementations get wrong, each shown on them and then on ours.

`hf` is transformers' own hook, `official` the paper authors' train.py
(github.com/neelsjain/NEFTune), restated here in a few lines. Batches, crashes and reference
policies of real trainers are in test_trainers.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import add_noise, apply_neftune, neftune_noise, noisy_embedding

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN = 64, 32


def hf(embeds, alpha=5.0):
    module = nn.Module()
    module.neftune_noise_alpha = alpha
    return transformers.integrations.neftune.neftune_post_forward_hook(module.train(), None, embeds)


def official(embeds, mask, alpha=5.0):
    """NEFTune_forward of train.py: per-sample lengths, but in the embeddings' own dtype."""
    lengths = mask.sum(1)
    noise = torch.zeros_like(embeds).uniform_(-1, 1) * mask[..., None].to(embeds.dtype)
    dims = lengths.to(embeds.dtype) * embeds.shape[-1]
    return embeds + (alpha / torch.sqrt(dims))[:, None, None] * noise


def padded(columns):
    """A sample of 16 tokens beside one that fills the row."""
    mask = torch.ones(2, columns, dtype=torch.int64)
    mask[0, 16:] = 0
    return mask


def largest(noise, mask):
    return float(noise[mask != 0].abs().max())


def test_padded_length_and_noise_on_padding():
    mask, embeds = padded(256), torch.zeros(2, 256, HIDDEN)
    exact = 5.0 / math.sqrt(16 * HIDDEN)
    theirs, ours = hf(embeds)[0], add_noise(embeds, 5.0, attention_mask=mask)[0]
    assert largest(theirs, mask[0]) < exact / 3.9, "four times too little noise"
    assert 0.99 * exact < largest(ours, mask[0]) < exact
    assert theirs[16:].abs().max() > 0 and ours[16:].abs().max() == 0


def test_noise_depends_on_who_shares_the_batch():
    """The same seed, the same sample first in the batch; only its neighbour is longer."""
    short, long = torch.zeros(2, 16, HIDDEN), torch.zeros(2, 64, HIDDEN)
    torch.manual_seed(0)
    alone = hf(short)[0]
    torch.manual_seed(0)
    assert not torch.equal(hf(long)[0, :16], alone)
    ours = [
        add_noise(embeds, 5.0, lengths=torch.tensor([16, embeds.shape[1]]), seed=0)[0, :16]
        for embeds in (short, long)
    ]
    assert torch.equal(*ours)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders_are_silently_without_noise(name):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN}
    small = {
        "T5": {
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        "Bart": {
            f"{side}_{part}": size
            for side in ("encoder", "decoder")
            for part, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
        }
        | {"dropout": 0.0},
    }[name]
    config = getattr(transformers, f"{name}Config")(**sizes, **small)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    ids = torch.randint(3, VOCAB, (2, 6))
    clean = model(input_ids=ids, labels=ids).loss
    hook = transformers.trainer.activate_neftune(model, 15.0)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, clean), "fifteen times nothing"
    transformers.trainer.deactivate_neftune(model, hook)
    apply_neftune(model, 15.0)
    assert not torch.equal(model(input_ids=ids, labels=ids).loss, clean)


def test_equally_seeded_ranks_draw_equal_noise():
    embeds = torch.zeros(2, 8, HIDDEN)
    theirs, ours = [], []
    for rank in (0, 1):
        torch.manual_seed(42)  # trainers seed every rank alike
        theirs.append(hf(embeds))
        torch.manual_seed(42)
        ours.append(add_noise(embeds, 5.0, replica=rank))
    assert torch.equal(*theirs) and not torch.equal(*ours)


def test_sequence_parallel_shards_use_their_own_length():
    whole = torch.zeros(1, 64, HIDDEN)
    shards = whole.chunk(4, dim=1)
    exact = 5.0 / math.sqrt(64 * HIDDEN)
    assert max(largest(hf(shard), torch.ones(1, 16)) for shard in shards) > 1.9 * exact, (
        "sqrt(4) too loud"
    )
    length = torch.tensor([64])
    parts = [
        add_noise(shard, 5.0, lengths=length, position_offset=16 * i, seed=3)
        for i, shard in enumerate(shards)
    ]
    assert torch.equal(torch.cat(parts, 1), add_noise(whole, 5.0, lengths=length, seed=3))


def test_no_noise_in_fp16_and_wrong_lengths_in_bf16():
    mask = torch.ones(1, 32, dtype=torch.int64)
    embeds = torch.zeros(1, 32, 4096, dtype=torch.float16)
    assert not official(embeds, mask).any(), "32 * 4096 is infinite in fp16"
    exact = 5.0 / math.sqrt(32 * 4096)
    assert float(add_noise(embeds, 5.0, attention_mask=mask).abs().max()) == pytest.approx(
        exact, rel=2**-10
    )  # one rounding to fp16
    assert torch.tensor(257).to(torch.bfloat16) == 256
    lengths = torch.tensor([257]).to(torch.bfloat16), torch.tensor([256]).to(torch.bfloat16)
    assert torch.equal(*lengths), "the official code cannot tell them apart"
    longer, shorter = (
        neftune_noise((1, 300), 8, 5.0, lengths=torch.tensor([n]), seed=0)[0, 0] for n in (257, 256)
    )
    assert not torch.equal(longer, shorter)


def test_bf16_uniform_is_coarse_and_biased():
    """2**23 draws: the mean of n uniforms on (-1, 1) has a standard deviation of 1/sqrt(3 n);
    theirs lies 6 of them off, ours within.
    """
    n = 1 << 23
    torch.manual_seed(0)
    theirs = torch.empty(n, dtype=torch.bfloat16).uniform_(-1, 1)
    sigma = 1 / math.sqrt(3 * n)
    assert abs(float(theirs.double().mean())) > 6 * sigma
    ours = neftune_noise((n // 1024,), 1024, math.sqrt(1024 * (n // 1024)), seed=0)  # magnitude 1
    assert abs(float(ours.double().mean())) < 4 * sigma
    assert len(theirs.unique()) < 5000 < 60000 < len(ours.unique())


def test_compiling_the_hook_breaks_at_a_second_length():
    embedding = nn.Embedding(VOCAB, HIDDEN)
    ids = [torch.randint(0, VOCAB, (2, columns)) for columns in (7, 9)]
    torch._dynamo.reset()
    theirs = torch.compile(
        lambda input_ids: hf(embedding(input_ids)), backend="eager", fullgraph=True, dynamic=True
    )
    with pytest.raises(Exception, match="(?i)unsupported|data.dependent|scalar|item"):
        [theirs(one) for one in ids]
    torch._dynamo.reset()
    ours = torch.compile(
        lambda input_ids: noisy_embedding(input_ids, embedding.weight, 5.0),
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    for one in ids:
        torch.manual_seed(1)
        compiled = ours(one)
        torch.manual_seed(1)
        assert torch.equal(compiled, noisy_embedding(one, embedding.weight, 5.0))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_alphas_are_accepted(bad):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    hook = transformers.trainer.activate_neftune(model, bad)
    transformers.trainer.deactivate_neftune(model, hook)
    with pytest.raises(ValueError, match="finite and >= 0"):
        apply_neftune(model, bad)
    assert type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize(("shape", "error"), [((8,), IndexError), ((1, 0), RuntimeError)])
def test_shapes_that_break_the_hook(shape, error):
    embeds = F.embedding(torch.zeros(shape, dtype=torch.int64), torch.ones(VOCAB, HIDDEN))
    with pytest.raises(error):
        hf(embeds)
    assert add_noise(embeds, 5.0).shape == embeds.shape


def test_every_later_dropout_mask_is_shifted():
    """Theirs draws one number per element from the global generator; ours one per call, or none
    with a generator of its own.
    """

    def dropout_after(noise):
        torch.manual_seed(0)
        noise()
        return F.dropout(torch.ones(64), 0.5)

    embeds = torch.zeros(2, 8, HIDDEN)
    plain = dropout_after(lambda: None)
    assert not torch.equal(dropout_after(lambda: hf(embeds, 1e-6)), plain)
    own = torch.Generator()
    assert torch.equal(dropout_after(lambda: add_noise(embeds, 1e-6, generator=own)), plain)
    assert torch.equal(dropout_after(lambda: add_noise(embeds, 1e-6, seed=1)), plain)
