"""SigLIP's tokenizer: SentencePiece over canonical text (arXiv 1808.06226; SigLIP, arXiv 2303.15343).

A `spiece.model` is read by the engine of `sentencepiece`, a `tokenizer.json` by that of `tokenizers`; rows are cut, ended and
padded here. Who makes a text canonical does it in details of his own:

- "huggingface": transformers' SiglipTokenizer: lower case, ASCII punctuation taken out, white space to single spaces; `</s>` and
  `<unk>` in a text are the special tokens.
- "big_vision": the paper's code where it evaluates: as before, but "_" becomes a space and not nothing, and nothing is special.
- "open_clip": encoding mended (ftfy) and HTML entities resolved twice, then as "big_vision".
- "lower": lower case alone, as both SigLIPs were trained with, and all that SigLIP 2 wants.

Shape legend: N texts, L context length in tokens.
"""

from __future__ import annotations

import copy
import html
import io
import json
import os
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.data.tokenize import _read_json, _write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

CLEANINGS = ("huggingface", "big_vision", "open_clip", "lower")
MODEL_FILE, JSON_FILE, SETTINGS_FILE = "spiece.model", "tokenizer.json", "tokenizer_config.json"
FILES = (MODEL_FILE, JSON_FILE, "tokenizer.model", "sentencepiece.model")
END_TOKENS = ("</s>", "<eos>")  # of T5's vocabulary and its kin (SigLIP), of Gemma's (SigLIP 2)
PAD_TOKEN, UNKNOWN_TOKEN, SPACE = "<pad>", "<unk>", "▁"

_without_punctuation = str.maketrans("", "", string.punctuation)
_white_space = re.compile(r"\s+")
_specials = re.compile(r"(</s>|<unk>)")


def canonical(text: str, clean: str) -> str:
    """A text as the engine gets it; see the top of this file for `clean`."""
    if clean == "lower":
        return text.lower()
    if clean == "huggingface":
        text = text.lower().translate(_without_punctuation)
    else:
        if clean == "open_clip":
            import ftfy

            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = text.replace("_", " ").translate(_without_punctuation).lower()
    return _white_space.sub(" ", text).strip()


