"""What a model multiplies its embeddings by after the lookup: the table of quirks.py held against
transformers' sources, and the noise of alpha / f on models of it.
"""

import ast
import math
import pathlib
import pickle
import warnings

import pytest
import torch
from tiny_models import make_llava
from torch import nn

from neftune_kernels import apply_neftune, noisy_embedding
from neftune_kernels.integrations import quirks

IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])

# ---- the scan of sources, in this test alone

IDS_NAMES = {"input_ids", "input", "decoder_input_ids", "ids", "tokens"}
EMBEDS_NAMES = {"inputs_embeds", "input_embeds", "decoder_inputs_embeds"}
TABLE_NAMES = ("self.w", "self.wte", "self.shared")
SAME_VALUES = {"to", "type", "view", "clone", "contiguous", "transpose", "unsqueeze", "masked_fill"}
NOT_A_FACTOR = {
    "NemotronAsrStreamingEncoder": "embeds sound, no tokens",
    "Phi4MultimodalFeatureEmbedding": "a mask that chooses between images and sound",
    "RwkvModel": "halves the states between its blocks, in eval mode alone",
    "Speech2TextEncoder": "embeds sound, no tokens",
    "ZayaModel": "a learned vector, a part of its first block",
}

ELSEWHERE = {"FastSpeech2ConformerEncoder": "multiplies in its positional encoding"}


def _from_lookup(node, known):
    """Whether an expression is a lookup of tokens, or made of one element by element."""
    if isinstance(node, ast.Name):
        return node.id in known
    if isinstance(node, ast.BinOp):
        return _from_lookup(node.left, known) or _from_lookup(node.right, known)
    if isinstance(node, ast.IfExp):
        return _from_lookup(node.body, known) or _from_lookup(node.orelse, known)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr in SAME_VALUES:
        return _from_lookup(node.func.value, known)
    name = ast.unparse(node.func)
    arguments = (*node.args, *(keyword.value for keyword in node.keywords))
    ids = any(isinstance(one, ast.Name) and one.id in IDS_NAMES for one in arguments)
    return ids and ("emb" in name.lower() or name in TABLE_NAMES)


