"""Prompt learning beside the published computation: a text tower of 12 x 512, random weights, float32, pictures' features given.

The peer is CoOp's and CoCoOp's computation in plain PyTorch, as their papers and code describe it: every prompt is encoded with
its 77 tokens at each step; CoCoOp takes one picture after the other; evaluation encodes the texts again for each batch of 100
pictures. Towers are frozen in both, so no gradients of weights are computed. Both give the same loss and gradient, or the
benchmark fails. Class names are drawn from real words so that they are as long as ImageNet's (2.2 tokens in the mean) and
iNaturalist's (5.9).

Wall-clock time in all threads: run it on an idle machine. Memory is the high-water mark of a process of its own.
`python -m benchmarks.prompt_learning --json OUT` writes the rows.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import main, row
from wordsight.adapt.prompt_encoder import PromptEncoder
from wordsight.data import open_source
from wordsight.data.tokenize import ClipTokenizer
from wordsight.nn.text import TextConfig, TextTransformer
from wordsight.train.speed import peak_memory

WIDTH, SCALE = 512, 100.0
BATCH, TEST_BATCH, TEST_IMAGES = 32, 100, 1000
IMAGENET_LENGTHS = (2, 1, 3, 2, 1, 2, 4, 2, 1, 2, 1, 3, 2, 2, 1, 5, 2, 3, 1, 2, 4, 2)  # tokens of a name; 2.18 in the mean
INATURALIST_LENGTHS = (6, 5, 7, 4, 6, 9, 5, 6, 5, 6)  # 5.9
PEER_CLASSES = 250  # that the peer is given at once: 1,000 need more memory than most machines have


@cache
def model() -> SimpleNamespace:
    """A text tower as CLIP's, with random weights, and CLIP's tokenizer."""
    torch.manual_seed(0)
    tower = TextTransformer(TextConfig(), WIDTH, "quick_gelu").requires_grad_(False).eval()
    return SimpleNamespace(text_tower=tower, tokenizer=ClipTokenizer.clip())


def class_names(count: int, lengths: Sequence[int]) -> list[str]:
    """Names of words from the embedded pictures' captions, each of one token."""
    source = open_source("sample:train")
    encode = model().tokenizer.encode
    found = {word for i in range(0, len(source), 3) for caption in source[i].captions for word in caption.lower().split()}
    words = sorted(word for word in found if word.isalpha() and len(encode(word)) == 1)
    random = Random(0)
    names: dict[str, None] = {}
    while len(names) < count:
        size = lengths[len(names) % len(lengths)]
        names[" ".join(random.sample(words, size))] = None
    return list(names)


class PublishedBlock(nn.Module):
    """CLIP's residual attention block over PyTorch's own attention, sequence first."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, ours.attn.num_heads)
        self.attn.in_proj_weight, self.attn.in_proj_bias = ours.attn.qkv.weight, ours.attn.qkv.bias
        self.attn.out_proj = ours.attn.proj
        self.ln_1, self.ln_2, self.c_fc, self.c_proj = ours.norm1, ours.norm2, ours.mlp.fc1, ours.mlp.fc2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[77, C, W] -> [77, C, W]."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        hidden = self.c_fc(self.ln_2(x))
        return x + self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Published:
    """Prompts as published: prefix, context, suffix; all 77 tokens through all layers."""

    def __init__(self, names: Sequence[str], num_context: int) -> None:
        tower, tokenizer = model().text_tower, model().tokenizer
        self.tower = tower
        self.tokens = tokenizer([" ".join(["X"] * num_context) + f" {name}." for name in names])
        embedded = tower.token_embedding(self.tokens)
        self.prefix, self.suffix = embedded[:, :1], embedded[:, 1 + num_context :]
        self.blocks = [PublishedBlock(block) for block in tower.blocks]
        self.mask = torch.full((77, 77), -torch.inf).triu(1)

    def __call__(self, context: Tensor, part: slice = slice(None)) -> Tensor:
        """[M, W] -> [C, D], of some of the classes."""
        prefix, suffix = self.prefix[part], self.suffix[part]
        x = torch.cat([prefix, context.expand(len(prefix), -1, -1), suffix], dim=1) + self.tower.position_embedding
        x = x.permute(1, 0, 2)
        for block in self.blocks:
            x = block(x, self.mask)
        x = self.tower.norm_final(x.permute(1, 0, 2))
        return x[torch.arange(len(x)), self.tokens[part].argmax(dim=-1)] @ self.tower.projection


def inputs(num_pictures: int, num_classes: int, num_context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features, targets, a context that learns."""
    g = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(num_pictures, WIDTH, generator=g), dim=1)
    targets = torch.randint(0, num_classes, (num_pictures,), generator=g)
    return features, targets, (0.02 * torch.randn(num_context, WIDTH, generator=g)).requires_grad_()


