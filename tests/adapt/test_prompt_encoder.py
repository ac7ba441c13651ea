"""The accelerated prompt encoder against its definition, values and gradients, in float64; what is shared, bounded, refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.adapt.towers import KINDS, NAMES, WORDS, embedder
from wordsight.adapt.prompt_encoder import PromptEncoder, frozen_twin
from wordsight.adapt.prompts import POSITIONS
from wordsight.nn.text import TextTransformer


def values_and_gradient(encoder: PromptEncoder, context: Tensor) -> tuple[Tensor, Tensor]:
    """Features and the gradient of a weighted sum of them at the context."""
    context = context.clone().requires_grad_()
    features = encoder(context)
    weights = torch.cos(torch.arange(features.numel(), dtype=torch.float64)).view_as(features)
    (features * weights).sum().backward()
    assert context.grad is not None
    return features.detach(), context.grad


def assert_exact(kind: str, names: list[str], context: Tensor, **options: Any) -> None:
    options["num_context_tokens"] = context.shape[-2]
    quick = values_and_gradient(PromptEncoder(embedder(kind), names, **options), context)
    plain = values_and_gradient(PromptEncoder(embedder(kind), names, exact_reference=True, **options), context)
    for ours, reference in zip(quick, plain, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12 * scale)
    assert quick[1].abs().max() > 0


names_strategy = st.lists(
    st.lists(st.sampled_from(sorted(set(WORDS))), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12, unique=True
)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["causal", "causal", "siglip", "bert mean"]),
    names=names_strategy,
    num_context=st.integers(1, 32),
    position=st.sampled_from(POSITIONS),
    how=st.sampled_from(["one", "class-specific", "batch"]),
    chunk_tokens=st.sampled_from([1, 20, 8192]),
    seed=st.integers(0, 99),
)
def test_any_names_and_contexts_equal_the_definition(
    kind: str, names: list[str], num_context: int, position: str, how: str, chunk_tokens: int, seed: int
) -> None:
    shape = {"one": (), "class-specific": (len(names),), "batch": (1 + seed % 3,)}[how]
    context = torch.randn(*shape, num_context, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"position": position, "class_specific": how == "class-specific", "class_chunk_tokens": chunk_tokens}
    assert_exact(kind, names, context, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("how", ["one", "class-specific", "batch"])
def test_every_tower_equals_the_definition(kind: str, position: str, how: str) -> None:
    shape = {"one": (), "class-specific": (len(NAMES),), "batch": (3,)}[how]
    context = torch.randn(*shape, 5, 16, dtype=torch.float64)
    for chunk_tokens in (50, 8192):
        options = {"position": position, "class_specific": how == "class-specific", "class_chunk_tokens": chunk_tokens}
        assert_exact(kind, NAMES, context, **options)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_two_hundred_classes(position: str, class_specific: bool) -> None:
    names = [f"{WORDS[i % len(WORDS)]} {' of ' * (i % 4)} {i}" for i in range(200)]
    context = torch.randn(*((200,) if class_specific else ()), 16, 16, dtype=torch.float64)
    assert_exact("causal", names, context, position=position, class_specific=class_specific)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_tokenizer_without_a_start_shares_nothing_where_the_name_comes_first(position: str) -> None:
    model = embedder("causal")
    clip = model.tokenizer
    bare = SimpleNamespace(encode=clip.encode, end_id=clip.end_id, pad_id=clip.pad_id, context_length=clip.context_length)
    model = SimpleNamespace(text_tower=model.text_tower, tokenizer=bare)
    context = torch.randn(3, 16, dtype=torch.float64)
    quick, plain = (PromptEncoder(model, NAMES, 3, position, exact_reference=exact) for exact in (False, True))
    assert quick.layout.num_shared == {"end": 3, "middle": 1, "front": 0}[position]
    torch.testing.assert_close(quick(context), plain(context), rtol=0, atol=1e-12)


def test_the_definition_is_the_whole_context_through_all_layers() -> None:
    """`exact_reference` itself beside the published computation: prefix, context, suffix; 72 places, no shortcut."""
    model = embedder("causal")
    tower, tokenizer = model.text_tower, model.tokenizer
    context = torch.randn(3, 16, dtype=torch.float64)
    tokens = tokenizer([f"X X X {name.replace('_', ' ')}." for name in NAMES])
    embedded = tower.token_embedding(tokens)
    x = torch.cat([embedded[:, :1], context.expand(len(NAMES), -1, -1), embedded[:, 4:]], dim=1) + tower.position_embedding
    x = tower.norm_final(tower.blocks.forward_tokens(x, is_causal=True))
    expected = x[torch.arange(len(NAMES)), tokens.argmax(1)] @ tower.projection
    for exact_reference in (False, True):
        found = PromptEncoder(model, NAMES, 3, exact_reference=exact_reference)(context)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_context_from_words_is_the_plain_text(kind: str) -> None:
    """A context of the words' own embeddings gives what the tower gives for the text."""
    model = embedder(kind)
    tower = model.text_tower.eval()
    embedding = getattr(tower, "trunk", tower).token_embedding
    ids = model.tokenizer.encode("green house of")
    features = PromptEncoder(model, NAMES, len(ids))(embedding.weight[ids])
    expected = tower(model.tokenizer([f"green house of {name.replace('_', ' ')}." for name in NAMES]))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_only_what_differs_is_computed_and_nothing_twice_in_one_chunk() -> None:
    encoder = PromptEncoder(embedder("causal"), NAMES, 16)
    rows: list[int] = []
    for block in encoder._trunk.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    encoder(torch.randn(16, 16, dtype=torch.float64, requires_grad=True)).sum().backward()
    suffix = int((encoder.layout.lengths - 17).sum())
    assert rows == [17, 17, suffix, suffix, len(NAMES)]


