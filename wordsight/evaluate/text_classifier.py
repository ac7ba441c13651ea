"""The texts of a zero-shot classifier through a causal text tower (CLIP, arXiv 2103.00020), exactly, with a fraction of the work.

1,000 classes in 80 templates are 80,000 texts of which most is the same. The token rows, each up to its end token and each once,
are sorted, so that a row begins as the one before it does; then

- a token is computed only where its row differs from the one before: all others are that row's. What is left is the tree of all
  prefixes ("a photo of a" is computed once, "great white" once a template), and nothing stands behind an end token;
- what is left lies packed, row behind row without padding; only attention takes rows of one shape together, and it looks the keys
  and values of a row's beginning up where they lie;
- in the last layer only the end tokens ask.

A token's output depends on nothing but its own beginning, because the tower is causal: this is the plain computation, up to
rounding. Towers that look in both directions share nothing; their texts go through `embed_texts`, those of like length together.

Shape legend: M texts, N rows of tokens (the texts' different ones), L context length, T tokens of a row that are computed or
looked up, S of them its own, K packed tokens, n rows of one shape, W width, H heads, E width of a head, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, scaled_dot_product_attention
from tqdm import tqdm

from wordsight.embed import DualEncoderMixin
from wordsight.evaluate.embedding import embed_texts
from wordsight.evaluate.modes import judging
from wordsight.evaluate.sharing import ALONE, Processes, in_order, own_pieces, together
from wordsight.nn.text import TextTransformer

BATCH_TOKENS = 4096  # packed tokens computed at once: what a layer makes of them stays in a processor's cache


def shares_beginnings(model: Any) -> bool:
    """Whether a model's texts go through a causal tower that is known here, and through nothing else that would change them."""
    encodes_plainly = getattr(type(model), "encode_text", None) is DualEncoderMixin.encode_text
    tower = getattr(model, "text_tower", None)
    is_watched = isinstance(tower, nn.Module) and (tower._forward_hooks or tower._forward_pre_hooks)
    return encodes_plainly and not is_watched and type(_trunk(tower)) is TextTransformer


def embed_prompts(
    model: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    description: str | None = None,
    world: Processes = ALONE,
) -> Tensor:
    """Unit vectors of texts that begin alike; `embed_texts` where the model's tower can't share beginnings.

    Args:
        model: an Embedder.
        texts: M texts.
        batch_size: texts encoded at once where nothing is shared.
        batch_tokens: tokens computed at once where beginnings are shared; it changes memory and time, not the result.
        description: the name of a progress bar, none without it.
        world: the processes that share the work; each gets all vectors.

    Returns:
        float32 [M, D] on the CPU (what `encode_text` gives, for a PairScorer).

    Raises:
        ValueError: no texts, batch_tokens below 1, or vectors that are infinite or undefined.
    """
    if not shares_beginnings(model):
        return embed_texts(model, texts, batch_size=batch_size, description=description, world=world)
    if not texts:
        raise ValueError("no texts to embed")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    unique = sorted(set(texts))
    rows_NL, row_M = _sorted_rows(model.tokenize(unique).cpu().numpy())
    batches = _batches(rows_NL, batch_tokens)
    own = own_pieces(world, len(batches))
    found: dict[int, Tensor] = {}

    def work() -> None:
        with judging(model) as device:
            for k in tqdm(own, desc=description, unit="batch", disable=description is None or world.rank > 0):
                tree = _Tree(rows_NL[batches[k]])
                vectors_ND = normalize(encode_tree(model.text_tower, tree, device).float(), dim=-1).cpu()
                if not torch.isfinite(vectors_ND).all():
                    raise ValueError("the model gives infinite or undefined embeddings of texts: its weights are damaged")
                found[k] = vectors_ND.clone()

    together(world, work)
    place = {text: int(row_M[i]) for i, text in enumerate(unique)}
    return in_order(world, found)[torch.tensor([place[text] for text in texts])]