class SentencePieceTokenizer:
    """Texts to SentencePiece ids: the canonical text's pieces, the end token, padding; a longer text is cut and keeps its end.

    Args:
        model: the bytes of a `spiece.model`, or the text of a `tokenizer.json`.
        context_length: L.
        clean: how a text is made canonical, one of `CLEANINGS`.
        end_id: of the end token; None: the vocabulary's `</s>` or `<eos>`.
        pad_id: what fills a row behind its end token, which SigLIP sees; None: the end token where that is `</s>` (SigLIP), else
            `<pad>` (SigLIP 2).

    Raises:
        ValueError: a damaged model, a vocabulary without an end token, or an option out of range.
    """

    def __init__(
        self,
        model: bytes | str,
        *,
        context_length: int = 64,
        clean: str = "huggingface",
        end_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        self._model = model
        engine: Any = _load_json(model) if isinstance(model, str) else _load_model(model)
        is_json = isinstance(model, str)
        self.vocab_size: int = engine.get_vocab_size(with_added_tokens=True) if is_json else engine.get_piece_size()
        self._engine = engine
        end_ids = [found for token in END_TOKENS if (found := self._id(token)) is not None]
        if end_id is None and not end_ids:
            raise ValueError(f"the vocabulary has none of {', '.join(END_TOKENS)}: it can't mark the end of a text")
        self.end_id = end_ids[0] if end_id is None else end_id
        if pad_id is None:
            pad_id = self.end_id if self.end_id == self._id("</s>") else self._id(PAD_TOKEN)
        self._set_options(context_length, clean, self.end_id if pad_id is None else pad_id)

    def _set_options(self, context_length: int, clean: str, pad_id: int) -> None:
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1 (the end token), got {context_length}")
        if clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {', '.join(CLEANINGS)}, got {clean!r}")
        for name, value in (("end_id", self.end_id), ("pad_id", pad_id)):
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} must be in [0, {self.vocab_size}), got {value}")
        self.context_length, self.clean, self.pad_id = context_length, clean, pad_id
        # transformers encodes "<unk>" before each text, so that a space at its beginning is kept, and takes those pieces off
        self._num_unknown_pieces = 0 if isinstance(self._model, str) else len(self._engine.encode(UNKNOWN_TOKEN))

    def with_options(
        self, *, context_length: int | None = None, clean: str | None = None, pad_id: int | None = None
    ) -> SentencePieceTokenizer:
        """The same vocabulary with other options; what is None stays. The vocabulary is shared, not copied."""
        other = copy.copy(self)
        other._set_options(
            self.context_length if context_length is None else context_length,
            self.clean if clean is None else clean,
            self.pad_id if pad_id is None else pad_id,
        )
        return other

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        context_length: int = 64,
        *,
        clean: str | None = None,
        end_id: int | None = None,
        pad_id: int | None = None,
    ) -> SentencePieceTokenizer:
        """A tokenizer from a `spiece.model` or `tokenizer.json`, or the folder that has one.

        Args:
            path: the file or its folder. A `tokenizer_config.json` beside it says the end and pad tokens.
            context_length: L, in tokens; what the file says of cutting and padding is left aside.
            clean: as in the class; None: "huggingface" where texts end in `</s>`, else "lower".
            end_id, pad_id: as in the class; None takes what the file beside it says.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no SentencePiece vocabulary.
        """
        file = Path(path)
        if file.is_dir():
            file = next((file / name for name in FILES if (file / name).is_file()), file / MODEL_FILE)
        try:
            model: bytes | str = json.dumps(_read_json(file)) if file.suffix == ".json" else file.read_bytes()
            made = cls(model, context_length=context_length, end_id=end_id, pad_id=pad_id)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        settings = file.with_name(SETTINGS_FILE)
        said = _read_json(settings) if settings.is_file() else {}
        ends, pads = (made._id(_content(said.get(f"{name}_token"))) for name in ("eos", "pad"))
        made.end_id = ends if end_id is None and ends is not None else made.end_id
        if clean is None:
            clean = "huggingface" if made.end_id == made._id("</s>") else "lower"
        return made.with_options(clean=clean, pad_id=pads if pad_id is None else None)

    def _id(self, token: str | None) -> int | None:
        """A token's id, or None where the vocabulary does not have it."""
        if token is None:
            return None
        if isinstance(self._model, str):
            found: int | None = self._engine.token_to_id(token)
            return found
        place: int = self._engine.piece_to_id(token)
        return place if self._engine.id_to_piece(place) == token else None

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L] ids.

        Raises:
            ValueError: something in `texts` is not a string.
        """
        import torch

        texts = [texts] if isinstance(texts, str) else texts
        rows_NL = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        for row_L, text in zip(rows_NL, texts, strict=True):
            ids = self.encode(text)[: self.context_length - 1]
            if not (self.clean == "huggingface" and ids and ids[-1] == self.end_id):  # transformers never ends a text twice
                ids = [*ids, self.end_id]
            row_L[: len(ids)] = torch.tensor(ids)
        return rows_NL

    def encode(self, text: str) -> list[int]:
        """All token ids of one text, made canonical, without end, cut or padding."""
        if not isinstance(text, str):
            raise ValueError(f"a tokenizer takes strings, got {type(text).__name__}: {text!r:.80}")
        if not text.isascii():  # half a surrogate pair is no character
            text = text.encode("utf-8", "ignore").decode("utf-8")
        if isinstance(self._model, str):
            ids: list[int] = self._engine.encode(canonical(text, self.clean), add_special_tokens=False).ids
            return ids
        if self.clean == "huggingface":
            return self._encode_as_transformers(text)
        plain: list[int] = self._engine.encode(canonical(text, self.clean))
        return plain

    def _encode_as_transformers(self, text: str) -> list[int]:
        """The special tokens' names cut out, what stands between them made canonical piece by piece."""
        parts = _specials.split(SPACE + text.replace(SPACE, " "))
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                special = self._id(part)
                ids.append(self._engine.unk_id() if special is None else special)
                continue
            part = part.lstrip() if place else part
            part = part.rstrip() if place < len(parts) - 1 else part
            if part:
                pieces = self._engine.encode(UNKNOWN_TOKEN + canonical(part, self.clean))
                ids += pieces[self._num_unknown_pieces :] if len(pieces) >= self._num_unknown_pieces else pieces
            if place == 0 and len(parts) > 1 and ids == [self._id(SPACE)]:  # nothing before a special token
                ids = []
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids up to the first end token."""
        kept: list[int] = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token ids are in [0, {self.vocab_size}), got {i}")
            if i == self.end_id:
                break
            kept.append(i)
        text: str = self._engine.decode(kept)
        return text.strip()

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint's JSON says about this tokenizer; `from_file` takes all but "type" and "vocab_size" back."""
        return {
            "type": "sentencepiece",
            "file": JSON_FILE if isinstance(self._model, str) else MODEL_FILE,
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "clean": self.clean,
            "end_id": self.end_id,
            "pad_id": self.pad_id,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `spiece.model` or `tokenizer.json`, whichever this was made of, whole or not at all; returns its path."""
        path = Path(folder) / self.to_config()["file"]
        if isinstance(self._model, str):
            _write_text(path, self._model)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(self._model)
        os.replace(temporary, path)
        return path

    def save_huggingface(self, folder: str | Path, *, clean: bool = True) -> list[Path]:
        """Write the files by which transformers' AutoTokenizer loads this vocabulary; returns their paths.

        Args:
            folder: where to.
            clean: whether a `tokenizer.json` is to make texts canonical itself, as `clean` says (but for ftfy and HTML). A
                `spiece.model` becomes a SiglipTokenizer's, which always does, in its own way.
        """
        specials = {"eos_token": self._token(self.end_id), "pad_token": self._token(self.pad_id)}
        if self._id(UNKNOWN_TOKEN) is not None:
            specials["unk_token"] = UNKNOWN_TOKEN
        config: dict[str, Any] = {"model_max_length": self.context_length, "padding_side": "right", **specials}
        if isinstance(self._model, str):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            paths = [Path(folder) / JSON_FILE]
            _write_text(paths[0], self._json_for_transformers(clean))
        else:
            config |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}
            paths = [self.save(folder)]
        for name, values in ((SETTINGS_FILE, config), ("special_tokens_map.json", specials)):
            _write_text(Path(folder) / name, json.dumps(values, indent=2))
            paths.append(Path(folder) / name)
        return paths

    def _json_for_transformers(self, clean: bool) -> str:
        """The `tokenizer.json` with an end token behind each text, and the canonical form's rules as normalisers."""
        from tokenizers import Regex, Tokenizer, normalizers, processors

        assert isinstance(self._model, str)
        engine = Tokenizer.from_str(self._model)
        steps: list[Any] = [normalizers.Replace("_", " ")] if self.clean in ("big_vision", "open_clip") else []
        steps.append(normalizers.Lowercase())
        if self.clean != "lower":
            punctuation = Regex("[" + re.escape(string.punctuation) + "]")
            steps += [normalizers.Replace(punctuation, ""), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        if clean:
            engine.normalizer = normalizers.Sequence([*steps, *([engine.normalizer] if engine.normalizer else [])])
        end = self._token(self.end_id)
        engine.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, self.end_id)]
        )
        made: str = engine.to_str()
        return made

    def _token(self, token_id: int) -> str:
        engine = self._engine
        token: str = engine.id_to_token(token_id) if isinstance(self._model, str) else engine.id_to_piece(token_id)
        return token

    def __deepcopy__(self, memo: dict[int, Any]) -> SentencePieceTokenizer:
        return self  # never changes once made, so copies of a model share it


