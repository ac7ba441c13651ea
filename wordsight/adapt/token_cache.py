"""Tokens of a frozen image tower: every token's output behind the last block, before norm and projection; places of a last map.

They are many numbers a picture (a ViT-B/16's: 197 x 768), and the tower that makes them does not learn. So they are computed
once, for the fixed view and for random views drawn beforehand, and kept in memory-mapped files of 64 pictures, which may be more
than memory holds. What names, guards and resumes the files is `wordsight.evaluate.part_files`.

A file's arrays are the tokens [n, T, W] in float16, float32 or int8, and for int8 a float32 [n, T, 1] that a token's numbers are
multiplied by when they are read. Its header says what was lost: `max_error`, the largest difference, and `rms_error`, the
differences' root mean square over that of the tokens.

Shape legend: N pictures, n pictures of a part, B rows asked for, V random views, T tokens, W width, S image side in pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from wordsight.adapt import parts
from wordsight.evaluate.feature_cache import model_name
from wordsight.evaluate.modes import judging
from wordsight.evaluate.part_files import Subject, list_parts
from wordsight.evaluate.results import fingerprint

Rows = Sequence[int] | np.ndarray | Tensor
Kind = Literal["float16", "int8", "float32"]
DTYPES = {"float16": torch.float16, "int8": torch.int8, "float32": torch.float32}
LAYER = "tokens"
PART = 64  # pictures of one file: 19 MB of a ViT-B/16's in float16
VIEWS_AT_ONCE = 2  # views of a part that are held as float32


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of N pictures, wherever they come from; `Decoder` takes them in place of the pictures.

    Attributes:
        num_tokens: T.
        width: W.
        class_token: whether the first token is the tower's class token.
        num_views: V, random views beside the fixed one.
        identity: stands for tower and preprocessing; None where they are not known.
        rows: int64 [N], which of those that are held these pictures are.
    """

    num_tokens: int
    width: int
    class_token: bool
    num_views: int
    identity: str | None
    rows: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Rows) -> Self:
        """The tokens of some of the pictures, in that order."""
        return replace(self, rows=self.rows[np.asarray(rows)])

    def batch(self, rows: Rows, views: Rows | None = None) -> Tensor:
        """Tokens of some pictures.

        Args:
            rows: [B], of 0 to N - 1.
            views: [B], the random view of each, of 0 to V - 1; None: the fixed view.

        Returns:
            float32 [B, T, W] on the CPU.

        Raises:
            ValueError: a view that there is not.
        """
        held_B = self.rows[np.asarray(rows)]
        if views is None:
            return self._read(held_B, np.full(len(held_B), -1))
        views_B = np.asarray(views)
        if len(views_B) and not 0 <= views_B.min() <= views_B.max() < self.num_views:
            raise ValueError(f"views must be 0 to {self.num_views - 1}, got {views_B.min()} to {views_B.max()}")
        return self._read(held_B, views_B)

    def _read(self, rows_B: np.ndarray, views_B: np.ndarray) -> Tensor:
        """Tokens of held rows; view -1 is the fixed one."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TokenCache(Tokens):
    """Tokens in files.

    Attributes:
        kind: "float16", "int8" or "float32".
        max_error: the largest difference between a kept number and the tower's.
        rms_error: root mean square of the differences over that of the tokens, of the part where it is largest.
        views: where the fixed view and each random one are kept.
    """

    kind: Kind
    max_error: float
    rms_error: float
    views: list[parts.KeptView] = field(repr=False)

    def _read(self, rows_B: np.ndarray, views_B: np.ndarray) -> Tensor:
        tokens_BTW = torch.empty(len(rows_B), self.num_tokens, self.width)
        for i, (row, view) in enumerate(zip(rows_B.tolist(), views_B.tolist(), strict=True)):
            kept = self.views[view + 1]
            values, *scales = kept.parts[kept.part_N[row]].arrays
            tokens_BTW[i] = values[kept.row_N[row]]
            if scales:
                tokens_BTW[i] *= scales[0][kept.row_N[row]]
        return tokens_BTW


@dataclass(frozen=True, kw_only=True)
class TowerTokens(Tokens):
    """Tokens that the tower computes each time they are asked for: nothing is kept, everything costs a pass through the tower.

    Attributes:
        model: an Embedder.
        pictures: paths, PIL images or Samples.
        seed: of the random views.
        batch_size: pictures that the tower sees at once.
    """

    model: Any
    pictures: Sequence[Any] = field(repr=False)
    seed: int
    batch_size: int

    def _read(self, rows_B: np.ndarray, views_B: np.ndarray) -> Tensor:
        encode, preprocessor = token_encoder(self.model), self.model.preprocessor
        asked = list(zip(rows_B.tolist(), views_B.tolist(), strict=True))
        out = [torch.empty(0, self.num_tokens, self.width)]
        with judging(self.model) as device:
            for start in range(0, len(asked), self.batch_size):
                pixels: list[Tensor] = []
                for row, view in asked[start : start + self.batch_size]:
                    picture = parts.read_picture(row, self.pictures[row])
                    pixels.append(parts.draw_views(preprocessor, picture, [None if view < 0 else view], self.seed))
                normal = preprocessor.normalize(torch.cat(pixels).to(device)).to(next(self.model.parameters()).dtype)
                out.append(encode(normal).float().cpu())
        return torch.cat(out)  # outside: what comes out of inference mode can't be learned from


def cache_tokens(
    model: Any,
    pictures: Sequence[Any],
    folder: str | os.PathLike[str],
    *,
    num_views: int = 0,
    seed: int = 0,
    kind: Kind = "float16",
    batch_size: int = 64,
    progress: bool = False,
) -> TokenCache:
    """Tokens of pictures from a frozen model, kept in a folder.

    What the folder holds whole is not computed again. Parts of another model, other preprocessing or other pictures are never
    taken for these: they have other names, and are left where they are. One that is damaged is made anew, with a warning.

    Args:
        model: an Embedder with `preprocessor`, whose image tower has `forward_tokens`.
        pictures: N paths, PIL images or Samples; a Source is such a sequence.
        folder: of the files; made if need be. Processes may share it, also at once.
        num_views: V; view v of a picture is a random crop of 8 to 100% of its area, flipped half of the time.
        seed: of the random views.
        kind: how numbers are kept: "float16" (2 bytes), "int8" (1 byte, a scale a token) or "float32" (4, nothing is lost).
        batch_size: pictures that the model sees at once.
        progress: show a bar.

    Returns:
        A handle that reads what is asked for.

    Raises:
        OSError: a picture can't be read, or the disk is full; parts that are whole stay, and the next call goes on from them.
        ValueError: no pictures, an unknown kind, a model without tokens, numbers too large for float16.
    """
    if kind not in DTYPES:
        raise ValueError(f"kind must be one of {', '.join(DTYPES)}, got {kind!r}")
    identity, made = token_identity(model), 0

    def pack(tokens_nTW: Tensor) -> parts.Packed:
        nonlocal made
        made += 1
        return _pack(tokens_nTW, kind)

    views = parts.kept_views(
        model,
        token_encoder(model),
        pictures,
        subject=Subject(identity=identity, layer=f"{LAYER} {kind}", model=model_name(model)),
        pack=pack,
        num_views=num_views,
        seed=seed,
        batch_size=batch_size,
        part=PART,
        views_at_once=VIEWS_AT_ONCE,
        folder=Path(folder),
        progress=progress,
    )
    if made:
        _say_stale(Path(folder), identity)
    every = [part for view in views for part in view.parts]
    return TokenCache(
        num_tokens=every[0].arrays[0].shape[1],
        width=every[0].arrays[0].shape[2],
        class_token=has_class_token(model),
        num_views=num_views,
        identity=identity,
        rows=np.arange(len(pictures)),
        kind=kind,
        max_error=max(part.about["max_error"] for part in every),
        rms_error=max(part.about["rms_error"] for part in every),
        views=views,
    )


def tower_tokens(
    model: Any, pictures: Sequence[Any], *, num_views: int = 0, seed: int = 0, batch_size: int = 64, identify: bool = True
) -> TowerTokens:
    """The same tokens, of the same views, through the tower each time: arguments as in `cache_tokens`.

    Args:
        identify: whether `identity` is computed, which reads all weights.
    """
    encode, side = token_encoder(model), model.preprocessor.image_size_px
    with judging(model) as device:
        shape = encode(torch.zeros(1, 3, side, side, device=device, dtype=next(model.parameters()).dtype)).shape
    return TowerTokens(
        num_tokens=shape[1],
        width=shape[2],
        class_token=has_class_token(model),
        num_views=num_views,
        identity=token_identity(model) if identify else None,
        rows=np.arange(len(pictures)),
        model=model,
        pictures=pictures,
        seed=seed,
        batch_size=batch_size,
    )


def token_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Normalised pixels [B, 3, S, S] -> tokens [B, T, W].

    Raises:
        ValueError: the model's image tower has none.
    """
    encode: Callable[[Tensor], Tensor] | None = getattr(getattr(model, "image_tower", None), "forward_tokens", None)
    if encode is None:
        raise ValueError(
            f"{type(model).__name__}'s image tower does not give its tokens: use a model whose image tower has forward_tokens"
        )
    return encode


