"""CLIP's tokenizer: lower-cased byte-level BPE (Sennrich et al., arXiv 1508.07909; CLIP, arXiv 2103.00020, section 2.4).

The words of plain ASCII texts are looked up in a cache of token ids; a word that is not there yet is split by CLIP's pattern and
merged by the engine of `tokenizers`. `ftfy`, `html` and `regex` are only used where a text is not plain ASCII.

Shape legend: N texts, L context length in tokens.
"""

from __future__ import annotations

import copy
import gzip
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from torch import Tensor

CLIP_VOCABULARY = 49408  # tokens of the published models
START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
CLEANINGS = ("open_clip", "huggingface")

# open_clip writes its special tokens so, and reads them in a text as the special ids; everything else calls them as above.
_OPEN_CLIP_SPECIALS = {"<start_of_text>": START_TOKEN, "<end_of_text>": END_TOKEN}
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_ASCII_PIECES = re.compile(rf"<start_of_text>|<end_of_text>|{_CONTRACTIONS}|[a-z]+|[0-9]|[^\sa-z0-9]+")
_UNICODE_PIECES = rf"<start_of_text>|<end_of_text>|{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_HUGGINGFACE_PIECES = rf"<\|startoftext\|>|<\|endoftext\|>|{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_is_plain_lines = re.compile(r"[\t\n\r -~]*").fullmatch

_ID_BYTES = 8  # ids travel as the bytes of int64
_MAX_CACHED_WORDS = 1 << 17
_MAX_CACHED_CHARACTERS = 48  # a longer "word" is rather a link or noise, and not worth its room


@lru_cache(maxsize=1)
def _byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each of the 256 bytes (GPT-2's map), by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@lru_cache(maxsize=1)
def _byte_table() -> dict[int, str]:
    return dict(enumerate(_byte_characters()))


def _as_bytes(piece: str) -> str:
    """A piece's UTF-8 bytes, each as its printable character."""
    if piece.isascii() and piece.isprintable():
        return piece  # such bytes stand for themselves
    return piece.encode("utf-8").decode("latin-1").translate(_byte_table())


def _base_tokens() -> list[str]:
    """The 512 tokens below the merges, in CLIP's order: printable bytes first, then the same at the end of a word."""
    characters = sorted(_byte_characters())
    return [*characters, *(character + "</w>" for character in characters)]


def _clean(text: str) -> str:
    """What open_clip does before it splits: mended encoding, HTML entities resolved twice, lower case."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).lower()


@lru_cache(maxsize=1)
def _split_unicode() -> Callable[[str], list[str]]:
    import regex

    return regex.compile(_UNICODE_PIECES, regex.IGNORECASE).findall


def _pieces(word: str) -> list[str]:
    """CLIP's split of one lower-cased word."""
    return _ASCII_PIECES.findall(word) if word.isascii() else _split_unicode()(word)


class _WordCache(dict[str, bytes]):
    """word -> the bytes of its ids; filled on first sight, emptied when full."""

    def __init__(self, encode_word: Callable[[str], bytes]) -> None:
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> bytes:
        ids = self.encode_word(word)
        if len(word) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= _MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class TextTokenizer(Protocol):
    """What every tokenizer of a model can do.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        context_length: L, the longest row.
        pad_id: what fills a row behind its text.
    """

    vocab_size: int
    context_length: int
    pad_id: int

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L]."""
        ...

    def save(self, folder: str | Path) -> Any:
        """Write its files into a folder, from which the class's `from_file` reads them back."""
        ...

    def to_config(self) -> dict[str, Any]:
        """Its options as JSON values: "type", "vocab_size" and what `from_file` takes."""
        ...


class ClipTokenizer:
    """Texts to CLIP's token ids: start, the text's BPE tokens, end, padding; a longer text is cut and keeps its end token.

    Args:
        vocab: token -> id, with `<|startoftext|>` and `<|endoftext|>`; the end token must have the highest id, because CLIP's
            text tower takes the feature at the arg-max of the ids.
        merges: pairs of tokens in the order in which they are merged.
        context_length: L, at least 2 tokens.
        clean: "open_clip" mends the encoding (ftfy), resolves HTML entities and lower-cases; "huggingface" does what
            transformers' CLIPTokenizer does: NFC and lower case only, and `<|startoftext|>` in a text is the special token.
        pad_id: what fills a row after its end token; CLIP pads with 0, which is also the token "!", so that only the end
            token marks the end.

    Raises:
        ValueError: a vocabulary without the special tokens or with an end id that is not the highest, or an option out of range.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        context_length: int = 77,
        clean: str = "open_clip",
        pad_id: int = 0,
    ) -> None:
        from tokenizers.models import BPE

        missing = [token for token in (START_TOKEN, END_TOKEN) if token not in vocab]
        if missing:
            raise ValueError(f"the vocabulary has no {' and no '.join(missing)}: this is not a CLIP tokenizer's vocabulary")
        self.start_id, self.end_id = vocab[START_TOKEN], vocab[END_TOKEN]
        self.vocab_size = len(vocab)
        if self.end_id != self.vocab_size - 1:
            raise ValueError(
                f"the id of {END_TOKEN} must be the highest ({self.vocab_size - 1}), because a text's feature is read there; "
                f"got {self.end_id}"
            )
        self._bpe: BPE = BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix="</w>", continuing_subword_prefix="")
        self._set_options(context_length, clean, pad_id)

    def _set_options(self, context_length: int, clean: str, pad_id: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (start and end token), got {context_length}")
        if clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {', '.join(CLEANINGS)}, got {clean!r}")
        if not 0 <= pad_id < self.vocab_size:
            raise ValueError(f"pad_id must be in [0, {self.vocab_size}), got {pad_id}")
        self.context_length, self.clean, self.pad_id = context_length, clean, pad_id
        self._words = _WordCache(self._encode_word)
        self._pipeline = self.engine() if clean == "huggingface" else None

    def with_options(
        self, *, context_length: int | None = None, clean: str | None = None, pad_id: int | None = None
    ) -> ClipTokenizer:
        """The same vocabulary with other options; what is None stays. The vocabulary is shared, not copied."""
        other = copy.copy(self)
        other._set_options(
            self.context_length if context_length is None else context_length,
            self.clean if clean is None else clean,
            self.pad_id if pad_id is None else pad_id,
        )
        return other

    @classmethod
    def clip(cls, context_length: int = 77, *, clean: str = "open_clip", pad_id: int = 0) -> ClipTokenizer:
        """The tokenizer of the published CLIP models: 49,408 tokens (48,894 merges)."""
        return _published().with_options(context_length=context_length, clean=clean, pad_id=pad_id)

    @classmethod
    def from_file(
        cls, path: str | Path, context_length: int = 77, *, clean: str | None = None, pad_id: int | None = None
    ) -> ClipTokenizer:
        """A tokenizer from a `tokenizer.json` (or the folder that has one, or `vocab.json` and `merges.txt`).

        Args:
            path: the file or its folder, written by `save` or by transformers.
            context_length: L, in tokens.
            clean: as in the class; None takes what the file says.
            pad_id: as in the class; None takes what the file says (0 where it says nothing).

        Raises:
            FileNotFoundError: neither file is there.
            ValueError: the file is not a CLIP tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            parts = (file / "vocab.json", file / "merges.txt")
            if not (file / "tokenizer.json").exists() and all(part.exists() for part in parts):
                vocab = _read_json(parts[0])
                lines = parts[1].read_text(encoding="utf-8").split("\n")
                merges = _pairs(line for line in lines if line and not line.startswith("#version"))
                return cls(vocab, merges, context_length=context_length, clean=clean or "huggingface", pad_id=pad_id or 0)
            file = file / "tokenizer.json"
        content = _read_json(file)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or model.get("end_of_word_suffix") != "</w>" or "merges" not in model:
            raise ValueError(f"{file} is not a CLIP tokenizer (a BPE with the end-of-word suffix '</w>')")
        vocab = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        merges = _pairs(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        says = "open_clip" if "<start_of_text>" in json.dumps(content.get("pre_tokenizer")) else "huggingface"
        padding = content.get("padding") or {}
        return cls(
            vocab,
            merges,
            context_length=context_length,
            clean=clean or says,
            pad_id=padding.get("pad_id", 0) if pad_id is None else pad_id,
        )

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L] ids.

        Raises:
            ValueError: something in `texts` is not a string.
        """
        import torch

        if isinstance(texts, str):
            texts = [texts]
        start, end, pad = (self._to_bytes((i,)) for i in (self.start_id, self.end_id, self.pad_id))
        room = self.context_length - 2
        padding = pad * room
        rows_NL = bytearray()
        for text in texts:
            body = self._encode(text, room)[: room * _ID_BYTES]
            rows_NL += start + body + end + padding[len(body) :]
        if not rows_NL:
            return torch.empty((0, self.context_length), dtype=torch.int64)
        return torch.frombuffer(rows_NL, dtype=torch.int64).view(-1, self.context_length)

    def encode(self, text: str) -> list[int]:
        """All token ids of one text, without start, end, cut or padding."""
        return memoryview(self._encode(text, None)).cast("q").tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-cased text of token ids up to the first end token, words joined by one space."""
        tokens = []
        for i in ids:
            if i == self.end_id:
                break
            if i != self.start_id:
                token = self._bpe.id_to_token(int(i))
                if token is None:
                    raise ValueError(f"token ids are in [0, {self.vocab_size}), got {int(i)}")
                tokens.append(token)
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        words = "".join(tokens).split("</w>")
        return " ".join(bytes(to_byte[c] for c in word).decode("utf-8", "replace") for word in words).strip()

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint's JSON says about this tokenizer; `from_file` takes `context_length`, `clean` and `pad_id` back."""
        return {
            "type": "clip_bpe",
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "clean": self.clean,
            "pad_id": self.pad_id,
            "start_id": self.start_id,
            "end_id": self.end_id,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder`, whole or not at all; returns its path."""
        content = json.loads(self.engine().to_str())
        if self.clean == "open_clip":  # marks the cleaning for `from_file`; transformers reads the same tokens from it
            content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": _UNICODE_PIECES}
        padding = {"strategy": {"Fixed": self.context_length}, "direction": "Right", "pad_to_multiple_of": None}
        content["padding"] = padding | {"pad_id": self.pad_id, "pad_type_id": 0, "pad_token": self._bpe.id_to_token(self.pad_id)}
        content["truncation"] = {"direction": "Right", "max_length": self.context_length, "strategy": "LongestFirst", "stride": 0}
        path = Path(folder) / "tokenizer.json"
        _write_text(path, json.dumps(content, ensure_ascii=False))
        return path

    def save_huggingface(self, folder: str | Path) -> list[Path]:
        """Write the files by which transformers' CLIPTokenizer and AutoTokenizer load this vocabulary; returns their paths."""
        engine = self.engine()
        model = json.loads(engine.to_str())["model"]
        vocab = model["vocab"] | {START_TOKEN: self.start_id, END_TOKEN: self.end_id}
        specials = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN, "pad_token": END_TOKEN}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, "do_lower_case": True, **specials}
        texts = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]),
            "tokenizer.json": engine.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "special_tokens_map.json": json.dumps(specials, indent=2),
        }
        for name, text in texts.items():
            _write_text(Path(folder) / name, text)
        return [Path(folder) / name for name in texts]

    def engine(self) -> Tokenizer:
        """The pipeline of transformers' CLIPTokenizer over this vocabulary, as an engine of `tokenizers`."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

        engine = Tokenizer(self._bpe)
        engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_HUGGINGFACE_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START_TOKEN, END_TOKEN)])
        engine.post_processor = processors.RobertaProcessing(
            (END_TOKEN, self.end_id), (START_TOKEN, self.start_id), trim_offsets=False, add_prefix_space=False
        )
        return engine

    def _encode(self, text: str, max_words: int | None) -> bytes:
        """The ids of a text as bytes; only its first `max_words` words are looked at (each gives one token or more)."""
        if not isinstance(text, str):
            raise ValueError(f"a tokenizer takes strings, got {type(text).__name__}: {text!r:.80}")
        if text.isascii() and "&" not in text and (text.isprintable() or _is_plain_lines(text)):
            if self._pipeline is not None and "<" in text:  # perhaps a special token, of the one spelling or the other
                return self._to_bytes(self._pipeline.encode(text, add_special_tokens=False).ids)
            words = text.lower().split()
        elif self._pipeline is not None:
            return self._to_bytes(self._pipeline.encode(text, add_special_tokens=False).ids)
        else:
            words = _clean(text).split()
        return b"".join(map(self._words.__getitem__, words[:max_words]))

    def _encode_word(self, word: str) -> bytes:
        """The ids of one cleaned, lower-cased word."""
        ids: list[int] = []
        for piece in _pieces(word):
            if self._pipeline is None and piece in _OPEN_CLIP_SPECIALS:
                ids.append(self.start_id if piece == "<start_of_text>" else self.end_id)
                continue
            ids.extend(token.id for token in self._bpe.tokenize(_as_bytes(piece)))
        return self._to_bytes(ids)

    @staticmethod
    def _to_bytes(ids: Iterable[int]) -> bytes:
        return b"".join(i.to_bytes(_ID_BYTES, "little") for i in ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClipTokenizer:
        return self  # never changes once made, so copies of a model share it

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._words = _WordCache(self._encode_word)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, context_length: int = 77, clean: str = "open_clip", pad_id: int = 0
) -> ClipTokenizer:
    """Learn a BPE vocabulary from texts, split as CLIP splits them (arXiv 1508.07909, section 3.2; CLIP's has 49,408 tokens).

    The ids are laid out as CLIP's: 512 byte tokens, the merges, start, end. So id 0 (the default padding) is "!" and the end
    id is the highest.

    Args:
        texts: what to learn from, read once.
        vocab_size: number of ids, at least 514; fewer come out where the texts have no more pairs to merge.
        context_length, clean, pad_id: as in `ClipTokenizer`.

    Raises:
        ValueError: vocab_size under 514.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    base = _base_tokens()
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size must be at least {len(base) + 2} (512 byte tokens, start and end), got {vocab_size}")

    def lines() -> Iterable[str]:
        for text in texts:
            pieces = (piece for word in _clean(text).split() for piece in _pieces(word))
            yield " ".join(map(_as_bytes, pieces))

    engine = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The trainer counts only the byte tokens that it meets: asked for this many, it gives enough merges for ours, which has all.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False, special_tokens=[])
    engine.train_from_iterator(lines(), trainer)
    pairs = [tuple(pair) for pair in json.loads(engine.to_str())["model"]["merges"]]
    known, merges = set(base), []
    for first, second in pairs:
        if len(known) == vocab_size - 2:
            break
        known.add(first + second)  # two merges may end in the same token
        merges.append((first, second))
    return ClipTokenizer(_vocabulary(merges), merges, context_length=context_length, clean=clean, pad_id=pad_id)


@lru_cache(maxsize=1)
def _published() -> ClipTokenizer:
    """CLIP's vocabulary, read once (about 0.15 s)."""
    asset = resources.files("wordsight.data").joinpath("assets/clip_merges.txt.gz").read_bytes()
    merges = _pairs(gzip.decompress(asset).decode("utf-8").split("\n"))
    return ClipTokenizer(_vocabulary(merges), merges)


def _pairs(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [tuple(line.split(" ")) for line in lines]  # type: ignore[misc]


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """CLIP's layout of ids: bytes, bytes at the end of a word, merges in order, start, end."""
    tokens = dict.fromkeys([*_base_tokens(), *(first + second for first, second in merges), START_TOKEN, END_TOKEN])
    return {token: i for i, token in enumerate(tokens)}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
