"""What the log says of the device's use: operations counted against a formula, the shares that follow, no trace left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.systems import Normed, tiny_batch, tiny_clip
from wordsight.train import speed
from wordsight.train.loop import fit
from wordsight.train.recipe import Recipe
from wordsight.train.speed import Speed, flops_per_sample, matmul_rate, peak_memory
from wordsight.train.step import Stepper


def test_a_process_does_not_inherit_the_peak_of_who_started_it() -> None:
    """Linux's ru_maxrss does, and a small step started from a large process would look as large."""
    held = torch.ones(200_000_000, dtype=torch.uint8)
    code = "import torch; from wordsight.train.speed import peak_memory; print(peak_memory(torch.device('cpu')))"
    alone = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert alone < peak_memory(torch.device("cpu")) - held.nbytes // 2


def test_operations_of_a_linear_layer() -> None:
    """2 rows x in x out forward and as many for the weight's gradient; the input needs none."""
    layer = torch.nn.Linear(32, 16, bias=False)
    x = torch.randn(5, 32)
    assert flops_per_sample(layer, lambda: {"y": layer(x)}, 5) == 2 * 2 * 32 * 16
    assert layer.weight.grad is None


def test_a_frozen_tower_costs_its_forward_pass_only() -> None:
    trained, frozen = tiny_clip(), tiny_clip()
    frozen.image_tower.requires_grad_(False)
    batch = tiny_batch(4)
    costs = [Stepper(system).flops_per_sample(batch, 1) for system in (trained, frozen)]
    assert costs[1] < 0.75 * costs[0]


def test_measuring_changes_nothing() -> None:
    """Running statistics, gradients and the step that follows are those of a system that was not measured."""
    runs = []
    for measure in (False, True):
        torch.manual_seed(0)
        system = Normed().train()
        stepper = Stepper(system, exchange="gather")
        if measure:
            assert stepper.flops_per_sample(tiny_batch(), 1) > 0
        loss = stepper.backward(tiny_batch(), 1)
        runs.append((loss.total, dict(system.named_buffers()), {n: p.grad for n, p in system.named_parameters()}))
    assert torch.equal(runs[0][0], runs[1][0])
    for before, after in zip(runs[0][1:], runs[1][1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_shares_follow_from_the_figures() -> None:
    described = Speed(flops_per_sample=2e9, peak_flops=1e11, peak_memory=lambda: 7).describe(10.0)
    assert described == {"gflops_per_s": 20.0, "mfu": 0.2, "peak_memory_bytes": 7}


def test_the_device_is_measured() -> None:
    device = torch.device("cpu")
    assert 1e8 < matmul_rate(device, torch.float32) < 1e15
    before = peak_memory(device)
    held = torch.ones(30_000_000)
    assert peak_memory(device) >= before
    assert peak_memory(device) > held.nbytes


def test_a_long_run_logs_its_use_of_the_device_and_trains_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the measurement from the first step on and without it, the weights are equal; the figures stand in speed.jsonl."""
    weights = []
    for name, after in (("with", 0.0), ("without", 1e9)):
        monkeypatch.setattr(speed, "MEASURED_AFTER_S", after)
        fit(replace(recipe, steps=4), tmp_path / name, device="cpu", progress=False)
        weights.append((tmp_path / name / "last" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    last = json.loads((tmp_path / "with" / "speed.jsonl").read_text().splitlines()[-1])
    assert last["gflops_per_s"] > 0
    assert 0 < last["mfu"] < 1.5
    assert last["peak_memory_bytes"] > 1e7
    assert "mfu" not in json.loads((tmp_path / "without" / "speed.jsonl").read_text().splitlines()[-1])
