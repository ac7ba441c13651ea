"""big_vision's SigLIP archives, built here from a random model by a mapping of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import wordsight
from tests.interop.siglip_reference import LENGTH, TEXTS, VOCABULARY, vocabulary
from wordsight.data.transform import Preprocess
from wordsight.interop.safe_read import CheckpointError
from wordsight.models.contrastive.siglip import SigLIP, SigLIPConfig
from wordsight.nn.text import SigLIPTextConfig
from wordsight.nn.vit import ViTConfig

HEADS = 4
SIZE = {"width": 32, "num_layers": 3, "num_heads": HEADS, "norm_eps": 1e-6, "mlp_ratio": 1.5}
CONFIG = SigLIPConfig(
    embed_dim=32,
    image=ViTConfig(image_size_px=20, patch_size_px=8, patch_bias=True, norm_pre=False, pool="map", project=False, **SIZE),
    text=SigLIPTextConfig(vocab_size=VOCABULARY, context_length=LENGTH, **{**SIZE, "num_heads": 2}),
)


@pytest.fixture(scope="module")
def model() -> SigLIP:
    torch.manual_seed(3)
    model = SigLIP(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def flax_tree(model: SigLIP, *, scan: bool = False) -> dict[str, np.ndarray]:
    """The parameters as Flax has them, written down module by module."""
    tree: dict[str, np.ndarray] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        tree[f"params/{name}"] = tensor.detach().numpy().copy()

    def norm(name: str, module: torch.nn.LayerNorm) -> None:
        put(f"{name}/scale", module.weight)
        put(f"{name}/bias", module.bias)

    def dense(name: str, module: torch.nn.Linear) -> None:
        put(f"{name}/kernel", module.weight.T)
        put(f"{name}/bias", module.bias)

    def attention(name: str, module: torch.nn.Module, heads: int) -> None:
        width = module.width
        for i, which in enumerate(("query", "key", "value")):
            rows = module.qkv.weight[i * width : (i + 1) * width]  # [out, in], head by head
            kernel = torch.stack([rows[h * width // heads : (h + 1) * width // heads].T for h in range(heads)], dim=1)
            put(f"{name}/{which}/kernel", kernel)
            put(f"{name}/{which}/bias", module.qkv.bias[i * width : (i + 1) * width].view(heads, width // heads))
        put(f"{name}/out/kernel", module.proj.weight.T.reshape(heads, width // heads, width))
        put(f"{name}/out/bias", module.proj.bias)

    def encoder(name: str, tower: torch.nn.Module, heads: int, last: torch.nn.LayerNorm) -> None:
        for i, block in enumerate(tower.blocks):
            norm(f"{name}/encoderblock_{i}/LayerNorm_0", block.norm1)
            attention(f"{name}/encoderblock_{i}/MultiHeadDotProductAttention_0", block.attn, heads)
            norm(f"{name}/encoderblock_{i}/LayerNorm_1", block.norm2)
            dense(f"{name}/encoderblock_{i}/MlpBlock_0/Dense_0", block.mlp.fc1)
            dense(f"{name}/encoderblock_{i}/MlpBlock_0/Dense_1", block.mlp.fc2)
        norm(f"{name}/encoder_norm", last)
        if scan:
            for part in [n for n in tree if n.startswith(f"params/{name}/encoderblock_0/")]:
                names = [part.replace("encoderblock_0", f"encoderblock_{i}") for i in range(len(tower.blocks))]
                tree[part.replace("encoderblock_0", "encoderblock")] = np.stack([tree.pop(n) for n in names])

    image, text = model.image_tower, model.text_tower
    put("img/embedding/kernel", image.patch_embed.weight.permute(2, 3, 1, 0))
    put("img/embedding/bias", image.patch_embed.bias)
    put("img/pos_embedding", image.position_embedding[None])
    encoder("img/Transformer", image, HEADS, image.norm_post)
    put("img/MAPHead_0/probe", image.pool.probe[None, None])
    attention("img/MAPHead_0/MultiHeadDotProductAttention_0", image.pool.attn, HEADS)
    norm("img/MAPHead_0/LayerNorm_0", image.pool.norm)
    dense("img/MAPHead_0/MlpBlock_0/Dense_0", image.pool.mlp.fc1)
    dense("img/MAPHead_0/MlpBlock_0/Dense_1", image.pool.mlp.fc2)
    put("txt/Embed_0/embedding", text.token_embedding.weight)
    put("txt/pos_embedding", text.position_embedding[None])
    encoder("txt/Encoder_0", text, 2, text.norm_final)
    dense("txt/head", text.head)
    put("t", model.log_scale[None])
    put("b", model.logit_bias[None])
    return tree


@pytest.mark.parametrize("scan", [False, True])
def test_every_weight_comes_back_with_its_tokenizer(tmp_path: Path, model: SigLIP, scan: bool) -> None:
    np.savez(tmp_path / "siglip.npz", **flax_tree(model, scan=scan), **{"opt/count": np.zeros(1, np.int32)})
    vocabulary().save(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessing files: SigLIP's is used"):
        found = wordsight.load(tmp_path / "siglip.npz")
    assert found.config.image.image_size_px == 16  # the grid's; 20 px are cut off to it
    assert found.config.text == CONFIG.text
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(found.state_dict()[name], state[name]) for name in state)
    assert (found.tokenizer.clean, found.tokenizer.pad_id) == ("big_vision", 1)
    assert found.preprocessor == Preprocess(image_size_px=16, resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert found.provenance["layout"] == "big_vision"
    pixels = torch.randn(2, 3, 20, 20)
    tokens = found.tokenize(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(found.encode_image(pixels[..., :16, :16]), model.encode_image(pixels), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=0)


def test_the_named_model_says_the_image_size(tmp_path: Path, model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    from wordsight import catalog

    entry = catalog.Entry(name="named", config=CONFIG, num_parameters=0, paper="", summary="")
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, "named": entry})
    np.savez(tmp_path / "siglip.npz", **flax_tree(model))
    vocabulary().save(tmp_path)
    with pytest.warns(UserWarning, match="preprocessing"):
        assert wordsight.load(tmp_path / "siglip.npz", model="named").config.image.image_size_px == 20


def test_bfloat16_and_positions_added_twice(tmp_path: Path, model: SigLIP) -> None:
    tree = flax_tree(model)
    half = model.logit_bias.detach()[None].to(torch.bfloat16)
    tree["params/b"] = half.view(torch.int16).numpy().view("V2")
    tree["params/txt/Encoder_0/pos_embedding"] = np.full((1, LENGTH, 32), 0.25, np.float32)
    np.savez(tmp_path / "siglip.npz", **tree)
    vocabulary().save(tmp_path)
    with pytest.warns(UserWarning, match="preprocessing"):
        found = wordsight.load(tmp_path / "siglip.npz")
    assert found.logit_bias.item() == half.float().item()
    torch.testing.assert_close(found.text_tower.position_embedding, model.text_tower.position_embedding + 0.25)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/wordsight-pwned",)


def test_wrong_and_hostile_archives_are_named(tmp_path: Path, model: SigLIP) -> None:
    path, tree = tmp_path / "x.npz", flax_tree(model)

    def refused(says: str, change: dict[str, object], drop: str | None = None) -> None:
        np.savez(path, **{name: value for name, value in (tree | change).items() if name != drop})
        with pytest.raises(CheckpointError, match=says):
            wordsight.load(path)

    refused(r"has no tokenizer and 120 tokens", {})
    refused(r"has no params/b;", {}, drop="params/b")
    refused(
        r"holds what SigLIP does not have: params/img/head/kernel", {"params/img/head/kernel": np.zeros((32, 32), np.float32)}
    )
    refused(r"8 patches are no square", {"params/img/pos_embedding": np.zeros((1, 8, 32), np.float32)})
    refused(r"objects in it are never read", {"params/t": np.array([Evil()], dtype=object)})
    refused(r"a member of type int64", {"params/t": np.array([1])})
    refused(
        r"has no params/txt/Encoder_0/encoderblock_1/LayerNorm_0/scale",
        {},
        "params/txt/Encoder_0/encoderblock_1/LayerNorm_0/scale",
    )
    assert not Path("/tmp/wordsight-pwned").exists()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="no numpy archive"):
        wordsight.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(CheckpointError, match="no member under params/"):
        wordsight.load(path)
