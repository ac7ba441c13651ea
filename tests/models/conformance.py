"""What every system of the catalogue must do on a small config: one check a function, which takes a maker of the system.

A system's test file parametrises `CHECKS` over its configs; `make_batch` makes data for any dual encoder with a CLIP-like config.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from wordsight.models.contrastive.clip import CLIP
from wordsight.system import ContrastiveSystem, Embedder, PairScorer, System
from wordsight.types import Batch

Make = Callable[[], CLIP]


def make_batch(system: CLIP, rows: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Random pixels and captions of 1 to L - 2 words; every row its own text and picture."""
    g = torch.Generator().manual_seed(seed)
    config = system.config
    length, vocabulary, side = config.text.context_length, config.text.vocab_size, config.image.image_size_px
    tokens = torch.full((rows, length), getattr(config.text, "pad_id", 0))
    for row in tokens:
        words = int(torch.randint(1, length - 1, (), generator=g))
        row[0] = vocabulary - 2
        row[1 : 1 + words] = torch.randint(1, vocabulary - 2, (words,), generator=g)
        row[1 + words] = vocabulary - 1
    return Batch(
        pixels=torch.randn(rows, 3, side, side, generator=g).to(dtype),
        tokens=tokens,
        text_ids=torch.arange(rows),
        image_ids=torch.arange(rows),
        keys=tuple(f"row-{i}" for i in range(rows)),
        label_ids=torch.arange(rows),
    )


def total(system: System, batch: Batch) -> torch.Tensor:
    """What the loop minimises."""
    return torch.stack([term.weight * term.value for term in system.loss(batch).values()]).sum()


def cosines(system: Embedder, batch: Batch) -> torch.Tensor:
    """Every picture's with every text: [B, B]."""
    image, text = system.encode_image(batch.pixels), system.encode_text(batch.tokens)
    return system.similarities(image, text) if isinstance(system, PairScorer) else image @ text.T


def gradients(system: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


def check_protocols(make: Make) -> None:
    system = make()
    assert isinstance(system, System)
    assert isinstance(system, ContrastiveSystem)
    assert isinstance(system, Embedder)


def chance(system: System, rows: int) -> float:
    """The loss where every cosine is 0: log B, a choice among B, unless the system says another (a sigmoid of each pair)."""
    return system.expected_initial_loss(rows) if hasattr(system, "expected_initial_loss") else math.log(rows)


def check_initial_loss_is_chance(make: Make) -> None:
    """Within noise: random cosines have variance 1/D, and logits of variance v raise the loss by about v/2."""
    system = make().train()
    loss, expected = total(system, make_batch(system, rows=32)).item(), chance(system, 32)
    variance = math.exp(2 * system.log_scale.item()) / system.config.embed_dim
    assert abs(loss - expected) < 0.5 * variance + 0.05 * expected, loss


def check_loss_is_finite_in_both_modes_and_for_one_row(make: Make) -> None:
    system = make()
    for mode in (True, False):
        for rows in (2, 7):
            assert total(system.train(mode), make_batch(system, rows)).isfinite()
    batch = make_batch(system, 1)
    alone = total(system.eval(), batch)
    if system.logit_bias is None:  # one text to choose from
        assert alone.item() == 0.0
    else:
        cosine = cosines(system, batch).squeeze()
        torch.testing.assert_close(alone, -torch.nn.functional.logsigmoid(system.log_scale.exp() * cosine + system.logit_bias))


def check_a_batch_of_copies_has_its_closed_form(make: Make) -> None:
    """All logits are alike: log B where one answer is chosen; sigmoids say that all are right, or that one in a row is."""
    system = make().double().eval()
    batch = make_batch(system, 1, dtype=torch.float64)
    copies = Batch(**{name: value.expand(6, *value.shape[1:]) for name, value in batch.tensors().items()}, keys=batch.keys * 6)
    loss = total(system, copies)
    if system.logit_bias is None:
        torch.testing.assert_close(loss.item(), math.log(6), rtol=0, atol=1e-10)
    else:
        logit = system.log_scale.exp() * cosines(system, batch).squeeze() + system.logit_bias
        right, wrong = -torch.nn.functional.logsigmoid(logit), -torch.nn.functional.logsigmoid(-logit)
        expected = 6 * right if system.config.duplicates == "multi_positive" else right + 5 * wrong
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(system).values())


def check_every_trainable_parameter_gets_a_gradient(make: Make) -> None:
    system = make().train()
    total(system, make_batch(system)).backward()
    found = gradients(system)
    assert not [name for name, p in system.named_parameters() if p.requires_grad and name not in found]
    assert all(gradient.isfinite().all() for gradient in found.values())
    # zero-initialised gains shut a branch at the start; open them all, and everything but exact invariances must feel the loss
    for module in system.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.ones_(module.weight)
    system.zero_grad()
    total(system, make_batch(system)).backward()
    dead = [name for name, gradient in gradients(system).items() if not gradient.any()]
    assert not dead


def check_no_frozen_parameter_gets_a_gradient(make: Make) -> None:
    system = make().train()
    locked = [name for name, p in system.named_parameters() if not p.requires_grad]
    frozen = [name for i, (name, p) in enumerate(system.named_parameters()) if i % 2 == 0] + locked
    for name, p in system.named_parameters():
        p.requires_grad_(name not in frozen)
    total(system, make_batch(system)).backward()
    assert sorted(gradients(system)) == sorted(name for name, _ in system.named_parameters() if name not in frozen)


