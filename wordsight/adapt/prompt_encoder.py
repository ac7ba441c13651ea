"""Class features of learned prompts, exactly as the text tower gives them for C x L tokens, with a fraction of the work.

CoOp (arXiv 2109.01134) and CoCoOp (arXiv 2203.05557) encode every class's prompt at each step. Through a causal tower

- nothing behind a prompt's end token is computed;
- what stands before the first place in which classes differ is computed once, and its keys and values are shared;
- the rest lies packed, class behind class without padding; only attention takes the classes of one length together;
- in the last layer only the end tokens ask.

A tower that sees in both directions shares nothing: its prompts go through it as they are, without padding where it is masked.
All prompts beyond a bounded number of tokens are computed again in the backward pass, so memory does not grow with C.

Shape legend: C classes, G contexts (one, or one a picture), M context tokens, R context rows (M or C x M), W width, D embedding
width, P shared tokens, K packed tokens, n some classes, S tokens of each of them, Q those that ask, H heads, E width of a head, L
context length in tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from wordsight.adapt.prompts import lay_out
from wordsight.nn.bert import Bert
from wordsight.nn.text import TextTransformer

KeysValues = tuple[Tensor, Tensor]  # of one layer, each [G, H, P, E]
Groups = Sequence[tuple[int, int]]  # classes that lie together, tokens of each of them

CHUNK_TOKENS = 8192  # about 2 GB for a backward pass through 12 layers of width 512


class PromptEncoder:
    """Contexts -> class features, differentiable in the context alone.

    The tower's weights are shared, not copied, and get no gradients; it computes as in evaluation, whatever mode it is in.

    Args:
        model: an Embedder with a tokenizer, whose `text_tower` takes token embeddings.
        names: C class names.
        num_context_tokens: M.
        position: "end", "middle" or "front", where the class name stands.
        class_specific: whether each class has a context of its own.
        published_tokens: see `prompts.lay_out`.
        class_chunk_tokens: tokens that are computed at once; if there are more, they are computed in chunks, and again in the
            backward pass. It changes memory and time, not the result.
        exact_reference: whether all C x L tokens go through the tower at once: the definition that everything else is checked by.

    Attributes:
        layout: where everything stands in the prompts.
        token_embedding: [vocabulary, W], the tower's.
        width: W.
        device: the tower's.

    Raises:
        ValueError: the tower takes no token embeddings, class_chunk_tokens is below 1, or see `prompts.lay_out`.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        num_context_tokens: int = 16,
        position: str = "end",
        class_specific: bool = False,
        published_tokens: bool = False,
        class_chunk_tokens: int = CHUNK_TOKENS,
        exact_reference: bool = False,
    ) -> None:
        if class_chunk_tokens < 1:
            raise ValueError(f"class_chunk_tokens must be at least 1, got {class_chunk_tokens}")
        tower, tokenizer = getattr(model, "text_tower", None), tokenizer_of(model)
        if not hasattr(tower, "forward_embedded"):
            raise ValueError(
                f"{type(model).__name__} has no text tower that takes token embeddings: prompts can't be learned for it"
            )
        self.layout = lay_out(
            tokenizer,
            names,
            num_context_tokens=num_context_tokens,
            position=position,
            class_specific=class_specific,
            published_tokens=published_tokens,
        )
        self.class_chunk_tokens, self.exact_reference = class_chunk_tokens, exact_reference
        self._tower: Any = frozen_twin(tower)
        # a trunk and a head, or the tower itself
        self._trunk: Any = getattr(self._tower, "trunk", self._tower)
        weight = self._trunk.token_embedding.weight
        self.token_embedding, self.width, self.device = weight, weight.shape[1], weight.device
        self._embeddings_UW = weight[self.layout.token_ids.to(weight.device)]
        self._is_causal = isinstance(self._trunk, TextTransformer)
        if self._is_causal:
            self._sizes_C = self.layout.lengths - self.layout.num_shared
        elif isinstance(self._trunk, Bert):  # cuts off behind the longest prompt of a chunk
            self._sizes_C = self.layout.lengths
        else:
            self._sizes_C = torch.full_like(self.layout.lengths, self.layout.rows.shape[1])
        # classes of one length lie together
        self._order_C = self.layout.lengths.argsort(stable=True)
        self._rank_C = self._order_C.argsort().to(self.device)

    def __call__(self, context: Tensor) -> Tensor:
        """The features of all classes.

        Args:
            context: [M, W]; [C, M, W] where it is class-specific; or [B, M, W], one a picture, where it is not.

        Returns:
            [C, D], or [B, C, D] with a context a picture; not normalised.

        Raises:
            ValueError: on another shape.
        """
        contexts_GRW, is_batch = self._contexts(context)
        if self.exact_reference:
            features_GCD = self._whole(contexts_GRW)
        else:
            features_GCD = self._by_length(contexts_GRW).index_select(1, self._rank_C)
        return features_GCD if is_batch else features_GCD[0]

    @property
    def contexts_at_once(self) -> int:
        """How many contexts of a batch are computed together, at least 1."""
        return max(1, self.class_chunk_tokens // int(self._sizes_C.sum()))

    def _contexts(self, context: Tensor) -> tuple[Tensor, bool]:
        """[G, R, W] with the R context rows of a table, and whether G is a batch's."""
        layout = self.layout
        num_classes, num_tokens = len(layout.names), layout.num_context_tokens
        shape = tuple(context.shape)
        if layout.class_specific:
            if shape != (num_classes, num_tokens, self.width):
                raise ValueError(
                    f"a class-specific context is [{num_classes}, {num_tokens}, {self.width}] (classes, tokens, width), got "
                    f"{shape}"
                )
            return context.flatten(0, 1)[None].to(self._embeddings_UW.dtype), False
        if shape[-2:] != (num_tokens, self.width) or context.ndim not in (2, 3):
            raise ValueError(
                f"a context is [{num_tokens}, {self.width}] (tokens, width), or [B, {num_tokens}, {self.width}] with one a "
                f"picture, got {shape}"
            )
        return context.reshape(-1, num_tokens, self.width).to(self._embeddings_UW.dtype), context.ndim == 3

    def _look_up(self, contexts_GRW: Tensor, rows_K: Tensor) -> Tensor:
        """What stands at some places of the prompts, for each context: [G, K, W]."""
        num_contexts, num_rows, _ = contexts_GRW.shape
        num_tokens = len(self._embeddings_UW)
        table_TW = torch.cat([self._embeddings_UW, contexts_GRW.flatten(0, 1)])
        start_G1 = torch.arange(num_contexts, device=rows_K.device)[:, None] * num_rows
        rows_GK = torch.where(rows_K >= num_tokens, rows_K + start_G1, rows_K)
        return table_TW.index_select(0, rows_GK.flatten()).unflatten(0, rows_GK.shape)

    def _whole(self, contexts_GRW: Tensor) -> Tensor:
        """All C x L tokens of each context through the tower: [G, C, D]."""
        every_C = torch.arange(len(self.layout.names))
        return torch.cat([self._through_tower(every_C, context_RW[None]) for context_RW in contexts_GRW])

    def _through_tower(self, classes_n: Tensor, contexts_GRW: Tensor) -> Tensor:
        """The prompts of some classes, as they are, through the tower: [G, n, D]."""
        rows_nL = self.layout.rows[classes_n].to(self.device)
        tokens_NL = self.layout.tokens[classes_n].to(self.device).repeat(len(contexts_GRW), 1)
        x_GKW = self._look_up(contexts_GRW, rows_nL.flatten())
        features_ND = self._tower.forward_embedded(x_GKW.reshape(*tokens_NL.shape, -1), tokens_NL)
        return features_ND.unflatten(0, (len(contexts_GRW), len(classes_n)))

    def _by_length(self, contexts_GRW: Tensor) -> Tensor:
        """All prompts, at most `class_chunk_tokens` at once, classes from the shortest to the longest: [G, C, D]."""
        chunks = [self._order_C[part] for part in _chunks(self._sizes_C[self._order_C].tolist(), self.class_chunk_tokens)]
        parts = contexts_GRW.split(self.contexts_at_once)
        again = torch.is_grad_enabled() and contexts_GRW.requires_grad and len(chunks) * len(parts) > 1
        rows = []
        for part_GRW in parts:
            shared = self._shared(part_GRW) if self._is_causal else ()
            inputs = (part_GRW, *chain.from_iterable(shared))
            made = []
            for chunk_n in chunks:
                encode = partial(self._packed if self._is_causal else self._through_tower, chunk_n)
                made.append(_ComputedAgain.apply(encode, *inputs) if again else encode(*inputs))
            rows.append(torch.cat(made, dim=1))
        return torch.cat(rows)

    def _shared(self, contexts_GRW: Tensor) -> list[KeysValues]:
        """Keys and values of the P tokens that all prompts begin with, a layer each."""
        num_shared = self.layout.num_shared
        x_GPW = self._look_up(contexts_GRW, self.layout.rows[0, :num_shared].to(self.device))
        x_GPW = x_GPW + self._trunk.position_embedding[:num_shared]
        *blocks, last = self._trunk.blocks
        found = []
        for block in blocks:
            x_GPW, kept = _layer(block, x_GPW, [(1, num_shared)], None)
            found.append(kept)
        _, k_GPW, v_GPW = last.attn.qkv(last.norm1(x_GPW)).chunk(3, dim=-1)
        return [*found, (_by_head(k_GPW, last), _by_head(v_GPW, last))]

    def _packed(self, classes_n: Tensor, contexts_GRW: Tensor, *shared: Tensor) -> Tensor:
        """What differs of the prompts of some classes, ordered by length, through a causal tower: [G, n, D].

        Args:
            classes_n: which.
            contexts_GRW: the contexts.
            shared: keys and values of the first layer, of the second and so on.
        """
        num_shared, trunk = self.layout.num_shared, self._trunk
        sizes_n = self.layout.lengths[classes_n] - num_shared
        place_L = torch.arange(self.layout.rows.shape[1])
        is_packed_nL = (place_L >= num_shared) & (place_L < num_shared + sizes_n[:, None])
        x_GKW = self._look_up(contexts_GRW, self.layout.rows[classes_n][is_packed_nL].to(self.device))
        x_GKW = x_GKW + trunk.position_embedding[is_packed_nL.nonzero()[:, 1].to(self.device)]
        groups = [(len(list(same)), size) for size, same in groupby(sizes_n.tolist())]
        *blocks, last = trunk.blocks
        *before, before_last = zip(shared[::2], shared[1::2], strict=True)
        for block, keys_values in zip(blocks, before, strict=True):
            x_GKW, _ = _layer(block, x_GKW, groups, keys_values)
        end_n = (sizes_n.cumsum(0) - 1).to(self.device)
        x_GnW = _last_layer(last, x_GKW, end_n, groups, before_last)
        features_GnD = trunk.norm_final(x_GnW) @ trunk.projection
        return features_GnD if trunk is self._tower else self._tower.head(features_GnD)


class _ComputedAgain(torch.autograd.Function):
    """A function of tensors that keeps nothing but them, and is computed again in the backward pass.

    One node of the graph for all of it: `torch.utils.checkpoint` leaves a node an operation, and those small pieces of memory
    between the large ones that come and go make a process four times as large as what it needs.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        kind = tensors[0].device.type
        ctx.function = function
        ctx.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out = ctx.function(*tensors)
        found = iter(torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], at_out))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in tensors))


def tokenizer_of(model: Any) -> Any:
    """A model's tokenizer.

    Raises:
        ValueError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"this {type(model).__name__} has no tokenizer: set .tokenizer, or load it with wordsight.load")
    return tokenizer


