"""Tiny models of the reference libraries, with weights whose differences show, and files as they write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TEXTS = ["a photo of a cat", "two dogs, running", "été à la plage", "x" * 400, ""]
PLAIN_TEXTS = ["a photo of a cat", "two dogs running", "something blue"]
TEXT_CFG = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
VIT_CFG = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
RESNET_CFG = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}


def model_cfg(vision: dict[str, Any] = VIT_CFG, *, quick_gelu: bool = True) -> dict[str, Any]:
    return {"embed_dim": 32, "quick_gelu": quick_gelu, "vision_cfg": dict(vision), "text_cfg": dict(TEXT_CFG)}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights and statistics that are nowhere zero or one, so that a lost or swapped tensor changes the outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "logit_scale" not in name and not torch.isinf(tensor).any():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(
                tensor + (0.1 if tensor.ndim < 2 else 0.02) * noise if "running_var" not in name else 1 + 0.1 * noise.abs()
            )
    return model.eval()


def open_clip_model(vision: dict[str, Any] = VIT_CFG, *, quick_gelu: bool = True) -> Any:
    from open_clip.model import CLIP

    return randomize(CLIP(**model_cfg(vision, quick_gelu=quick_gelu)))


def huggingface_model(*, activation: str = "quick_gelu", **text: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 64,
        "hidden_act": activation,
    }
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": 64, "patch_size": 16}, projection_dim=32
    )
    return randomize(CLIPModel(config))


def torchscript(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """An archive as OpenAI publishes them: traced, matrices in float16, three numbers beside the weights. Returns its weights."""
    from open_clip.model import convert_weights_to_fp16

    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    for name, value in (("input_resolution", size), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": (torch.rand(1, 3, size, size),), "encode_text": (torch.zeros(1, 77, dtype=torch.long),)}
    traced = torch.jit.trace_module(model, inputs=inputs, check_trace=False)
    convert_weights_to_fp16(model)  # the traced module shares these parameters
    traced.save(str(path))
    return {
        k: v for k, v in traced.state_dict().items() if k not in ("input_resolution", "context_length", "vocab_size", "attn_mask")
    }


def picture(seed: int = 0, size: tuple[int, int] = (97, 71)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@torch.no_grad()
def outputs(model: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both towers' L2-normalised embeddings, of an open_clip model or of ours."""
    return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def difference(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
