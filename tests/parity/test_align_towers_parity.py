"""ALIGN's towers against transformers' with random weights: outputs and every gradient, in training and evaluation mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.reference import randomize
from wordsight.interop.align import bert_from_json, bert_rows, efficientnet_from_json, efficientnet_rows
from wordsight.interop.names import NameMap, fuse_qkv
from wordsight.nn.bert import Bert, BertConfig
from wordsight.nn.efficientnet import EfficientNet, efficientnet

IMAGE_NAMES, TEXT_NAMES = NameMap(efficientnet_rows("", "")), NameMap(bert_rows("", ""))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VISION = {
    "width_coefficient": 0.5,
    "depth_coefficient": 0.6,
    "image_size": 64,
    "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 40],
    "out_channels": [16, 40, 96],
    "strides": [1, 2, 2],
    "num_block_repeats": [2, 3, 2],
    "expand_ratios": [1, 6, 4],
    "drop_connect_rate": 0.0,
}
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def renamed(tensors: dict[str, torch.Tensor], names: NameMap) -> dict[str, torch.Tensor]:
    found = {names.ours(name): tensor for name, tensor in tensors.items()}
    assert None not in found
    return fuse_qkv(found)


def differences(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max(((mine[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1.0)).item() for n in mine)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "square"), [(64, []), (51, []), (51, [0, 2])])
def test_image_tower(size: int, square: list[int], dtype: torch.dtype, training: bool) -> None:
    from transformers import AlignVisionConfig, AlignVisionModel

    values = {**VISION, "image_size": size, "depthwise_padding": square}
    theirs = randomize(AlignVisionModel(AlignVisionConfig(**values))).to(dtype)
    config = efficientnet_from_json(values, Path("config.json"))
    ours = EfficientNet(config, config.num_features).to(dtype)
    ours.load_state_dict(renamed(theirs.state_dict(), IMAGE_NAMES))
    for model in (ours, theirs):
        model.train(training)
    pixels = torch.randn(3, 3, size, size, dtype=dtype)
    expected = theirs(pixels)
    found_map = ours.forward_map(pixels)
    found = found_map.mean((2, 3))
    torch.testing.assert_close(found_map, expected.last_hidden_state, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(found, expected.pooler_output, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected.pooler_output * weight).sum().backward()
    assert differences(gradients(ours), renamed(gradients(theirs), IMAGE_NAMES)) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [64, 51, 75])
def test_same_padding_and_head_are_those_of_transformers_efficientnet(size: int) -> None:
    """It pads blocks by a list, made for one size; ours looks at the size at hand. Its stem knows even sizes only."""
    from transformers import EfficientNetConfig as TheirConfig
    from transformers import EfficientNetModel

    side, odd, block = (size + 1) // 2, [], 0
    for stride, repeats in zip(VISION["strides"], (2, 2, 2), strict=True):
        if stride == 2 and side % 2:
            odd.append(block)
        side, block = -(-side // stride), block + repeats
    values: dict[str, Any] = {**VISION, "image_size": size, "depthwise_padding": odd, "hidden_dim": 640, "batch_norm_eps": 1e-3}
    theirs = randomize(EfficientNetModel(TheirConfig(**values))).double()
    published = efficientnet_from_json(values, Path("config.json"))
    config = replace(published, padding="same", square_blocks=(), head_channels=1280, project=True)
    if size % 2:
        theirs.embeddings.padding = torch.nn.ZeroPad2d((1, 1, 1, 1))
    ours = EfficientNet(config, 5).double().eval()
    missing, surplus = ours.load_state_dict(renamed(theirs.state_dict(), IMAGE_NAMES), strict=False)
    assert (missing, surplus) == (["projection"], [])
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(ours.forward_map(pixels), theirs(pixels).last_hidden_state, rtol=1e-10, atol=1e-10)


def test_b7_has_the_parameters_of_transformers_and_of_the_paper() -> None:
    """66 million with head and classifier in arXiv 1905.11946, table 2; transformers' default AlignVisionConfig is B7 without."""
    from transformers import AlignVisionConfig, AlignVisionModel

    with torch.device("meta"):
        theirs = AlignVisionModel(AlignVisionConfig())
        ours = EfficientNet(efficientnet_from_json({}, Path("config.json")), 640)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    found = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert found == {name: t.shape for name, t in renamed(theirs.state_dict(), IMAGE_NAMES).items()}