def frozen_twin(module: Any) -> Any:
    """A module with the same weights, not copies of them, that is in evaluation mode for itself and wants no gradients."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def _chunks(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours whose sizes add up to `most` at most, or one alone."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _layer(block: Any, x_GKW: Tensor, groups: Groups, before: KeysValues | None) -> tuple[Tensor, KeysValues]:
    """A block for every packed token, and the keys and values [G, H, K, E] of the first class's."""
    q_GKW, k_GKW, v_GKW = block.attn.qkv(block.norm1(x_GKW)).chunk(3, dim=-1)
    out, start = [], 0
    for count, size in groups:
        own = [part[:, start : start + count * size].unflatten(1, (count, size)) for part in (q_GKW, k_GKW, v_GKW)]
        out.append(_attend(block, own[0], own[1], own[2], before, True).flatten(1, 2))
        start += count * size
    x_GKW = x_GKW + block.attn.proj(torch.cat(out, dim=1))
    size = groups[0][1]
    return x_GKW + block.mlp(block.norm2(x_GKW)), (_by_head(k_GKW[:, :size], block), _by_head(v_GKW[:, :size], block))


def _last_layer(block: Any, x_GKW: Tensor, end_n: Tensor, groups: Groups, before: KeysValues) -> Tensor:
    """A block for the end tokens alone: [G, n, W]."""
    width = x_GKW.shape[-1]
    normed_GKW, x_GnW = block.norm1(x_GKW), x_GKW.index_select(1, end_n)
    q_weight, kv_weight = block.attn.qkv.weight.split([width, 2 * width])
    q_bias, kv_bias = block.attn.qkv.bias.split([width, 2 * width])
    q_GnW = linear(normed_GKW.index_select(1, end_n), q_weight, q_bias)
    k_GKW, v_GKW = linear(normed_GKW, kv_weight, kv_bias).chunk(2, dim=-1)
    out, start, first = [], 0, 0
    for count, size in groups:
        own = [part[:, start : start + count * size].unflatten(1, (count, size)) for part in (k_GKW, v_GKW)]
        q_Gn1W = q_GnW[:, first : first + count, None]
        out.append(_attend(block, q_Gn1W, own[0], own[1], before, False).flatten(1, 2))
        start, first = start + count * size, first + count
    x_GnW = x_GnW + block.attn.proj(torch.cat(out, dim=1))
    return x_GnW + block.mlp(block.norm2(x_GnW))