def multiplies(function):
    """Whether a method multiplies or divides what it has looked up."""
    known = set(EMBEDS_NAMES)
    kinds = (ast.Assign, ast.AugAssign, ast.BinOp)
    nodes = [node for node in ast.walk(function) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            known = known | names if _from_lookup(node.value, known) else known - names
            known |= EMBEDS_NAMES
        elif isinstance(node.op, (ast.Mult, ast.Div)):
            if isinstance(node, ast.AugAssign):
                sides = {_from_lookup(node.target, known), False}
            else:
                sides = {_from_lookup(node.left, known), _from_lookup(node.right, known)}
            if sides == {True, False}:
                return True
    return False


def scan(source):
    """Names of the classes in a file that do."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        kind.name
        for kind in classes
        if any(isinstance(one, ast.FunctionDef) and multiplies(one) for one in kind.body)
    }


@pytest.mark.parametrize(
    "line",
    [
        "h = self.emb(input_ids) * 8",
        "h = 8 * self.emb(input_ids)",
        "h = self.emb(input_ids)\n        h *= self.scale",
        "inputs_embeds = inputs_embeds / self.scale",
        "h = inputs_embeds\n        h = h.to(x) * f",
    ],
)
def test_the_scan_sees(line):
    assert scan(f"class Model:\n    def helper(self, input_ids, inputs_embeds):\n        {line}\n")


@pytest.mark.parametrize("line", ["h = self.norm(inputs_embeds) * 8", "h = mask * 8", "h = 8 * h"])
def test_the_scan_does_not_see(line):
    assert not scan(f"class Model:\n    def helper(self, h, inputs_embeds):\n        {line}\n")


def test_the_table_is_that_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    models = pathlib.Path(transformers.__file__).parent / "models"
    found = set().union(*(scan(path.read_text()) for path in models.glob("*/modeling_*.py")))
    rows = {
        name.removesuffix(".forward")
        for (package, name), row in quirks.QUIRKS.items()
        if package == "transformers" and (row.factor or row.each)
    }
    assert not found & set(ELSEWHERE), "the scan sees it: no exception of it"
    assert found - set(NOT_A_FACTOR) | set(ELSEWHERE) == rows, (
        "read what changed, then add or take rows"
    )
    assert transformers.__version__ in quirks.SCANNED, (
        "the table fits this version too: add it to quirks.SCANNED"
    )


# ---- the noise


class Scaled(nn.Module):
    """Somebody's own code."""

    def __init__(self, factor=8.0):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.first = nn.Identity()
        self.factor = factor

    def forward(self, input_ids, attention_mask=None):
        return self.first(self.embed(input_ids) * self.factor)


def seed_of(module):
    return module._neftune.last.noise.seed


@pytest.mark.parametrize("fused", [None, False])
def test_a_stated_multiplier_divides_the_noise(fused):
    model = Scaled().train()
    handle = apply_neftune(model, 5.0, embedding="embed", embedding_multiplier=8, fused=fused)
    assert handle.embedding_multiplier == 8.0
    out = model(IDS, attention_mask=MASK)
    expected = noisy_embedding(
        IDS, model.embed.weight, 5.0 / 8, attention_mask=MASK, seed=seed_of(model.embed)
    )
    assert torch.equal(out, expected * 8.0)
    stats = handle.stats()
    assert stats["magnitude_max"] == 5.0 / math.sqrt(2 * 16), "the paper's, that of the first block"
    assert 0.9 < stats["max_noise_ratio"] < 1
    handle.embedding_multiplier = 4.0
    out = model(IDS, attention_mask=MASK)
    expected = noisy_embedding(
        IDS, model.embed.weight, 5.0 / 4, attention_mask=MASK, seed=seed_of(model.embed)
    )
    assert torch.equal(out, expected * 8.0)
    with apply_neftune(model, 5.0, embedding="embed", embedding_multiplier=2.0):
        assert handle.embedding_multiplier == 2.0
    assert handle.embedding_multiplier == 4.0


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan])
def test_a_multiplier_that_is_none(bad):
    with pytest.raises(ValueError, match="embedding_multiplier must be positive and finite, got"):
        apply_neftune(Scaled(), embedding="embed", embedding_multiplier=bad)


@pytest.mark.parametrize("bad", ["8", True])
def test_a_multiplier_of_another_type(bad):
    with pytest.raises(
        TypeError, match="embedding_multiplier must be a number, a callable or None, got"
    ):
        apply_neftune(Scaled(), embedding="embed", embedding_multiplier=bad)


def test_a_row_in_a_compiled_forward():
    model = granite()
    apply_neftune(model, 5.0)
    expected = []
    for _ in range(2):
        torch.manual_seed(3)
        expected.append(model(input_ids=IDS, attention_mask=MASK).last_hidden_state)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        out = compiled(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert torch.equal(out, expected[-1])


def granite():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**small, **heads, embedding_multiplier=12.0)
    return transformers.GraniteModel(config).train()


def embedded_by(model, call, seed=3):
    """What its table returned."""
    seen = []
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    torch.manual_seed(seed)
    call()
    hook.remove()
    seed = seed_of(table)
    return seen[0], lambda factor: noisy_embedding(
        IDS, table.weight, 5.0 / factor, attention_mask=MASK, seed=seed
    )


def test_a_rows_number_that_changes_is_read_again():
    model = granite()
    apply_neftune(model, 5.0)
    model.config.embedding_multiplier = 3.0  # which its forward does not read
    for factor in (12.0, 6.0, 1.0, 2.0):
        model.embedding_multiplier = factor
        out, expected = embedded_by(model, lambda: model(IDS, attention_mask=MASK))
        assert torch.equal(out, expected(factor))
    model.resize_token_embeddings(60, mean_resizing=False)
    out, expected = embedded_by(model, lambda: model(IDS, attention_mask=MASK))
    assert torch.equal(out, expected(2.0))


