"""How samples' lengths arrive in a model's arguments: every way transformers, TRL and packing
collators say it.
"""

import re
import warnings

import pytest
import torch

from neftune_kernels import apply_neftune, noisy_embedding
from neftune_kernels.integrations.arguments import Padding, from_arguments, tail
from neftune_kernels.samples import says_nothing

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN = 64, 32
IDS = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
NUMBERS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
BOUNDS = torch.tensor([0, 5, 7, 12], dtype=torch.int32)
ROWS = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 5 + [0] * 3, [0] * 6 + [1] * 2, [1, 0, 1, 1, 0, 1, 1, 1]])


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def noised(model, *args, **given):
    """What the embedding returned, and the seed."""
    seen = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach().clone())
    )
    model.model(*args, **given)
    hook.remove()
    assert len(seen) == 1
    return seen[0], embedding._neftune.last.noise.seed


def check(expected, *args, ids=IDS, pad_token_id=None, **given):
    model = llama(pad_token_id=pad_token_id)
    apply_neftune(model, 5.0)
    out, seed = noised(model, *args, **given)
    assert torch.equal(
        out,
        noisy_embedding(
            ids, model.get_input_embeddings().weight, 5.0, attention_mask=expected, seed=seed
        ),
    )


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float32, torch.uint8, torch.int32]
)
def test_masks_of_any_dtype(dtype, proves):
    check(MASK, ids=ROWS, input_ids=ROWS, attention_mask=MASK.to(dtype))
    check(MASK, ROWS, MASK.to(dtype), ids=ROWS)  # positional
    proves("Llama", "forward", "masks: float, bool, integer")


def test_no_mask():
    check(torch.ones_like(ROWS), ids=ROWS, input_ids=ROWS)


WAYS = {
    "cu_seq_lens_q": {
        "cu_seq_lens_q": BOUNDS,
        "cu_seq_lens_k": BOUNDS,
        "max_length_q": 5,
        "max_length_k": 5,
        "position_ids": POSITIONS,
    },
    "seq_idx": {"seq_idx": NUMBERS.int() - 1},
    "position_ids": {"position_ids": POSITIONS},
    "numbered mask": {"attention_mask": NUMBERS},
    "position_ids of 3 axes": {"position_ids": POSITIONS.expand(3, 1, 12)},
    "position_ids of 4 axes": {
        "position_ids": torch.stack((POSITIONS, POSITIONS * 7, POSITIONS * 3, POSITIONS))
    },
    "position_ids and a mask of ones": {
        "position_ids": POSITIONS,
        "attention_mask": torch.ones_like(IDS),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_documents_of_a_pack(way, proves):
    """Three documents of 5, 2 and 5 tokens, told in every way there is."""
    model = llama()
    out = {}

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        out["embeds"] = self.embed_tokens(input_ids)

    given = WAYS[way]
    original = (
        type(model.model).forward
    )  # the model itself cannot attend by some of these; what reaches the embedding is asked here
    type(model.model).forward = forward
    try:
        apply_neftune(model, 5.0)
        model.model(input_ids=IDS, **given)
    finally:
        type(model.model).forward = original
    embedding = model.get_input_embeddings()
    seed = embedding._neftune.last.noise.seed
    assert torch.equal(
        out["embeds"],
        noisy_embedding(IDS, embedding.weight, 5.0, attention_mask=NUMBERS, seed=seed),
    )
    proves("Llama", "forward", f"packed: {way}")


def test_precedence():
    """cu_seq_lens_q, seq_idx, position_ids with mask, mask."""
    others = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    warned = []
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": others}
    told = from_arguments(given, Padding(), warned.append)
    assert told.position_ids.equal(others) and told.attention_mask.equal(torch.ones_like(IDS))
    given["seq_idx"] = NUMBERS
    assert (
        from_arguments(given, Padding(), warned.append)
        .attention_mask.unique(return_inverse=True)[1]
        .equal(NUMBERS - 1)
    )
    given["cu_seq_lens_q"] = torch.tensor([0, 1, 12])
    assert from_arguments(given, Padding(), warned.append).attention_mask.equal(
        torch.tensor([[1] + [2] * 11])
    )
    assert not warned


@pytest.mark.parametrize("pad_token_id", [None, 0])
@pytest.mark.parametrize(
    "way", ["cu_seq_lens_q", "seq_idx", "position_ids", "position_ids of 3 axes"]
)
def test_tokens_appended_by_pad_to_multiple_of_are_no_documents(way, pad_token_id):
    """TRL's padding-free collator pads ids with the padding token and position_ids with 0, and
    counts each such token as a document.
    """
    ids = torch.cat((IDS, torch.zeros(1, 4, dtype=torch.int64)), 1)
    positions = torch.cat((POSITIONS, torch.zeros(1, 4, dtype=torch.int64)), 1)
    numbers = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5 + [3, 4, 5, 6]])
    bounds = torch.tensor([0, 5, 7, 12, 13, 14, 15, 16], dtype=torch.int32)
    given = {
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds, "position_ids": positions},
        "seq_idx": {"seq_idx": numbers},
        "position_ids": {"position_ids": positions},
        "position_ids of 3 axes": {"position_ids": positions.expand(3, 1, 16)},
    }[way]
    told = from_arguments({"input_ids": ids, **given}, Padding(pad_token_id), pytest.fail)
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    mask = torch.cat((NUMBERS, torch.zeros(1, 4, dtype=torch.int64)), 1)
    out = noisy_embedding(
        ids, weight, 5.0, attention_mask=told.attention_mask, position_ids=told.position_ids, seed=0
    )
    assert torch.equal(out, noisy_embedding(ids, weight, 5.0, attention_mask=mask, seed=0))