def _by_head(x_GTW: Tensor, block: Any) -> Tensor:
    """[G, T, W] -> [G, H, T, E]."""
    return x_GTW.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)


def _attend(block: Any, q_GnQW: Tensor, k_GnSW: Tensor, v_GnSW: Tensor, before: KeysValues | None, is_causal: bool) -> Tensor:
    """Attention of each class's Q tokens to its own S and to the P shared ones, which are not copied for it: [G, n, Q, W]."""
    q_GnHQE, k_GnHSE, v_GnHSE = (
        part.unflatten(-1, (block.attn.num_heads, -1)).transpose(2, 3) for part in (q_GnQW, k_GnSW, v_GnSW)
    )
    q_GnHQE = q_GnHQE * q_GnHQE.shape[-1] ** -0.5
    scores = q_GnHQE @ k_GnHSE.mT
    if is_causal:
        hidden_QS = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden_QS, -torch.inf)
    if before is None:
        out_GnHQE = scores.softmax(dim=-1) @ v_GnHSE
    else:
        k_GHPE, v_GHPE = before
        count, num_queries = q_GnQW.shape[1:3]
        to_shared = q_GnHQE.transpose(1, 2).flatten(2, 3) @ k_GHPE.mT
        to_shared = to_shared.unflatten(2, (count, num_queries)).transpose(1, 2)
        weights = torch.cat([to_shared, scores], dim=-1).softmax(dim=-1)
        at_shared, at_own = weights.split([k_GHPE.shape[2], scores.shape[-1]], dim=-1)
        of_shared = at_shared.transpose(1, 2).flatten(2, 3) @ v_GHPE
        out_GnHQE = of_shared.unflatten(2, (count, num_queries)).transpose(1, 2) + at_own @ v_GnHSE
    return out_GnHQE.transpose(2, 3).flatten(3)