def is_sentencepiece(content: Any) -> bool:
    """Whether the JSON of a `tokenizer.json` is a SentencePiece vocabulary's: a unigram model, or a BPE whose spaces are "▁"."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return False
    if model.get("type") == "Unigram":
        return True
    return "merges" in model and model.get("byte_fallback") is True and not model.get("end_of_word_suffix")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, *, context_length: int = 64) -> SentencePieceTokenizer:
    """Learn a unigram vocabulary from texts made canonical as "huggingface" says, its special tokens numbered as T5's.

    Args:
        texts: what to learn from, read once.
        vocab_size: number of ids.
        context_length: L.

    Raises:
        ValueError: vocab_size is too small for the characters, or larger than what the texts have.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts if (line := canonical(text, "huggingface"))),
            model_writer=out,
            vocab_size=vocab_size,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # the same texts give the same vocabulary
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no vocabulary of {vocab_size} tokens can be learned from these texts: {error}") from error
    return SentencePieceTokenizer(out.getvalue(), context_length=context_length)


def _load_model(model: bytes) -> Any:
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor()
    try:
        engine.LoadFromSerializedProto(model)
        if engine.get_piece_size() < 1:
            raise RuntimeError("it has no pieces")
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"no SentencePiece model, or a damaged one ({error})") from error
    return engine


def _load_json(model: str) -> Tokenizer:
    from tokenizers import Tokenizer

    if not is_sentencepiece(json.loads(model)):
        raise ValueError("it is no SentencePiece vocabulary (a unigram model, or a BPE with bytes to fall back on)")
    try:
        engine = Tokenizer.from_str(model)
    except Exception as error:  # the engine raises bare Exceptions
        raise ValueError(f"a damaged tokenizer: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def _content(token: Any) -> str | None:
    """A special token in JSON: a string, or an object with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
