"""`python -m neftune_kernels.doctor`: its numbers are the paper's and transformers' own formulas,
its picture is drawn, and what is missing is named.
"""

import sys

import pytest
import torch

from neftune_kernels import doctor

pytest.importorskip("transformers")

GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = [torch.randint(1, 200, (n,), generator=GENERATOR).tolist() for n in (60, 30, 15)]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("packed", (False, True))
def test_numbers(packed):
    """Of the hook sqrt(own length / row's length), of ours 1; padding as it is noised."""
    model, _ = doctor.tiny_model()
    batch = doctor.packed(SAMPLES) if packed else doctor.ragged(SAMPLES, 0)
    rows, checked = doctor.examine(model, batch, 5.0)
    assert checked["ok"] and [row.tokens for row in rows] == [60, 30, 15]
    columns = sum(map(len, SAMPLES)) if packed else 60
    for row in rows:
        theirs = (row.tokens / columns) ** 0.5
        assert row.hook == pytest.approx(theirs, rel=0.03)
        assert row.ours == pytest.approx(1, rel=0.03)
        if packed or row.tokens == 60:
            assert row.hook_padding is None and row.ours_padding is None
        else:
            assert row.hook_padding == pytest.approx(theirs, rel=0.03)
            assert row.ours_padding == 0
    embedding = model.get_input_embeddings()
    assert type(embedding) is torch.nn.Embedding and not embedding._forward_hooks
    assert not hasattr(embedding, "neftune_noise_alpha")


def test_a_factor_after_the_lookup_counts():
    """Granite multiplies its embeddings: a hook's noise arrives that much louder."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
    )
    batch = doctor.ragged(SAMPLES, 0)
    (row, *_), checked = doctor.examine(GraniteForCausalLM(config), batch, 5.0)
    assert checked["ok"] and row.ours == pytest.approx(1, rel=0.03)
    assert row.hook == pytest.approx(12, rel=0.03)


def test_command(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("one line of text\n\nand another, which is longer\n")
    picture = tmp_path / "out.png"
    pytest.importorskip("matplotlib")
    assert doctor.main(["--texts", str(texts), "--out", str(picture), "--alpha", "10"]) == 0
    said = capsys.readouterr().out
    assert "alpha 10" in said and said.count(": exact") == 2 and str(picture) in said
    assert [
        line.split()[:3] for line in said.splitlines() if line.startswith(("ragged", "packed"))
    ] == [
        ["ragged", "1", "16"],
        ["ragged", "2", "28"],
        ["packed", "1", "16"],
        ["packed", "2", "28"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_by_its_path(tmp_path, capsys):
    """With its own tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    doctor.tiny_model()[0].bfloat16().save_pretrained(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("a b c d d c b a\nd a b\n")
    arguments = [str(tmp_path), "--texts", str(texts), "--out", str(tmp_path / "out.png")]
    assert doctor.main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if line[:1] in (["ragged"], ["packed"])] == ["8", "3"] * 2


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert doctor.main(["--out", str(tmp_path / "none.png")]) == 0
    said = capsys.readouterr().out
    assert "neftune_kernels[bench]" in said and "ragged" in said
    assert not (tmp_path / "none.png").exists()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers.*neftune_kernels\[demo\]"):
        doctor.main([])


def test_bad_input(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        doctor.main(["--texts", str(empty)])
    with pytest.raises(ValueError, match="noise_alpha must be finite"):
        doctor.main(["--alpha", "-1"])
    with pytest.raises(SystemExit):
        doctor.main(["--alpha", "0"])
    assert "nothing to see" in capsys.readouterr().err
