"""BERT's tokenizer: equal to transformers' on hostile texts, rows cut and padded, what is saved comes back."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.data.wordpiece import SPECIAL_TOKENS, WordPieceTokenizer, train_wordpiece

TEXTS = [
    "a photo of a cat",
    "unaffable Playing, isn't it?",
    "été à la plage – naïve Ångström",
    "我爱北京 天安门 kanji漢字mixed",
    "👩‍🚀 rocket 🚀🚀 flag 🇩🇪 ❤️",
    "tab\tnew\nline\r\x00null\x07bell\u200bzero\u00a0nbsp\ufffd",
    "",
    "   ",
    "[SEP] in a text, and [MASK] and [CLS][PAD]",
    "x" * 101 + " " + "y" * 100,
    "İstanbul ǅ ß ﬁ",
    "한국어 ไทย हिन्दी العربية",
    "e\u0301 combining, \u202eright to left\u202c",
    "1,000.50$ & <html> &amp; http://a.b/c?d=e#f",
    "word " * 10_000,
]


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return train_wordpiece([*TEXTS[:-1], "playing played the player", "cats and dogs"] * 3, 400, context_length=24)


def reference(folder: Path) -> object:
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_ids_equal_transformers(tmp_path: Path, tokenizer: WordPieceTokenizer, lowercase: bool, file: str) -> None:
    vocab = json.loads(tokenizer._engine.to_str())["model"]["vocab"]
    mine = WordPieceTokenizer(vocab, context_length=24, lowercase=lowercase)
    mine.save_huggingface(tmp_path)
    (tmp_path / {"tokenizer.json": "vocab.txt", "vocab.txt": "tokenizer.json"}[file]).unlink()
    theirs = reference(tmp_path)
    ours = WordPieceTokenizer.from_file(tmp_path, 24)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text[:80]
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    assert torch.equal(ours(TEXTS), expected["input_ids"])
    lengths = expected["attention_mask"].sum(1)  # a "[PAD]" in a text is no padding
    assert torch.equal((ours(TEXTS) != ours.pad_id).mul(torch.arange(1, 25)).amax(1), lengths)


def test_rows_start_end_and_are_padded(tokenizer: WordPieceTokenizer) -> None:
    rows = tokenizer(TEXTS)
    assert rows.shape == (len(TEXTS), 24)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == tokenizer.start_id).all()
    assert rows[6].tolist() == [tokenizer.start_id, tokenizer.end_id] + [tokenizer.pad_id] * 22
    assert rows[-1, -1] == tokenizer.end_id
    assert tokenizer("one").shape == (1, 24)
    assert tokenizer([]).shape == (0, 24)
    assert tokenizer(["a \ud800 b"]).tolist() == tokenizer(["a  b"]).tolist()
    with pytest.raises(ValueError, match="takes strings, got int"):
        tokenizer([3])


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_ids_of_the_vocabulary(text: str) -> None:
    tokenizer = _small()
    row = tokenizer(text)[0]
    assert row.min() >= 0
    assert row.max() < tokenizer.vocab_size
    assert (row == tokenizer.start_id).sum() >= 1


_cached: list[WordPieceTokenizer] = []


def _small() -> WordPieceTokenizer:
    if not _cached:
        _cached.append(train_wordpiece(TEXTS[:5], 200, context_length=12))
    return _cached[0]


def test_what_is_saved_comes_back(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    path = tokenizer.save(tmp_path)
    again = WordPieceTokenizer.from_file(path, tokenizer.context_length)
    assert again.to_config() == tokenizer.to_config()
    assert torch.equal(again(TEXTS), tokenizer(TEXTS))
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS), tokenizer(TEXTS))
    assert copy.deepcopy(tokenizer) is tokenizer
    longer = tokenizer.with_options(context_length=30)
    assert longer(TEXTS).shape == (len(TEXTS), 30)
    assert tokenizer.context_length == 24
    assert tokenizer.decode(tokenizer("Playing, cats")[0].tolist()) == "playing , cats"


def test_training_puts_special_tokens_first(tokenizer: WordPieceTokenizer) -> None:
    assert [tokenizer._engine.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert tokenizer.pad_id == 0
    assert tokenizer.vocab_size <= 400
    again = train_wordpiece([*TEXTS[:-1], "playing played the player", "cats and dogs"] * 3, 400)
    assert again._engine.get_vocab() == tokenizer._engine.get_vocab()
    words = train_wordpiece(["playing played player plays"] * 9, 60)
    assert words.encode("plays") != words.encode("play s")
    assert len(words.encode("playing")) < 7


def test_other_files_are_refused(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    from wordsight.data.tokenize import train_tokenizer

    bpe = train_tokenizer(["a cat"], 520).save(tmp_path)
    with pytest.raises(ValueError, match="not a BERT tokenizer"):
        WordPieceTokenizer.from_file(bpe)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        WordPieceTokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": 3}}')
    with pytest.raises(ValueError, match="damaged"):
        WordPieceTokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        WordPieceTokenizer.from_file(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no \[PAD\] and no \[UNK\]"):
        WordPieceTokenizer({"a": 0, "[CLS]": 1, "[SEP]": 2})
    with pytest.raises(ValueError, match="must be 0 to 1"):
        WordPieceTokenizer({"a": 0, "[CLS]": 2})
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer.with_options(context_length=1)
    with pytest.raises(ValueError, match="at least 7 for these texts"):
        train_wordpiece(["a a"], 6)
