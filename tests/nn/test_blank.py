"""Blank models have the names and shapes of made ones, and making or loading one imports no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wordsight
from wordsight import catalog
from wordsight.nn.blank import blank


@pytest.mark.parametrize("name", [n for n, e in catalog.CATALOG.items() if e.num_parameters < 10_000_000])
def test_a_blank_model_is_a_made_one_without_numbers(name: str) -> None:
    config = catalog.find(name).config
    made = catalog.system_class(config)(config)
    with blank():
        empty = catalog.system_class(config)(config)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in made.state_dict().items()
    }
    assert torch.randn(3).any(), "drawing works again"


def test_blank_weights_take_no_memory_and_no_random_numbers() -> None:
    import resource

    config = catalog.find("ViT-L/14").config
    before, state = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.random.get_rng_state()
    with blank():
        model = catalog.system_class(config)(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes, of 1.7 GB
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) == catalog.find("ViT-L/14").num_parameters


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "model")
    code = "import sys, wordsight; wordsight.load(sys.argv[1]); assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