def check_one_batch_can_be_overfit(make: Make) -> None:
    system = make().train()
    batch = make_batch(system)
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3, weight_decay=0.0)
    first = total(system, batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = total(system, batch)
        loss.backward()
        optimizer.step()
        system.clamp_()
        if loss.item() < 0.05 * first:
            return
    raise AssertionError(f"loss went from {first:.3f} to {loss.item():.3f} only")


def check_seeds_reproduce(make: Make) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        system = make().train()
        loss = total(system, make_batch(system))
        loss.backward()
        runs.append((system.state_dict(), gradients(system), loss.detach()))
    (weights, found, loss), (weights2, found2, loss2) = runs
    assert torch.equal(loss, loss2)
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    assert all(torch.equal(found[name], found2[name]) for name in found)


def check_padding_changes_nothing(make: Make) -> None:
    """Neither how far texts are padded, nor with what, nor which other texts are in the batch."""
    system = make().double().eval()
    tokens = make_batch(system).tokens
    expected = system.encode_text(tokens)
    ends = tokens.argmax(1)
    torch.testing.assert_close(system.encode_text(tokens[:, : int(ends.max()) + 1]), expected, rtol=0, atol=1e-10)
    if not hasattr(system.config.text, "pad_id"):  # where a tower knows its padding, nothing else is
        filled = torch.where(torch.arange(tokens.shape[1]) > ends[:, None], tokens.max(), tokens)
        torch.testing.assert_close(system.encode_text(filled), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([system.encode_text(row[None]) for row in tokens]), expected, rtol=0, atol=1e-10)


def check_order_of_the_batch_does_not_matter(make: Make) -> None:
    system = make().double().eval()
    batch = make_batch(system, dtype=torch.float64)
    order = torch.randperm(len(batch))
    shuffled = replace(
        batch,
        pixels=batch.pixels[order],
        tokens=batch.tokens[order],
        text_ids=batch.text_ids[order],
        image_ids=batch.image_ids[order],
    )
    torch.testing.assert_close(total(system, shuffled), total(system, batch), rtol=0, atol=1e-10)


def check_checkpointing_changes_nothing(make: Make) -> None:
    """Loss, gradients, random numbers and running statistics: with activation checkpointing they are those without."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(5)
        system = make().train()
        system.set_activation_checkpointing(enabled)
        loss = total(system, make_batch(system))
        loss.backward()
        runs.append((loss.detach(), gradients(system), dict(system.named_buffers()), torch.rand(1)))
    (loss, found, buffers, drawn), (loss2, found2, buffers2, drawn2) = runs
    assert torch.equal(loss, loss2)
    assert torch.equal(drawn, drawn2)
    assert found.keys() == found2.keys()
    assert all(torch.equal(found[name], found2[name]) for name in found)
    assert all(torch.equal(buffers[name], buffers2[name]) for name in buffers)


def check_checkpointing_keeps_less_in_each_tower(make: Make) -> None:
    system = make().train()
    batch = make_batch(system)
    for tower, encode, data in (
        (system.image_tower, system.encode_image, batch.pixels),
        (system.text_tower, system.encode_text, batch.tokens),
    ):
        if getattr(tower, "locked", False):  # keeps nothing but what its head needs
            continue
        kept = []
        for enabled in (False, True):
            system.set_activation_checkpointing(enabled)
            numbers: list[int] = []
            ours = {p.data_ptr() for p in system.parameters()}

            def pack(t: torch.Tensor, numbers: list[int] = numbers, ours: set[int] = ours) -> torch.Tensor:
                if t.data_ptr() not in ours:
                    numbers.append(t.numel())
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                encode(data)
            kept.append(sum(numbers))
        assert kept[1] < 0.7 * kept[0], kept


def check_loss_is_that_of_its_embeddings(make: Make) -> None:
    """loss(batch) and loss_from_embeddings(embeddings of its parts, put together) are one, gradients at the embeddings too."""
    system = make().double().eval()
    batch = make_batch(system, dtype=torch.float64)
    parts = [system.embeddings(part) for part in batch.split(3)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, found = system.loss(batch), system.loss_from_embeddings(whole)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name].value, expected[name].value, rtol=0, atol=1e-10)
    own = {id(p) for p in system.parameters()}
    assert all(id(p) in own for p in system.loss_parameters())


def check_bfloat16_autocast_is_near_and_its_loss_float32(make: Make) -> None:
    system = make().eval()
    batch = make_batch(system, rows=4)
    expected = total(system, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = system.loss(batch)
    assert all(term.sum.dtype is torch.float32 for term in terms.values())
    loss = torch.stack([term.weight * term.value for term in terms.values()]).sum()
    assert abs(loss.item() - expected.item()) < 0.1 * max(expected.item(), 1.0)
    loss.backward()
    assert all(gradient.dtype is torch.float32 and gradient.isfinite().all() for gradient in gradients(system).values())


def check_embeddings_have_unit_length(make: Make) -> None:
    """Or where a model scores pairs itself, its scores are cosines."""
    system = make().eval()
    batch = make_batch(system)
    if isinstance(system, PairScorer):
        found = cosines(system, batch)
        assert found.shape == (8, 8)
        assert found.abs().max() <= 1 + 1e-6
        return
    for encode, data in ((system.encode_image, batch.pixels), (system.encode_text, batch.tokens)):
        unit, raw = encode(data), encode(data, normalize=False)
        assert unit.shape == raw.shape == (8, system.config.embed_dim)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(8))
        torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), unit, rtol=0, atol=1e-6)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
