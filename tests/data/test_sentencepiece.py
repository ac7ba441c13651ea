"""SigLIP's tokenizer against transformers', its text rules, its files, and what users may do wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interop.siglip_reference import LENGTH, VOCABULARY, corpus, vocabulary
from wordsight.data.sentencepiece import CLEANINGS, SentencePieceTokenizer, canonical, train_sentencepiece
from wordsight.data.tokenizers import read_tokenizer

HOSTILE = [
    *("", " ", "▁", "▁▁ a", "</s>", "a </s> b", "</s></s>", "<unk>cat <unk>", "A_b", "tab\tnew\nline", "é" * 50, "☃ snow"),
    *("\u200bzero", "a" * 500, "cat " * 100, "</s> cat", "cat</s>", "!!!", "<pad>", "<s>x", "&amp; cat", "ﬁ ①", "İ", "<unk"),
    *("\u3000wide", "x </S> y", "cat  ▁dog", " <unk> ", "</s>dog </s>", "☃</s>", "!☃☃▁Écat</s>!!", "\n<_☃</s>", "🐈‍⬛", "naïve"),
]
PIECES = ["a", "cat", " ", "▁", "</s>", "<unk>", "_", "!", "É", "☃", "\n", "dog", "<", ">", "\u0301"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, found in the files that ours writes for it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("siglip")
    vocabulary().save_huggingface(folder)
    found = AutoTokenizer.from_pretrained(folder)
    assert type(found).__name__ == "SiglipTokenizer"
    return found


def theirs(peer: Any, text: str) -> list[int]:
    return peer([text], padding="max_length", truncation=True, max_length=LENGTH).input_ids[0]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_hostile_texts_are_transformers_siglip_tokens(peer: Any, text: str) -> None:
    assert vocabulary()([text])[0].tolist() == theirs(peer, text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(max_size=30))
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_any_text_is_transformers_siglip_tokens(peer: Any, text: str) -> None:
    assert vocabulary()([text])[0].tolist() == theirs(peer, text)


def test_rows_are_pieces_end_and_padding_with_the_end_token() -> None:
    tokenizer = vocabulary()
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id, tokenizer.context_length) == (VOCABULARY, 1, 1, LENGTH)
    rows = tokenizer(["cat", "dog " * 40])
    assert rows.dtype == torch.int64
    ids = tokenizer.encode("cat")
    assert rows[0].tolist() == ids + [1] * (LENGTH - len(ids))
    assert rows[1].tolist() == [*tokenizer.encode("dog " * 40)[: LENGTH - 1], 1]
    assert tokenizer("cat").tolist() == rows[:1].tolist()
    assert tokenizer([]).shape == (0, LENGTH)
    assert tokenizer.decode(tokenizer("Two DOGS, running!")[0].tolist()) == "two dogs running"


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        ("huggingface", "théampamp redblue car s"),
        ("big_vision", "théampamp red blue car s"),
        ("open_clip", "thé red blue car s"),
        ("lower", "  thé&amp;amp; red_blue\t car!  </s> "),
    ],
)
def test_each_text_rule_in_its_details(clean: str, expected: str) -> None:
    assert canonical("  Thé&amp;amp; Red_Blue\t car!  </s> ", clean) == expected


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_canonical_text_is_that_of_big_vision_and_open_clip(text: str) -> None:
    from open_clip.tokenizer import _clean_canonicalize, canonicalize_text

    assert canonical(text, "open_clip") == _clean_canonicalize(text)
    assert " ".join(canonical(text, "big_vision").split()) == canonicalize_text(text)


def test_rules_other_than_transformers_know_no_special_names_in_a_text() -> None:
    tokenizer = vocabulary().with_options(clean="big_vision")
    assert tokenizer.encode("cat </s> dog") == tokenizer.encode("cat s dog")
    assert 1 not in tokenizer.encode("cat </s> dog")
    assert 1 in vocabulary().encode("cat </s> dog")


@pytest.mark.parametrize("clean", CLEANINGS)
def test_files_and_options_survive(tmp_path: Path, clean: str) -> None:
    tokenizer = vocabulary().with_options(clean=clean, pad_id=0, context_length=7)
    path = tokenizer.save(tmp_path)
    options = tokenizer.to_config()
    assert path.name == options["file"] == "spiece.model"
    known = {name: options[name] for name in ("context_length", "clean", "end_id", "pad_id")}
    for place in (path, tmp_path):
        again = SentencePieceTokenizer.from_file(place, **known)
        assert again.to_config() == options
        assert torch.equal(again(HOSTILE), tokenizer(HOSTILE))
    assert torch.equal(read_tokenizer(path, LENGTH)(HOSTILE), vocabulary()(HOSTILE))


def test_pickles_and_copies() -> None:
    import copy
    import pickle

    tokenizer = vocabulary()
    assert copy.deepcopy(tokenizer) is tokenizer
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(HOSTILE), tokenizer(HOSTILE))


def gemma_like(folder: Path) -> Path:
    """A vocabulary as SigLIP 2 has it: BPE with bytes to fall back on, <pad> 0, <eos> 1, <bos> 2, <unk> 3."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    engine.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False))
    content = json.loads(engine.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 4]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def test_siglip_2_s_vocabulary_is_read_lower_cased_and_padded_with_pad(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = SentencePieceTokenizer.from_file(gemma_like(tmp_path), LENGTH)
    assert (tokenizer.clean, tokenizer.end_id, tokenizer.pad_id) == ("lower", 1, 0)
    assert tokenizer("A Cat!")[0].tolist() == tokenizer("a cat!")[0].tolist()
    assert tokenizer("cat").tolist()[0][-1] == 0
    tokenizer.save_huggingface(tmp_path / "theirs")
    peer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ["A Cat!", "two  dogs", "☃ snow_man", "", "x" * 300, "été 🐈"]:
        assert theirs(peer, text) == tokenizer([text])[0].tolist(), text
    again = SentencePieceTokenizer.from_file(tokenizer.save(tmp_path / "own").parent, LENGTH)
    assert torch.equal(again(["A Cat!", "☃"]), tokenizer(["A Cat!", "☃"]))
    assert tokenizer.to_config()["file"] == "tokenizer.json"
    assert isinstance(read_tokenizer(tmp_path, LENGTH), SentencePieceTokenizer)


def test_the_same_texts_give_the_same_vocabulary() -> None:
    first, second = (train_sentencepiece(corpus(), 60) for _ in range(2))
    assert first._model == second._model
    with pytest.raises(ValueError, match="no vocabulary of 9 tokens"):
        train_sentencepiece(corpus(), 9)


def test_wrong_use_is_named(tmp_path: Path) -> None:
    tokenizer = vocabulary()
    with pytest.raises(ValueError, match="takes strings, got int"):
        tokenizer([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"in \[0, 120\), got 120"):
        tokenizer.decode([120])
    for options, says in (({"clean": "upper"}, "'upper'"), ({"context_length": 0}, "at least 1"), ({"pad_id": 120}, "pad_id")):
        with pytest.raises(ValueError, match=says):
            tokenizer.with_options(**options)
    (tmp_path / "spiece.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"spiece\.model: no SentencePiece model"):
        SentencePieceTokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ValueError, match="no SentencePiece vocabulary"):
        SentencePieceTokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError):
        SentencePieceTokenizer.from_file(tmp_path / "nowhere")
    assert tokenizer(["half a pair \ud800 cat"]).tolist() == tokenizer(["half a pair  cat"]).tolist()