def has_class_token(model: Any) -> bool:
    """Whether the first of the image tower's tokens is a class token."""
    tower = model.image_tower
    return getattr(getattr(tower, "trunk", tower), "class_token", None) is not None


def token_identity(model: Any) -> str:
    """32 hex digits for all that tokens depend on: the image tower's weights and form, preprocessing, the kind of views."""
    form = [repr(getattr(model, "config", None)), str(next(model.parameters()).dtype)]
    return fingerprint(model.image_tower, (), "", ["tokens", parts.CROP_SCALE, model.preprocessor.to_config(), *form])


def _pack(tokens_nTW: Tensor, kind: Kind) -> parts.Packed:
    """The numbers as they are kept, for int8 what a token's are to be multiplied by, and the error that this makes."""
    values, scales = _rounded(tokens_nTW, kind)
    difference = tokens_nTW - (values.float() if scales is None else values.float() * scales)
    power = tokens_nTW.square().mean().sqrt()
    errors = {
        "max_error": float(difference.abs().max()),
        "rms_error": float(difference.square().mean().sqrt() / power) if power > 0 else 0.0,
    }
    return (values,) if scales is None else (values, scales), errors


def _rounded(tokens_nTW: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    if kind == "int8":
        scales_nT1 = tokens_nTW.abs().amax(2, keepdim=True) / 127
        scales_nT1 = torch.where(scales_nT1 > 0, scales_nT1, 1.0)
        return (tokens_nTW / scales_nT1).round().to(torch.int8), scales_nT1
    largest, most = float(tokens_nTW.abs().max()), torch.finfo(DTYPES[kind]).max
    if largest > most:
        raise ValueError(f"a token has a {largest:.3g}, and {kind} ends at {most:.3g}: use kind='float32' or 'int8'")
    return tokens_nTW.to(DTYPES[kind]), None


def _say_stale(folder: Path, identity: str) -> None:
    """Say that a folder where parts were missing holds some of another model."""
    subjects = [listed.subject for listed in list_parts(folder)]
    others = sum(one is not None and one.layer.startswith(LAYER) and one.identity != identity for one in subjects)
    if others:
        warnings.warn(
            f"{folder} also holds {others} parts of another model or of other preprocessing: they were not used, and the "
            "pictures were looked at again",
            stacklevel=3,
        )