def test_a_rows_number_that_changes_is_read_again_in_a_compiled_forward():
    torch._dynamo.reset()
    model = granite()
    apply_neftune(model, 5.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    eager = granite()
    apply_neftune(eager, 5.0)
    for factor in (12.0, 6.0):
        model.embedding_multiplier = eager.embedding_multiplier = factor
        results = []
        for one in (compiled, eager):
            torch.manual_seed(3)
            results.append(one(IDS, attention_mask=MASK).last_hidden_state)
        assert torch.equal(*results)


def test_a_row_counts_in_a_forward_that_is_called_by_its_name():
    """FalconH1 scales what it looks up itself, and no inputs_embeds."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.FalconH1Model(transformers.FalconH1Config(**FALCON)).train()
    handle = apply_neftune(model, 5.0)
    with handle.told(attention_mask=MASK):
        out, expected = embedded_by(model, lambda: model.forward(IDS, attention_mask=MASK))
        assert torch.equal(out, expected(5.0))
        out, expected = embedded_by(model, lambda: model.get_input_embeddings()(IDS))
        assert torch.equal(out, expected(1.0)), "looked up outside, to be inputs_embeds"


# ---- factors of each sample


MASKED = 3  # a token to be guessed


def esm(dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "mask_token_id": MASKED}
    plain = {"hidden_dropout_prob": 0.0, "position_embedding_type": "rotary"}
    config = transformers.EsmConfig(hidden_size=16, **heads, **tokens, **plain, token_dropout=True)
    torch.manual_seed(0)
    return transformers.EsmModel(config).to(dtype).train()


def divided(ids, weight, factors, seed, padding_idx=None, **told):
    """The noise as it is, divided by factors of tokens, and the sum: each in float32, then once."""
    noise = noisy_embedding(ids, torch.zeros_like(weight).float(), 5.0, seed=seed, **told)
    embedded = torch.nn.functional.embedding(ids, weight, padding_idx)
    return (embedded.float() + noise / factors[..., None]).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("guessed", [0, 2])
def test_token_dropout_is_divided_sample_by_sample(guessed, fused, dtype):
    model, ids = esm(dtype), IDS.clamp(min=MASKED + 1).where(MASK == 1, 0)
    ids[0, 1 : 1 + guessed] = MASKED
    handle = apply_neftune(model, 5.0, fused=fused)
    seen, arrived = [], []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    model.encoder.layer[0].register_forward_pre_hook(
        lambda module, args: arrived.append(args[0].detach().clone())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, attention_mask=MASK)
    observed = (ids == MASKED).sum(1).float() / MASK.sum(1)
    factors = (1 - 0.15 * 0.8) / (1 - observed)
    expected = divided(
        ids, table.weight, factors[:, None], seed_of(table), attention_mask=MASK, padding_idx=0
    )
    assert torch.equal(seen[0], expected)
    handle.noise_alpha = 0.0
    model(ids, attention_mask=MASK)
    noise = (arrived[0] - arrived[1]).float().abs().amax(-1)
    bound = 5.0 / (MASK.sum(1, keepdim=True) * 16).sqrt()
    real = (MASK == 1) & (ids != MASKED)
    ratio = (noise / bound)[real].max()
    assert 0.95 < ratio < (1 + 1e-5 if dtype is torch.float32 else 1.02)
    handle.noise_alpha = 5.0
    checked = handle.check(input_ids=ids, attention_mask=MASK)
    assert checked["ok"] and checked["sites"][0]["multiplier"] == pytest.approx(
        float(factors.mean())
    )
    other = esm()
    apply_neftune(other, 5.0)
    copy = pickle.loads(pickle.dumps(other.embeddings))
    assert copy.word_embeddings._neftune.each is not None


def test_token_dropout_in_a_compiled_forward():
    torch._dynamo.reset()
    ids = IDS.clamp(min=MASKED)
    results = []
    for compiled in (False, True):
        model = esm()
        apply_neftune(model, 5.0)
        call = torch.compile(model.embeddings, backend="eager", fullgraph=True)
        torch.manual_seed(3)
        embedded = (call if compiled else model.embeddings)(ids, attention_mask=MASK)
        results.append(embedded)
    assert torch.equal(*results)


class Each(nn.Module):
    """Somebody's own code, with a number of each sample's or token's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.first = nn.Identity()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, factors=None):
        shaped = factors[:, None] if factors.dim() == 1 else factors
        return self.first(self.embed(input_ids) * shaped[..., None])


ROWS = torch.tensor([1.0, 2.0, 4.0])
TOKENS = torch.arange(1.0, 25).view(3, 8)


@pytest.mark.parametrize("said", [ROWS, TOKENS, torch.tensor(4.0)], ids=["rows", "tokens", "one"])
def test_a_callable_says_the_factors_of_rows_or_tokens(said):
    model = Each().train()
    handle = apply_neftune(model, 5.0, embedding_multiplier=lambda given: given["factors"])
    shaped = said[:, None] if said.dim() == 1 else said
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    out = model(IDS, MASK, said)
    assert callable(handle.embedding_multiplier)
    expected = divided(IDS, model.embed.weight, shaped, seed_of(model.embed), attention_mask=MASK)
    assert torch.equal(seen[0], expected) and torch.equal(out, expected * shaped[..., None])
    assert handle.check(input_ids=IDS, attention_mask=MASK, factors=said)["ok"]
    handle.embedding_multiplier = lambda given: 3 * given["factors"]
    assert not handle.check(input_ids=IDS, attention_mask=MASK, factors=said)["ok"]
    handle.embedding_multiplier = lambda given: given["factors"]
    with pytest.raises(ValueError, match=r"one for each of the 3 rows.*got \(2,\)"):
        model(IDS, MASK, ROWS[:2])
    handle.embedding_multiplier = lambda given: 4.0
    model(IDS, MASK, torch.tensor(4.0))
    expected = noisy_embedding(
        IDS, model.embed.weight, 5.0 / 4, attention_mask=MASK, seed=seed_of(model.embed)
    )
    assert torch.equal(seen[-1], expected)
    handle.embedding_multiplier = lambda given: given["factors"]
    with handle.told(attention_mask=MASK), pytest.raises(RuntimeError, match="none was heard"):
        model.forward(IDS, MASK, said)


def test_time_first_rows_are_columns():
    class TimeFirst(Each):
        def forward(self, input_ids, scale):
            return self.first(self.embed(input_ids) * scale[None, :, None])

    model = TimeFirst().train()
    apply_neftune(model, 5.0, batch_first=False, embedding_multiplier=lambda given: given["scale"])
    out = model(IDS.t(), ROWS)
    expected = divided(IDS, model.embed.weight, ROWS[:, None], seed_of(model.embed))
    assert torch.equal(out, (expected * ROWS[:, None, None]).transpose(0, 1))


# ---- models that scale elsewhere than where they look up

VOCAB, HIDDEN = 64, 32
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TEXT = {**SMALL, "max_position_embeddings": 16}
FALCON = {
    **GROUPED,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "embedding_multiplier": 5.0,
}
ROOT = math.sqrt(HIDDEN)
KOSMOS = {
    "vocab_size": VOCAB,
    "embed_dim": HIDDEN,
    "layers": 1,
    "ffn_dim": 32,
    "attention_heads": 4,
    "max_position_embeddings": 32,
}
FLAUBERT = {
    "vocab_size": VOCAB,
    "emb_dim": HIDDEN,
    "n_layers": 1,
    "n_heads": 4,
    "max_position_embeddings": 32,
}


def t5gemma(library):
    text = {**GROUPED, "head_dim": 8}
    config = library.T5GemmaConfig(
        encoder=text, decoder=text, is_encoder_decoder=False, vocab_size=VOCAB
    )
    return library.T5GemmaEncoderModel(config)


def kosmos(library):
    rooms = library.models.kosmos2
    config = rooms.configuration_kosmos2.Kosmos2TextConfig(**KOSMOS)
    return rooms.modeling_kosmos2.Kosmos2TextModel(config)


NAMED = {  # how it is built, its first block, what the noise is divided by
    "CTRL": (
        lambda t: t.CTRLModel(
            t.CTRLConfig(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=4, dff=48)
        ),
        "h.0",
        ROOT,
    ),
    "Tipsv2": (lambda t: t.Tipsv2TextModel(t.Tipsv2TextConfig(**TEXT)), "encoder", ROOT),
    "VideoPrism": (
        lambda t: t.VideoPrismTextModel(t.VideoPrismTextConfig(**TEXT)),
        "layers.0",
        ROOT,
    ),
    "Kosmos-2": (kosmos, "model.layers.0", ROOT),
    "RecurrentGemma": (
        lambda t: t.RecurrentGemmaModel(
            t.RecurrentGemmaConfig(
                **{**SMALL, "num_hidden_layers": 3}, num_key_value_heads=1, lru_width=HIDDEN
            )
        ),
        "layers.0",
        float(torch.tensor(ROOT, dtype=torch.bfloat16)),
    ),
    "T5Gemma": (t5gemma, "encoder.layers.0", float(torch.tensor(ROOT))),
    "Flaubert": (
        lambda t: t.FlaubertModel(t.FlaubertConfig(**FLAUBERT)),
        "layer_norm_emb",
        1.0,
    ),
    "FalconH1": (lambda t: t.FalconH1Model(t.FalconH1Config(**FALCON)), "layers.0", 5.0),
    "FalconH1 in Llava": (
        lambda t: make_llava(t, t.FalconH1Config(**FALCON)),
        "model.language_model.layers.0",
        1.0,
    ),
    "Granite in Llava": (
        lambda t: make_llava(t, t.GraniteConfig(**GROUPED, embedding_multiplier=12.0)),
        "model.language_model.layers.0",
        12.0,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model(name):
    """The lookup has the noise of alpha / f, and what enters the first block the paper's."""
    transformers = pytest.importorskip("transformers")
    build, block, factor = NAMED[name]
    torch.manual_seed(0)
    model = build(transformers).train()
    for module in model.modules():
        for drop in ("p", "dropout", "layerdrop"):
            if isinstance(getattr(module, drop, None), float):
                setattr(module, drop, 0.0)
    ids = torch.randint(8, VOCAB, (2, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    embedding = model.get_input_embeddings()
    handle = apply_neftune(model, 5.0)
    looked_up, entered = [], []

    def enters(module, args, kwargs):
        values = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        entered.append(values[0].detach().clone())

    embedding.register_forward_hook(lambda module, args, out: looked_up.append(out.clone()))
    model.get_submodule(block).register_forward_pre_hook(enters, with_kwargs=True)
    model(input_ids=ids, attention_mask=mask)
    expected = noisy_embedding(
        ids, embedding.weight, 5.0 / factor, attention_mask=mask, seed=seed_of(embedding)
    )
    assert torch.equal(looked_up[0], expected)
    handle.noise_alpha = 0.0
    model(input_ids=ids, attention_mask=mask)
    noise = (entered[0] - entered[1])[:, :8].abs().amax(-1)
    ratio = (noise / (5.0 / (mask.sum(1) * HIDDEN).sqrt())[:, None])[mask > 0].max()
    assert 0.98 < ratio < 1 + 1e-4, "of 416 draws one is near the bound; two float32 roundings"


def test_t5gemmas_encoder_and_decoder():
    transformers = pytest.importorskip("transformers")
    text = {**GROUPED, "head_dim": 8}
    config = transformers.T5GemmaConfig(encoder=text, decoder=text, vocab_size=VOCAB)
    model = transformers.T5GemmaModel(config).train()
    ids = torch.randint(8, VOCAB, (2, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    checked = apply_neftune(model, 5.0).check(**batch, decoder_attention_mask=mask)
    ran = [site for site in checked["sites"] if not site["tied"]]
    assert checked["ok"] and {site["multiplier"] for site in ran} == {float(torch.tensor(ROOT))}
    assert [site["measured"] for site in ran] == [pytest.approx(ROOT, rel=1e-6)] * len(ran)
    assert {"encoder", "decoder"} <= {site["site"].split(".")[0] for site in ran}