# as arXiv 1905.11946, table 2, has them in millions; L2 is arXiv 1911.04252's, Lite's are its code's
PAPER = {"b0": 5.3, "b1": 7.8, "b4": 19, "b7": 66, "l2": 480}


@pytest.mark.parametrize("name", ["b0", "b1", "b4", "b7", "l2", "lite0", "lite3", "lite4"])
def test_the_familys_sizes_are_timms_and_the_papers(name: str) -> None:
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(f"{'tf_' if 'lite' in name else ''}efficientnet_{name}")
        ours = EfficientNet(efficientnet(name), 1000)
    size = sum(p.numel() for p in ours.parameters()) + 1000  # the classifier's bias
    assert size == sum(p.numel() for p in theirs.parameters())
    assert round(size / 1e6, 1 if name in ("b0", "b1") else None) == PAPER.get(name, round(size / 1e6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_text_tower(dtype: torch.dtype) -> None:
    from transformers import AlignTextConfig, AlignTextModel

    theirs = randomize(AlignTextModel(AlignTextConfig(**TEXT), add_pooling_layer=False)).to(dtype)
    theirs.config._attn_implementation = "sdpa"  # its other one takes softmax in float32
    ours = Bert(bert_from_json(TEXT, Path("c"), project=False), 32).to(dtype)
    ours.load_state_dict(renamed(theirs.state_dict(), TEXT_NAMES))
    tokens = torch.randint(1, 61, (4, 20))
    lengths = torch.tensor([3, 20, 9, 1])
    mask = torch.arange(20) < lengths[:, None]
    tokens[~mask] = 0
    expected = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    found, visible = ours.forward_tokens(tokens)
    assert torch.equal(visible, mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    weight = torch.randn_like(found[:, 0])
    (ours(tokens) * weight).sum().backward()
    (expected[:, 0] * weight).sum().backward()
    assert differences(gradients(ours), renamed(gradients(theirs), TEXT_NAMES)) < TOLERANCE[dtype]


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
def test_poolings(pool: str) -> None:
    from transformers import BertConfig as TheirConfig
    from transformers import BertModel

    theirs = randomize(BertModel(TheirConfig(**TEXT))).double()
    ours = Bert(bert_from_json(TEXT, Path("c"), project=False, pool=pool), 32).double()
    state = renamed(theirs.state_dict(), TEXT_NAMES)
    ours.load_state_dict({name: t for name, t in state.items() if pool == "pooler" or "pooler" not in name})
    tokens = torch.randint(1, 61, (4, 20))
    mask = torch.arange(20) < torch.tensor([3, 17, 9, 2])[:, None]
    tokens[~mask] = 0
    out = theirs(input_ids=tokens, attention_mask=mask.long())
    weights = mask[:, :, None].double()
    expected = {
        "cls": out.last_hidden_state[:, 0],
        "mean": (out.last_hidden_state * weights).sum(1) / weights.sum(1),
        "pooler": out.pooler_output,
    }[pool]
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-10, atol=1e-10)


def test_full_size_bert_has_the_parameters_of_the_papers_base_model() -> None:
    """110 million (arXiv 1810.04805, section 3), 109.5 as transformers counts it."""
    from transformers import BertConfig as TheirConfig
    from transformers import BertModel

    with torch.device("meta"):
        ours = Bert(BertConfig(pool="pooler", project=False), 768)
        theirs = BertModel(TheirConfig())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