def loss_of(features: Tensor, targets: Tensor, text: Tensor) -> Tensor:
    """Cross-entropy over scaled cosines."""
    return F.cross_entropy(SCALE * features @ F.normalize(text, dim=-1).mT, targets)


def timed(function: Callable[[], object], repeats: int = 3) -> tuple[float, object]:
    """Seconds of the fastest call, and what the last one gave."""
    best, given = math.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        given = function()
        best = min(best, time.perf_counter() - start)
    return best, given


def check_equal(ours: Tensor, peer: Tensor, what: str) -> None:
    """Both computations give the same, or there is nothing to compare."""
    difference = float((ours - peer).abs().max())
    assert difference < 1e-3, f"{what}: {difference} between Wordsight's and the published computation"


def coop_step(num_classes: int, must: float) -> dict:
    """Loss and backward pass of one batch; the peer in parts of 250 classes, whose features a loss then takes together."""
    names = class_names(num_classes, IMAGENET_LENGTHS)
    features, targets, context = inputs(BATCH, num_classes, 16)
    encoder, published = PromptEncoder(model(), names, 16), Published(names, 16)

    def ours() -> tuple[Tensor, Tensor]:
        loss = loss_of(features, targets, encoder(context))
        return loss.detach(), torch.autograd.grad(loss, context)[0]

    def peer() -> tuple[Tensor, Tensor]:
        """In parts: forward and backward of each with the gradient of the whole loss at its features, from our encoder's."""
        gradient, text = torch.zeros_like(context), []
        for start in range(0, num_classes, PEER_CLASSES):
            part = slice(start, start + PEER_CLASSES)
            found = published(context, part)
            gradient += torch.autograd.grad(found, context, at_text[part])[0]
            text.append(found.detach())
        return loss_of(features, targets, torch.cat(text)), gradient

    text = encoder(context).detach().requires_grad_()
    (at_text,) = torch.autograd.grad(loss_of(features, targets, text), text)
    quick, (our_loss, our_gradient) = timed(ours)
    slow, (peer_loss, peer_gradient) = timed(peer, 2 if num_classes <= 100 else 1)
    check_equal(our_loss, peer_loss, f"CoOp's loss with {num_classes} classes")
    scale = float(peer_gradient.abs().max())
    check_equal(our_gradient / scale, peer_gradient / scale, f"CoOp's gradient with {num_classes} classes")
    parts = "" if num_classes <= PEER_CLASSES else f"; the peer in {num_classes // PEER_CLASSES} parts of {PEER_CLASSES} classes"
    note = f"M = 16, name at the end, batch {BATCH}, {int(encoder.layout.lengths.sum())} tokens with their ends{parts}"
    return row(f"CoOp training step, {num_classes:,} classes", quick, slow, "s", must, note)


def coop_evaluation(num_classes: int = 100) -> dict:
    """Logits of 1,000 test pictures: texts once, against once a batch."""
    names = class_names(num_classes, IMAGENET_LENGTHS)
    features, _, context = inputs(TEST_IMAGES, num_classes, 16)
    published = Published(names, 16)

    @torch.no_grad()
    def ours() -> Tensor:
        text = F.normalize(PromptEncoder(model(), names, 16)(context), dim=1)
        return torch.cat([SCALE * some @ text.T for some in features.split(TEST_BATCH)])

    @torch.no_grad()
    def peer() -> Tensor:
        rows = [SCALE * some @ F.normalize(published(context), dim=1).T for some in features.split(TEST_BATCH)]
        return torch.cat(rows)

    quick, our_logits = timed(ours)
    slow, peer_logits = timed(peer, 1)
    check_equal(our_logits, peer_logits, "CoOp's logits")
    note = f"{num_classes} classes; the peer encodes them for each batch of {TEST_BATCH}; pictures' features given to both"
    return row(f"CoOp evaluation, {TEST_IMAGES:,} pictures", quick, slow, "s", 20.0, note)


