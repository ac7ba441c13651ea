"""BERT's tokenizer: WordPiece over cleaned, usually lower-cased words (arXiv 1810.04805, section 3; 1609.08144, section 4.1).

Normalising, splitting and the search for pieces are the engine's of `tokenizers`; rows are cut and padded here.

Shape legend: N texts, L context length in tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.data.tokenize import _read_json, _write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

PAD_TOKEN, UNKNOWN_TOKEN, START_TOKEN, END_TOKEN, MASK_TOKEN = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARACTERS = 100  # a longer word is unknown as a whole, as in BERT


class WordPieceTokenizer:
    """Texts to BERT's token ids: [CLS], the pieces, [SEP], padding; a longer text is cut and keeps its [SEP].

    A special token's name in a text ("[SEP]") is that token, as transformers has it.

    Args:
        vocab: token -> id, with [PAD], [UNK], [CLS] and [SEP]; pieces that go on a word begin with "##".
        context_length: L, at least 2 tokens.
        lowercase: whether texts are lower-cased.
        strip_accents: whether accents are taken off letters; None: where texts are lower-cased.
        split_chinese: whether each Chinese character is a word.

    Raises:
        ValueError: a vocabulary without the special tokens or whose ids are not 0, 1, 2, ..., or an option out of range.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        *,
        context_length: int = 512,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        split_chinese: bool = True,
    ) -> None:
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"the ids of a vocabulary of {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once")
        self._set_up(_make_engine(vocab, lowercase, strip_accents, split_chinese), context_length)

    def _set_up(self, engine: Tokenizer, context_length: int) -> None:
        vocab = engine.get_vocab(with_added_tokens=True)
        if missing := [token for token in SPECIAL_TOKENS[:4] if token not in vocab]:
            raise ValueError(f"the vocabulary has no {' and no '.join(missing)}: this is not a BERT tokenizer's vocabulary")
        self.pad_id, self.unknown_id, self.start_id, self.end_id = (vocab[token] for token in SPECIAL_TOKENS[:4])
        self.vocab_size = engine.get_vocab_size(with_added_tokens=True)
        self._engine = engine
        self._set_context_length(context_length)

    def _set_context_length(self, context_length: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (start and end token), got {context_length}")
        self.context_length = context_length

    def with_options(self, *, context_length: int | None = None) -> WordPieceTokenizer:
        """The same vocabulary with another context length; it is shared, not copied."""
        other = copy.copy(self)
        if context_length is not None:
            other._set_context_length(context_length)
        return other

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 512) -> WordPieceTokenizer:
        """A tokenizer from a `tokenizer.json` or `vocab.txt`, or the folder that has one.

        Args:
            path: the file or its folder, written by `save` or by transformers. Beside a `vocab.txt`, `tokenizer_config.json` says
                whether texts are lower-cased.
            context_length: L, in tokens; what the file says of cutting and padding is left aside.

        Raises:
            FileNotFoundError: neither file is there.
            ValueError: the file is not a BERT tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json" if (file / "tokenizer.json").exists() else file / "vocab.txt"
        if file.suffix == ".txt":
            tokens = file.read_text(encoding="utf-8").split("\n")
            vocab = {token.removesuffix("\r"): i for i, token in enumerate(tokens[:-1] if not tokens[-1] else tokens)}
            settings = file.with_name("tokenizer_config.json")
            options = _read_json(settings) if settings.is_file() else {}
            return cls(
                vocab,
                context_length=context_length,
                lowercase=options.get("do_lower_case", True),
                strip_accents=options.get("strip_accents"),
                split_chinese=options.get("tokenize_chinese_chars", True),
            )
        content = _read_json(file)
        if not is_wordpiece(content):
            raise ValueError(f"{file} is not a BERT tokenizer (a WordPiece whose pieces go on with '##')")
        from tokenizers import Tokenizer

        made = cls.__new__(cls)
        try:
            engine = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the engine raises bare Exceptions
            raise ValueError(f"{file} is a damaged tokenizer: {error}") from error
        engine.no_truncation()
        engine.no_padding()
        made._set_up(engine, context_length)
        return made

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L] ids.

        Raises:
            ValueError: something in `texts` is not a string.
        """
        import torch

        texts = [texts] if isinstance(texts, str) else texts
        room = self.context_length - 2
        rows_NL = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        for row_L, text in zip(rows_NL, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[:room], self.end_id]
            row_L[: len(ids)] = torch.tensor(ids)
        return rows_NL

    def encode(self, text: str) -> list[int]:
        """All token ids of one text, without [CLS], [SEP], cut or padding."""
        if not isinstance(text, str):
            raise ValueError(f"a tokenizer takes strings, got {type(text).__name__}: {text!r:.80}")
        if not text.isascii():  # half a surrogate pair is no character; the normaliser takes its like out too
            text = text.encode("utf-8", "ignore").decode("utf-8")
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids up to the first [SEP], words joined by one space, without [CLS] and padding."""
        words: list[str] = []
        for i in ids:
            if i == self.end_id:
                break
            token = self._engine.id_to_token(int(i))
            if token is None:
                raise ValueError(f"token ids are in [0, {self.vocab_size}), got {int(i)}")
            if token.startswith("##") and words:
                words[-1] += token[2:]
            elif i not in (self.start_id, self.pad_id):
                words.append(token)
        return " ".join(words)

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint's JSON says about this tokenizer; `from_file` takes `context_length` back."""
        return {
            "type": "wordpiece",
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "pad_id": self.pad_id,
            "start_id": self.start_id,
            "end_id": self.end_id,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder`, whole or not at all; returns its path."""
        path = Path(folder) / "tokenizer.json"
        content = json.loads(self._engine.to_str())
        padding = {"strategy": {"Fixed": self.context_length}, "direction": "Right", "pad_to_multiple_of": None}
        content["padding"] = padding | {"pad_id": self.pad_id, "pad_type_id": 0, "pad_token": PAD_TOKEN}
        content["truncation"] = {"direction": "Right", "max_length": self.context_length, "strategy": "LongestFirst", "stride": 0}
        _write_text(path, json.dumps(content, ensure_ascii=False))
        return path

    def save_huggingface(self, folder: str | Path) -> list[Path]:
        """Write the files by which transformers' BertTokenizer and AutoTokenizer load this vocabulary; returns their paths."""
        content = json.loads(self._engine.to_str())
        normalizer = content["normalizer"] or {}
        vocab = sorted(self._engine.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        names = {"pad": PAD_TOKEN, "unk": UNKNOWN_TOKEN, "cls": START_TOKEN, "sep": END_TOKEN}
        specials = {f"{name}_token": token for name, token in names.items()}
        if self._engine.token_to_id(MASK_TOKEN) is not None:
            specials["mask_token"] = MASK_TOKEN
        config = {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": self.context_length,
            "do_lower_case": normalizer.get("lowercase", True),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
            **specials,
        }
        texts = {
            "vocab.txt": "\n".join([*(token for token, _ in vocab), ""]),
            "tokenizer.json": json.dumps(content, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "special_tokens_map.json": json.dumps(specials, indent=2),
        }
        for name, text in texts.items():
            _write_text(Path(folder) / name, text)
        return [Path(folder) / name for name in texts]

    def __deepcopy__(self, memo: dict[int, Any]) -> WordPieceTokenizer:
        return self  # never changes once made, so copies of a model share it


def is_wordpiece(content: Any) -> bool:
    """Whether the JSON of a `tokenizer.json` is a BERT tokenizer's."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "vocab" not in model or "merges" in model:
        return False
    return model.get("type", "WordPiece") == "WordPiece" and model.get("continuing_subword_prefix", "##") == "##"


def train_wordpiece(texts: Iterable[str], vocab_size: int, *, context_length: int = 512) -> WordPieceTokenizer:
    """Learn a lower-cased WordPiece vocabulary from texts, whose first ids are [PAD], [UNK], [CLS], [SEP], [MASK].

    The same texts give the same vocabulary: all their characters come next, in order, alone and going on a word.

    Args:
        texts: what to learn from, read once.
        vocab_size: number of ids; fewer come out where the texts have no more pairs to merge.
        context_length: L.

    Raises:
        ValueError: vocab_size has no room for the special tokens and the characters.
    """
    from tokenizers import trainers

    engine = _make_engine({token: i for i, token in enumerate(SPECIAL_TOKENS)}, True, None, True)
    texts = [engine.normalizer.normalize_str(text) for text in texts]
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    # as special tokens, because the trainer numbers what it finds by itself in an order that changes, and breaks ties by number
    first = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    if vocab_size < len(first):
        raise ValueError(
            f"vocab_size must be at least {len(first)} for these texts ({len(SPECIAL_TOKENS)} special tokens and "
            f"{len(characters)} characters, alone and going on a word), got {vocab_size}"
        )
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    engine.train_from_iterator(texts, trainer)
    return WordPieceTokenizer(engine.get_vocab(with_added_tokens=True), context_length=context_length)


def _make_engine(vocab: Mapping[str, int], lowercase: bool, strip_accents: bool | None, split_chinese: bool) -> Tokenizer:
    """The pipeline of transformers' BertTokenizer over a vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = models.WordPiece(dict(vocab), unk_token=UNKNOWN_TOKEN, max_input_chars_per_word=MAX_WORD_CHARACTERS)
    engine = Tokenizer(model)
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=split_chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    known = [token for token in SPECIAL_TOKENS if token in vocab]
    engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])
    if START_TOKEN in vocab and END_TOKEN in vocab:
        ends = [(token, vocab[token]) for token in (START_TOKEN, END_TOKEN)]
        engine.post_processor = processors.TemplateProcessing(
            single=f"{START_TOKEN} $A {END_TOKEN}", pair=f"{START_TOKEN} $A {END_TOKEN} $B:1 {END_TOKEN}:1", special_tokens=ends
        )
    return engine
