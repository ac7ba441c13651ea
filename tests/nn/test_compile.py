"""The towers are one graph each for torch.compile, with patch dropout and stochastic depth drawing, and give the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from wordsight import catalog, create
from wordsight.nn.random import numbered_rows


def graphs_and_outputs(tower: nn.Module, x: Tensor) -> tuple[int, Tensor, Tensor]:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    with numbered_rows(3, 0, torch.device("cpu")):
        traced = torch.compile(tower, backend=count, fullgraph=True)(x)  # fullgraph: a graph break is an error
        return graphs, traced, tower(x)


@pytest.mark.parametrize("name", ["clip-tiny", "clip-tiny-resnet", "clip-quickstart"])
def test_towers_are_one_graph(name: str) -> None:
    config = catalog.find(name).config
    if hasattr(config.image, "patch_dropout"):
        config = replace(config, image=replace(config.image, patch_dropout=0.5, stochastic_depth=0.3))
    config = replace(config, text=replace(config.text, stochastic_depth=0.3, vocab_size=49408, num_layers=2))
    model = create(config).train()
    side = config.image.image_size_px
    pixels = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    for tower, x in ((model.image_tower, pixels), (model.text_tower, model.tokenize(["a cat", "two dogs", "", "a b c d e"]))):
        state = {key: value.clone() for key, value in tower.state_dict().items()}
        graphs, traced, expected = graphs_and_outputs(tower, x)
        tower.load_state_dict(state)
        assert graphs == 1
        torch.testing.assert_close(traced, expected, rtol=1e-5, atol=1e-5)


def test_efficientnet_and_bert_are_one_graph_each() -> None:
    config = catalog.find("align-tiny").config
    config = replace(
        config, image=replace(config.image, drop_connect=0.3, image_size_px=33), text=replace(config.text, dropout=0.2)
    )
    model = create(config).train()
    tokens = torch.tensor([[2, 9, 30, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 7, 8, 9, 10, 3]])
    for tower, x in ((model.image_tower, torch.randn(3, 3, 33, 33)), (model.text_tower, tokens)):
        state = {key: value.clone() for key, value in tower.state_dict().items()}
        graphs, traced, expected = graphs_and_outputs(tower, x)
        tower.load_state_dict(state)
        assert graphs == 1
        torch.testing.assert_close(traced, expected, rtol=1e-5, atol=1e-5)