def test_chunks_are_computed_again_only_where_there_are_several_and_gradients_are_wanted() -> None:
    def count(chunk_tokens: int, wants_gradient: bool) -> int:
        encoder = PromptEncoder(embedder("causal"), NAMES, 4, class_chunk_tokens=chunk_tokens)
        calls: list[int] = []
        encoder._trunk.norm_final.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
        features = encoder(torch.randn(4, 16, dtype=torch.float64, requires_grad=wants_gradient))
        assert sum(calls) == len(NAMES)
        if wants_gradient:
            features.sum().backward()
        return sum(calls)

    assert count(8192, True) == len(NAMES)
    assert count(10, True) == 2 * len(NAMES)
    assert count(10, False) == len(NAMES)


def test_memory_that_is_kept_for_the_backward_pass_is_bounded_by_the_setting() -> None:
    """Numbers kept by autograd: they grow with the classes in one chunk, and hardly in chunks."""

    def kept(num_classes: int, chunk_tokens: int) -> int:
        names = [f"cat {i}" for i in range(num_classes)]
        encoder = PromptEncoder(embedder("causal"), names, 4, class_chunk_tokens=chunk_tokens)
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(torch.randn(4, 16, dtype=torch.float64, requires_grad=True))
        return total

    assert kept(160, 8192) > 6 * kept(20, 8192)
    assert kept(160, 100) < 2 * kept(20, 100)
    assert kept(160, 100) < 0.1 * kept(160, 8192)


def test_the_tower_stays_as_it_is() -> None:
    model = embedder("bert cls")
    model.text_tower.train()
    encoder = PromptEncoder(model, NAMES, 3)
    context = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.equal(encoder(context), encoder(context))  # no dropout
    encoder(context).sum().backward()
    assert model.text_tower.training
    assert all(p.grad is None and p.requires_grad for p in model.text_tower.parameters())


def test_a_frozen_twin_shares_its_weights() -> None:
    tower = embedder("lit causal").text_tower
    twin = frozen_twin(tower)
    for ours, theirs in zip(tower.parameters(), twin.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert not theirs.requires_grad
    assert not twin.training


def test_bfloat16_by_autocast_is_near() -> None:
    model = embedder("causal")
    twin = SimpleNamespace(text_tower=frozen_twin(model.text_tower).float(), tokenizer=model.tokenizer)
    encoder = PromptEncoder(twin, NAMES, 4, class_chunk_tokens=20)
    context = torch.randn(4, 16, requires_grad=True)
    expected = encoder(context)
    (wanted,) = torch.autograd.grad(expected.sum(), context)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(context)
    (got,) = torch.autograd.grad(found.float().sum(), context)
    for ours, reference in ((found.float(), expected), (got, wanted)):
        assert (ours - reference).norm() < 0.05 * reference.norm()
        assert not torch.equal(ours, reference)


def test_what_can_not_be_encoded_is_refused() -> None:
    model = embedder("causal")
    with pytest.raises(ValueError, match=r"a context is \[4, 16\].* got \(5, 16\)"):
        PromptEncoder(model, NAMES, 4)(torch.zeros(5, 16))
    with pytest.raises(ValueError, match=r"class-specific context is \[10, 4, 16\].* got \(4, 16\)"):
        PromptEncoder(model, NAMES, 4, class_specific=True)(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="class_chunk_tokens must be at least 1, got 0"):
        PromptEncoder(model, NAMES, 4, class_chunk_tokens=0)
    with pytest.raises(ValueError, match="no text tower that takes token embeddings"):
        PromptEncoder(SimpleNamespace(text_tower=torch.nn.Linear(2, 2), tokenizer=model.tokenizer), NAMES)
    with pytest.raises(ValueError, match="no tokenizer"):
        PromptEncoder(SimpleNamespace(text_tower=model.text_tower, tokenizer=None), NAMES)


def test_towers_take_embeddings_in_place_of_tokens() -> None:
    for kind in KINDS:
        model = embedder(kind)
        tower = model.text_tower.eval()
        tokens = model.tokenizer(NAMES)
        x = getattr(tower, "trunk", tower).token_embedding(tokens).detach().requires_grad_()
        found = tower.forward_embedded(x, tokens)
        torch.testing.assert_close(found, tower(tokens), rtol=0, atol=0)
        shorter = int((tokens != model.tokenizer.pad_id).sum(1).max()) + 1 if kind != "siglip" else 30
        torch.testing.assert_close(tower.forward_embedded(x[:, :shorter], tokens[:, :shorter]), found, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient.abs().max() > 0, kind
        assert isinstance(getattr(tower, "trunk", tower), TextTransformer) == kind.endswith("causal")