class MetaNet(nn.Sequential):
    """What moves CoCoOp's context, of ViT-B/16's sizes."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(nn.Linear(WIDTH, WIDTH // 16), nn.ReLU(), nn.Linear(WIDTH // 16, WIDTH))


def cocoop(num_classes: int = 100, peer_pictures: int = 2, our_pictures: int = 16) -> list[dict]:
    """Evaluation a picture, and a training step with one picture."""
    names = class_names(num_classes, IMAGENET_LENGTHS)
    features, targets, context = inputs(our_pictures, num_classes, 4)
    net = MetaNet()
    encoder, published = PromptEncoder(model(), names, 4), Published(names, 4)

    def our_logits(some: Tensor) -> Tensor:
        rows = []
        for part in some.split(encoder.contexts_at_once):
            text = F.normalize(encoder(context + net(part)[:, None]), dim=-1)
            rows.append(SCALE * torch.einsum("bd,bcd->bc", part, text))
        return torch.cat(rows)

    def peer_logits(some: Tensor) -> Tensor:
        shifted = context + net(some)[:, None]
        texts = (F.normalize(published(own), dim=1) for own in shifted)
        return torch.stack([SCALE * text @ picture for text, picture in zip(texts, some, strict=True)])

    def step(logits: Callable[[Tensor], Tensor]) -> Tensor:
        loss = F.cross_entropy(logits(features[:1]), targets[:1])
        torch.autograd.grad(loss, [context, *net.parameters()])
        return loss.detach()

    with torch.no_grad():
        quick, ours = timed(lambda: our_logits(features), 2)
        slow, peer = timed(lambda: peer_logits(features[:peer_pictures]), 1)
    check_equal(ours[:peer_pictures], peer, "CoCoOp's logits")
    note = f"{num_classes} classes, M = 4; {our_pictures} pictures together, the peer one after the other ({peer_pictures} timed)"
    rows = [row("CoCoOp evaluation, a picture", quick / our_pictures, slow / peer_pictures, "s", 10.0, note)]
    quick, our_loss = timed(lambda: step(our_logits))
    slow, peer_loss = timed(lambda: step(peer_logits), 2)
    check_equal(our_loss, peer_loss, "CoCoOp's loss")
    return [*rows, row("CoCoOp training step", quick, slow, "s", 5.0, f"{num_classes} classes, M = 4, batch 1")]


def step_memory(which: str, num_classes: int) -> float:
    """GB that a process has at most, from its start through one step of CoOp."""
    code = f"import benchmarks.prompt_learning as b; print(b.report_memory({which!r}, {num_classes}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e9


def report_memory(which: str, num_classes: int) -> int:
    """What `step_memory` asks a process."""
    names = class_names(num_classes, IMAGENET_LENGTHS if num_classes <= 1000 else INATURALIST_LENGTHS)
    features, targets, context = inputs(BATCH, num_classes, 16)
    encode = PromptEncoder(model(), names, 16) if which == "ours" else Published(names, 16)
    torch.autograd.grad(loss_of(features, targets, encode(context)), context)
    return peak_memory(torch.device("cpu"))


def memory() -> list[dict]:
    """Peaks of a step: 1,000 classes beside the peer's, 8,142 long names beside the limit."""
    fewer, more = 100, PEER_CLASSES
    low, high = step_memory("peer", fewer), step_memory("peer", more)
    peer = high + (high - low) / (more - fewer) * (1000 - more)
    note = f"of the whole process; the peer's from {low:.3g} GB at {fewer} and {high:.3g} GB at {more} classes, along a line"
    many = step_memory("ours", 8142)
    return [
        row("CoOp training step, 1,000 classes: memory", step_memory("ours", 1000), peer, "GB", 10.0, note),
        row("CoOp training step, 8,142 long names: memory", many, 6.0, "GB", 1.0, "of the whole process; peer: the limit"),
    ]


def run() -> list[dict]:
    """All rows; about a quarter of an hour on two cores."""
    return [coop_step(100, 12.0), coop_step(1000, 15.0), coop_evaluation(), *cocoop(), *memory()]


if __name__ == "__main__":
    main(run, "Prompt learning: CoOp and CoCoOp.")
