"""A tokenizer's file, whatever kind of tokenizer it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wordsight.data.sentencepiece import SentencePieceTokenizer, is_sentencepiece
from wordsight.data.tokenize import ClipTokenizer, _read_json
from wordsight.data.wordpiece import WordPieceTokenizer, is_wordpiece

if TYPE_CHECKING:
    from wordsight.data.tokenize import TextTokenizer


def read_tokenizer(path: str | Path, context_length: int) -> TextTokenizer:
    """A tokenizer from its file or folder: CLIP's BPE, BERT's WordPiece or SentencePiece, by what the file holds.

    Args:
        path: a `tokenizer.json`, a `vocab.txt` (WordPiece), a `spiece.model` (SentencePiece), or the folder that has one.
        context_length: L, in tokens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of them.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in ("spiece.model", "tokenizer.json", "vocab.json", "vocab.txt") if (file / name).is_file()]
        file = found[0] if found else file / "tokenizer.json"
    if file.suffix == ".model" or (file.name != "vocab.json" and file.suffix == ".json" and is_sentencepiece(_read_json(file))):
        return SentencePieceTokenizer.from_file(file, context_length)
    if file.suffix == ".txt" or (file.name != "vocab.json" and is_wordpiece(_read_json(file))):
        return WordPieceTokenizer.from_file(file, context_length)
    return ClipTokenizer.from_file(file.parent if file.name == "vocab.json" else file, context_length)
