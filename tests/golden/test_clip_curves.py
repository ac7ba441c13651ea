"""Loss curves of the tiny CLIPs that a refactoring must not change: closed form first, then ten steps as they were."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.conformance import make_batch, total
from wordsight import catalog
from wordsight.models.contrastive.clip import CLIP

# total loss before each step; a change of meaning moves them by far more than the tolerance, another processor by far less
CURVES = {
    "clip-tiny": [2.86, 2.7933, 2.7202, 2.6741, 2.6118, 2.5438, 2.4448, 2.3146, 2.1479, 1.9917],
    "clip-tiny-resnet": [2.8807, 2.8262, 1.7388, 1.614, 0.7631, 0.6453, 0.225, 0.1514, 0.0719, 0.0543],
}
TOLERANCE = 2e-3


def curve(name: str, steps: int = 10) -> list[float]:
    """Loss before each of `steps` AdamW steps, on two batches of 16 in turns."""
    torch.manual_seed(11)
    model = CLIP(catalog.find(name).config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        loss = total(model, make_batch(model, rows=16, seed=step % 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CURVES)
def test_curve(name: str) -> None:
    assert curve(name) == pytest.approx(CURVES[name], abs=TOLERANCE)


@pytest.mark.parametrize("name", CURVES)
def test_curve_starts_at_log_batch_and_falls(name: str) -> None:
    golden = CURVES[name]
    assert golden[0] == pytest.approx(math.log(16), rel=0.05)
    assert golden[-1] < golden[0] - 0.2