def test_a_last_document_of_one_real_token_stays():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]])
    told = from_arguments({"input_ids": IDS, "position_ids": positions}, Padding(0), pytest.fail)
    assert bool(told.attention_mask.all())
    for given in (
        {"position_ids": positions[:, :1]},
        {"seq_idx": positions[:, :1]},
        {"cu_seq_lens_q": torch.tensor([0, 1])},
    ):
        single = from_arguments({"input_ids": IDS[:, :1], **given}, Padding(), pytest.fail)
        assert bool(single.attention_mask.all())


def test_shifted_labels_of_a_decoder():
    """Real up to the last token that is not padding: one between others counts, and so does a row's
    start token.
    """
    ids = torch.tensor([[0, 5, 6, 7], [0, 5, 0, 0], [0, 5, 0, 6], [0, 0, 0, 0]])
    assert (~tail(ids, Padding(0))).long().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 0, 0, 0],
    ]
    assert not tail(ids, Padding()).any()


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.arange(12).expand(3, 1, 12)},
        {"seq_idx": torch.zeros(1, 12, dtype=torch.int32)},
    ],
)
def test_numbered_masks_count_beside_what_does_not_restart(given):
    told = from_arguments(
        {"input_ids": IDS, "attention_mask": NUMBERS, **given}, Padding(), pytest.fail
    )
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        noisy_embedding(IDS, weight, 5.0, attention_mask=told.attention_mask, seed=0),
        noisy_embedding(IDS, weight, 5.0, attention_mask=NUMBERS, seed=0),
    )


def test_holes_split_no_document_of_3_axes():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0]])
    told = from_arguments(
        {
            "input_ids": IDS,
            "attention_mask": mask,
            "position_ids": torch.arange(12).expand(3, 1, 12),
        },
        Padding(),
        pytest.fail,
    )
    assert told.attention_mask.unique().numel() == 2 and torch.equal(
        told.attention_mask != 0, mask != 0
    )


def test_rows_of_packs():
    """bfd packs in two rows, position ids restarting inside each."""
    ids = torch.cat((IDS, IDS.flip(1)))
    positions = torch.stack((POSITIONS[0], torch.arange(12)))
    check(
        torch.cat((NUMBERS, torch.ones_like(IDS))), ids=ids, input_ids=ids, position_ids=positions
    )