def _trunk(tower: Any) -> Any:
    """A tower's transformer: the tower itself, or what its head stands on."""
    return getattr(tower, "trunk", tower)


# Rows of tokens as a tree


def _sorted_rows(tokens_ML: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows in order, each up to its end token (the first place of its highest id) with -1 behind it: [N, T], and
    which row each of the M texts is."""
    end_M = tokens_ML.argmax(1)
    longest = int(end_M.max()) + 1
    cut_MT = np.where(np.arange(longest) <= end_M[:, None], tokens_ML[:, :longest], -1)
    order_M = np.lexsort(cut_MT.T[::-1])
    sorted_MT = cut_MT[order_M]
    is_new_M = np.ones(len(sorted_MT), dtype=bool)
    is_new_M[1:] = (sorted_MT[1:] != sorted_MT[:-1]).any(1)
    row_M = np.empty(len(order_M), dtype=np.int64)
    row_M[order_M] = is_new_M.cumsum() - 1
    return sorted_MT[is_new_M], row_M


def _shared(rows_NT: np.ndarray) -> np.ndarray:
    """How many tokens each row begins with that the row before it has too: [N], 0 for the first one."""
    shared_N = np.zeros(len(rows_NT), dtype=np.int64)
    shared_N[1:] = np.logical_and.accumulate(rows_NT[1:] == rows_NT[:-1], axis=1).sum(1)
    return shared_N


def _batches(rows_NT: np.ndarray, batch_tokens: int) -> list[slice]:
    """Neighbouring rows whose own tokens are about `batch_tokens`, at least one row each; they depend on the rows alone."""
    own_N = (rows_NT >= 0).sum(1) - _shared(rows_NT)
    batch_N = (own_N.cumsum() - own_N) // batch_tokens
    starts = np.flatnonzero(np.diff(batch_N, prepend=-1)).tolist()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(rows_NT)], strict=True)]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Rows of one shape: n of them, of `length` tokens each, of which the last `own` are packed from `start` on.

    `path` is where the tokens of each row lie: [n x T] packed places.
    """

    start: int
    count: int
    own: int
    length: int
    path: Tensor


class _Tree:
    """The different beginnings of sorted rows, packed.

    Attributes:
        tokens: [K] token ids; a row's own ones lie together, and the rows of one shape.
        positions: [K] their places in their rows.
        shapes: the rows by shape, in packed order.
        ends: [N] packed places of the rows' end tokens, in packed order.
        rank: [N] where each row is among them.
    """

    def __init__(self, rows_NT: np.ndarray) -> None:
        length_N, shared_N = (rows_NT >= 0).sum(1), _shared(rows_NT)
        own_N = length_N - shared_N
        order_N = np.lexsort((length_N, own_N))
        first_N = np.empty_like(own_N)
        first_N[order_N] = own_N[order_N].cumsum() - own_N[order_N]
        place_T = np.arange(rows_NT.shape[1])
        is_own_NT = (place_T >= shared_N[:, None]) & (place_T < length_N[:, None])
        packed_NT = first_N[:, None] + place_T - shared_N[:, None]
        # a shared token lies where the last row before that has it as its own keeps it
        owner_NT = np.maximum.accumulate(np.where(is_own_NT, np.arange(len(rows_NT))[:, None], 0), axis=0)
        path_NT = np.take_along_axis(packed_NT, owner_NT, axis=0)

        tokens_K, positions_K = np.empty((2, int(own_N.sum())), dtype=np.int64)
        tokens_K[packed_NT[is_own_NT]] = rows_NT[is_own_NT]
        positions_K[packed_NT[is_own_NT]] = np.broadcast_to(place_T, rows_NT.shape)[is_own_NT]
        self.tokens, self.positions = torch.from_numpy(tokens_K), torch.from_numpy(positions_K)
        self.ends = torch.from_numpy((first_N + own_N - 1)[order_N])
        self.rank = torch.from_numpy(order_N.argsort())
        self.shapes = []
        shape_N2 = np.stack([own_N, length_N], 1)[order_N]
        starts = np.flatnonzero(np.r_[True, (shape_N2[1:] != shape_N2[:-1]).any(1)]).tolist()
        for start, stop in zip(starts, [*starts[1:], len(order_N)], strict=True):
            rows_n, (own, length) = order_N[start:stop], shape_N2[start].tolist()
            path = torch.from_numpy(path_NT[rows_n, :length].flatten())
            self.shapes.append(_Shape(int(first_N[rows_n[0]]), len(rows_n), own, length, path))


# The tower


def encode_tree(tower: Any, tree: _Tree, device: torch.device) -> Tensor:
    """What a causal tower gives for the rows of a tree, not normalised: [N, D]."""
    trunk = _trunk(tower)
    shapes = [replace(one, path=one.path.to(device)) for one in tree.shapes]
    x_KW = trunk.token_embedding(tree.tokens.to(device)) + trunk.position_embedding[tree.positions.to(device)]
    *blocks, last = trunk.blocks
    for block in blocks:
        q_KW, kv_KV = block.attn.qkv(block.norm1(x_KW)).tensor_split([x_KW.shape[1]], dim=1)
        x_KW = x_KW + block.attn.proj(torch.cat([_attend(block, q_KW, kv_KV, one) for one in shapes]))
        x_KW = x_KW + block.mlp(block.norm2(x_KW))
    x_NW = _last_layer(last, x_KW, tree.ends.to(device), shapes)
    features_ND = trunk.norm_final(x_NW) @ trunk.projection
    return (features_ND if trunk is tower else tower.head(features_ND))[tree.rank.to(device)]


def _attend(block: Any, q_KW: Tensor, kv_KV: Tensor, one: _Shape) -> Tensor:
    """Attention of the own tokens of rows of one shape to their beginnings and themselves: [n x S, W]."""
    q_nSW = q_KW[one.start : one.start + one.count * one.own].unflatten(0, (one.count, one.own))
    visible_ST = torch.ones(one.own, one.length, dtype=torch.bool, device=q_KW.device).tril(one.length - one.own)
    return _attention(block, q_nSW, kv_KV, one, visible_ST).flatten(0, 1)


def _last_layer(block: Any, x_KW: Tensor, end_N: Tensor, shapes: Sequence[_Shape]) -> Tensor:
    """A block for the end tokens alone: [N, W], in packed order."""
    width = x_KW.shape[1]
    normed_KW, x_NW = block.norm1(x_KW), x_KW[end_N]
    q_weight, kv_weight = block.attn.qkv.weight.split([width, 2 * width])
    q_bias, kv_bias = block.attn.qkv.bias.split([width, 2 * width])
    kv_KV = linear(normed_KW, kv_weight, kv_bias)
    q_N1W = linear(normed_KW[end_N], q_weight, q_bias)[:, None]
    parts = zip(q_N1W.split([one.count for one in shapes]), shapes, strict=True)
    out_NW = torch.cat([_attention(block, q_n1W, kv_KV, one, None).flatten(0, 1) for q_n1W, one in parts])
    x_NW = x_NW + block.attn.proj(out_NW)
    return x_NW + block.mlp(block.norm2(x_NW))


def _attention(block: Any, q_nSW: Tensor, kv_KV: Tensor, one: _Shape, visible_ST: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(E)) v over whole rows of one shape, whose keys and values are looked up: [n, S, W]."""
    heads = block.attn.num_heads
    kv_nT2HE = kv_KV.index_select(0, one.path).view(one.count, one.length, 2, heads, -1)
    k_nHTE, v_nHTE = kv_nT2HE.permute(2, 0, 3, 1, 4)
    q_nHSE = q_nSW.unflatten(-1, (heads, -1)).transpose(1, 2)
    return scaled_dot_product_attention(q_nHSE, k_nHTE, v_nHTE, attn_mask=visible_ST).transpose(1, 2).flatten(2)