def test_one_row_of_position_ids_for_many():
    check(torch.ones_like(ROWS), ids=ROWS, input_ids=ROWS, position_ids=torch.arange(8)[None])
    check(MASK, ids=ROWS, input_ids=ROWS, attention_mask=MASK, position_ids=torch.arange(8)[None])


def test_bounds_over_several_rows():
    """cu_seq_lens_q counts flattened tokens: a document may go on in the next row."""
    bounds = torch.tensor([0, 5, 13, 24], dtype=torch.int32)
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    told = from_arguments(
        {"input_ids": ROWS, "attention_mask": MASK, "cu_seq_lens_q": bounds}, None, pytest.fail
    )
    out = noisy_embedding(
        ROWS, weight, 5.0, attention_mask=told.attention_mask, cu_seqlens=told.cu_seqlens, seed=0
    )
    assert torch.equal(out, noisy_embedding(ROWS, weight, 5.0, cu_seqlens=bounds, seed=0))


def test_bad_bounds_are_refused():
    model = llama()
    apply_neftune(model, 5.0)
    with pytest.raises(ValueError, match="from 0 to the number of tokens 12, got 0 to 11"):
        model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 5, 11]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"attention_mask": torch.zeros(3, 1, 8, 8)},
            r"not \(batch, tokens\).*Pass the model a 2-D attention_mask",
        ),
        ({"attention_mask": torch.ones(3, 4)}, r"not \(batch, tokens\)"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids of shape \(1, 4\) do not tell"),
        ({"seq_idx": torch.zeros(1, 3).long()}, r"seq_idx of shape \(1, 3\) does not fit"),
    ],
)
def test_what_cannot_be_read_warns(given, message):
    warned = []
    told = from_arguments({"input_ids": ROWS, **given}, Padding(), warned.append)
    assert len(warned) == 1 and says_nothing(told)
    assert re.search(message, warned[0])


BRANCHES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]])  # two answers to a prompt of four


def test_branches_of_a_prefix_tree_warn():
    warned = []
    given = {"input_ids": IDS, "attention_mask": torch.zeros(1, 1, 12, 12)}
    told = from_arguments({**given, "position_ids": BRANCHES}, Padding(), warned.append)
    assert len(warned) == 1 and "branch" in warned[0], "position ids do tell: none of the mask"
    assert told.position_ids is not None and bool(told.attention_mask.all())
    warned.clear()
    padded = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 1, 1, 1, 1]])
    mask = (torch.arange(12) < 8)[None]
    shard = torch.tensor([[2, 3, 4, 5, 10, 11, 12, 13, 2, 3, 4, 5]])
    for position_ids, beside in ((POSITIONS, None), (padded, mask), (shard, None)):
        arguments = {"input_ids": IDS, "attention_mask": beside, "position_ids": position_ids}
        from_arguments(arguments, Padding(), warned.append)
    assert not warned


@pytest.mark.parametrize("name", ["input_ids", "piece_ids"])
def test_a_mask_that_is_no_tensor_always_warns(name):
    warned = []
    told = from_arguments({name: ROWS, "attention_mask": object()}, Padding(), warned.append)
    assert says_nothing(told) and len(warned) == 1
    assert re.search(r"\(object\).*samples=.*handle\.told", warned[0])


def test_embeddings_made_outside_the_model_have_their_noise():
    """Tokens embedded before the forward: nothing says that noise is missing, or to add it."""
    model = llama()
    apply_neftune(model, 5.0)
    embedding = model.get_input_embeddings()
    with pytest.warns(UserWarning, match="outside its model's forward"):
        embeds = embedding(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs_embeds=embeds, attention_mask=MASK)
    with pytest.warns(UserWarning, match="did not run: pass them through"):
        model(inputs_embeds=embeds.detach(), attention_mask=MASK)


def test_global_attention_is_no_document():
    """Longformer's 2."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LongformerConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, attention_window=[4], pad_token_id=1, **sizes
    )
    model = transformers.LongformerModel(config).train()
    handle = apply_neftune(model, 5.0)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[:, 0] = 2
    model(input_ids=ROWS, attention_mask=mask)
    stats = handle.stats()
    assert (stats["samples"], stats["length_min"], stats["length_max"]) == (3, 8, 8)
