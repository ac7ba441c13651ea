"""The catalogue: one literal table of every named model, its architecture, its size and its paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from wordsight.models.contrastive.align import ALIGN, ALIGNConfig
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.models.contrastive.lit import LiT, LiTConfig
from wordsight.models.contrastive.llip import Llip, LlipConfig
from wordsight.models.contrastive.siglip import SigLIP, SigLIPConfig
from wordsight.models.contrastive.unicl import UniCL, UniCLConfig
from wordsight.nn.bert import BertConfig
from wordsight.nn.convnet import ConvNetConfig
from wordsight.nn.efficientnet import EfficientNetConfig, efficientnet
from wordsight.nn.resnet import ResNetConfig
from wordsight.nn.text import SigLIPTextConfig, TextConfig
from wordsight.nn.vit import ViTConfig

# every system's name as it stands in a model folder, with its config and its class
SYSTEMS: dict[str, tuple[type, type]] = {
    "clip": (CLIPConfig, CLIP),
    "siglip": (SigLIPConfig, SigLIP),
    "align": (ALIGNConfig, ALIGN),
    "lit": (LiTConfig, LiT),
    "llip": (LlipConfig, Llip),
    "unicl": (UniCLConfig, UniCL),
}

CLIP_PAPER = "arXiv 2103.00020"
SIGLIP_PAPER = "arXiv 2303.15343"
LLIP_PAPER = "arXiv 2405.00740"
UNICL_PAPER = "arXiv 2204.03610"
ALIGN_PAPER = "arXiv 2102.05918"
LIT_PAPER = "arXiv 2111.07991"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One named model.

    Attributes:
        name: as `load`, `create` and the command line take it.
        config: its architecture.
        num_parameters: of the whole model.
        paper: where it is from.
        summary: one line for a list.
    """

    name: str
    config: Any
    num_parameters: int
    paper: str
    summary: str


def _vit(patch: int, width: int, layers: int, image_size: int, embed_dim: int, text_width: int) -> CLIPConfig:
    """A published CLIP with a vision transformer: a head per 64 of width in both towers."""
    return CLIPConfig(
        embed_dim=embed_dim,
        image=ViTConfig(image_size_px=image_size, patch_size_px=patch, width=width, num_layers=layers, num_heads=width // 64),
        text=TextConfig(width=text_width, num_heads=text_width // 64),
    )


def _resnet(layers: tuple[int, int, int, int], width: int, image_size: int, embed_dim: int, text_width: int) -> CLIPConfig:
    """A published CLIP with a modified ResNet: a head per 64 of the last map's 32 * width channels."""
    return CLIPConfig(
        embed_dim=embed_dim,
        image=ResNetConfig(image_size_px=image_size, layers=layers, width=width, num_heads=width * 32 // 64),
        text=TextConfig(width=text_width, num_heads=text_width // 64),
    )


# (name, config, parameters): arXiv 2103.00020, tables 19 and 20
_PUBLISHED = (
    ("RN50", _resnet((3, 4, 6, 3), 64, 224, 1024, 512), 102_007_137),
    ("RN101", _resnet((3, 4, 23, 3), 64, 224, 512, 512), 119_688_033),
    ("RN50x4", _resnet((4, 6, 10, 6), 80, 288, 640, 640), 178_300_601),
    ("RN50x16", _resnet((6, 8, 18, 8), 96, 384, 768, 768), 290_979_217),
    ("RN50x64", _resnet((3, 15, 36, 10), 128, 448, 1024, 1024), 623_258_305),
    ("ViT-B/32", _vit(32, 768, 12, 224, 512, 512), 151_277_313),
    ("ViT-B/16", _vit(16, 768, 12, 224, 512, 512), 149_620_737),
    ("ViT-L/14", _vit(14, 1024, 24, 224, 768, 768), 427_616_513),
    ("ViT-L/14@336", _vit(14, 1024, 24, 336, 768, 768), 427_944_193),
)

_TINY_TEXT = TextConfig(context_length=32, width=32, num_layers=2, num_heads=2)
_OWN = (
    Entry(
        name="clip-quickstart",
        config=CLIPConfig(
            embed_dim=256,
            image=ConvNetConfig(),
            text=TextConfig(vocab_size=4096, context_length=20, width=128, num_layers=1, num_heads=4),
            init_log_scale=3.2,
            duplicates="multi_positive",
        ),
        num_parameters=1_683_713,
        paper=CLIP_PAPER,
        summary="the quickstart's: compact CNN at 32 px, 1 text layer",
    ),
    Entry(
        name="clip-tiny",
        config=CLIPConfig(
            embed_dim=512,
            image=ViTConfig(image_size_px=32, patch_size_px=8, width=32, num_layers=2, num_heads=2),
            text=_TINY_TEXT,
        ),
        num_parameters=1_672_577,
        paper=CLIP_PAPER,
        summary="for tests: both towers 2 layers of 32",
    ),
    Entry(
        name="clip-tiny-resnet",
        config=CLIPConfig(
            embed_dim=512,
            image=ResNetConfig(image_size_px=64, layers=(1, 1, 1, 1), width=8, num_heads=4),
            text=_TINY_TEXT,
        ),
        num_parameters=2_081_949,
        paper=CLIP_PAPER,
        summary="for tests: one bottleneck a stage, text 2 layers of 32",
    ),
)

_TINY_BERT = BertConfig(vocab_size=256, context_length=16, width=32, num_layers=2, num_heads=2)
_TINY_EFFICIENTNET = EfficientNetConfig(
    image_size_px=32,
    width_factor=0.25,
    channels=(16, 48, 96),
    repeats=(1, 2, 2),
    kernel_sizes=(3, 5, 3),
    strides=(1, 2, 2),
    expansions=(1, 4, 4),
    head_channels=None,
    drop_connect=0.0,
    project=False,
)
# what the weights of all-MiniLM-L6-v2 are of; 32 tokens are room for any name and most captions
_MINILM = BertConfig(context_length=32, width=384, num_layers=6, num_heads=12, pool="mean", project=False)
_ALIGN = (
    Entry(
        name="align",
        config=ALIGNConfig(
            embed_dim=1376,
            image=replace(efficientnet("l2"), image_size_px=289, head_channels=None, project=False),
            text=BertConfig(context_length=64, width=1024, num_layers=24, num_heads=16),
        ),
        num_parameters=802_263_733,
        paper=ALIGN_PAPER,
        summary="the paper's: EfficientNet-L2 and BERT-Large",
    ),
    Entry(
        name="align-base",
        config=ALIGNConfig(
            embed_dim=640,
            image=replace(efficientnet("b7"), image_size_px=289, head_channels=None, project=False, padding="even"),
            text=BertConfig(),
        ),
        num_parameters=171_527_249,
        paper=ALIGN_PAPER,
        summary="transformers' AlignModel: EfficientNet-B7 and BERT-Base",
    ),
    Entry(
        name="align-small",
        config=ALIGNConfig(
            embed_dim=256,
            image=replace(
                efficientnet("b0"), image_size_px=48, width_factor=0.5, depth_factor=0.5, head_channels=512, drop_connect=0.0
            ),
            text=BertConfig(vocab_size=4096, context_length=24, width=128, num_layers=2, num_heads=4),
            init_temperature=0.07,
            duplicates="multi_positive",
        ),
        num_parameters=1_617_889,
        paper=ALIGN_PAPER,
        summary="for the embedded pictures: half of EfficientNet-B0 at 48 px, 2 text layers",
    ),
    Entry(
        name="align-tiny",
        config=ALIGNConfig(embed_dim=24, image=_TINY_EFFICIENTNET, text=_TINY_BERT, init_temperature=0.07),
        num_parameters=53_059,
        paper=ALIGN_PAPER,
        summary="for tests: EfficientNet of 5 blocks, BERT of 2 layers of 32",
    ),
)
_LIT = (
    Entry(
        name="lit-lite0-minilm",
        config=LiTConfig(
            embed_dim=256,
            image=replace(efficientnet("lite0"), image_size_px=128, project=False),
            text=_MINILM,
            lock_text=True,
            image_head="normed",
            text_head="linear",
            head_dropout=0.3,
            cache_rows=65_536,
            init_log_scale=3.0,
            duplicates="multi_positive",
        ),
        num_parameters=26_181_121,
        paper=LIT_PAPER,
        summary="EfficientNet-Lite0 and MiniLM, both locked, with linear heads",
    ),
    Entry(
        name="lit-tiny",
        config=LiTConfig(
            embed_dim=24, image=_TINY_EFFICIENTNET, text=replace(_TINY_BERT, pool="mean", project=False), init_log_scale=2.66
        ),
        num_parameters=53_059,
        paper=LIT_PAPER,
        summary="for tests: locked EfficientNet of 5 blocks, BERT of 2 layers of 32",
    ),
)

_QUICKSTART_TEXT = TextConfig(vocab_size=4096, context_length=20, width=128, num_layers=1, num_heads=4)
_LLIP = (
    Entry(
        name="llip-ViT-B/16-k32",
        config=LlipConfig(
            embed_dim=512, image=ViTConfig(patch_size_px=16), text=TextConfig(), num_tokens=32, num_heads=8, temperature=5.0
        ),
        num_parameters=174_965_250,
        paper=LLIP_PAPER,
        summary="the paper's: 32 mixture tokens of 8 heads",
    ),
    Entry(
        name="llip-ViT-G/14-k64",
        config=LlipConfig(
            embed_dim=1280,
            image=ViTConfig(patch_size_px=14, width=1664, num_layers=48, num_heads=16, mlp_ratio=4.9231),
            text=TextConfig(width=1280, num_layers=32, num_heads=20),
            num_tokens=64,
            num_heads=8,
            temperature=5.0,
            mixture_norm=True,
        ),
        num_parameters=2_813_561_090,
        paper=LLIP_PAPER,
        summary="the paper's: 64 mixture tokens of 8 heads, normed",
    ),
    Entry(
        name="llip-quickstart",
        config=LlipConfig(
            embed_dim=256,
            image=ConvNetConfig(),
            text=_QUICKSTART_TEXT,
            num_tokens=8,
            num_heads=4,
            init_bias=-6.0,  # of 256 texts one is right: odds of exp(-5.5)
            duplicates="multi_positive",
        ),
        num_parameters=1_782_146,
        paper=LLIP_PAPER,
        summary="the quickstart's towers, 8 tokens from the map",
    ),
    Entry(
        name="llip-tiny",
        config=LlipConfig(
            embed_dim=64,
            image=ViTConfig(image_size_px=32, patch_size_px=8, width=32, num_layers=2, num_heads=2),
            text=TextConfig(vocab_size=512, context_length=32, width=32, num_layers=2, num_heads=2),
            num_tokens=4,
            num_heads=2,
        ),
        num_parameters=99_906,
        paper=LLIP_PAPER,
        summary="for tests: 4 mixture tokens, both towers 2 layers of 32",
    ),
)
_UNICL = (
    Entry(
        name="unicl-quickstart",
        config=UniCLConfig(embed_dim=256, image=ConvNetConfig(), text=_QUICKSTART_TEXT, init_log_scale=3.2),
        num_parameters=1_683_713,
        paper=UNICL_PAPER,
        summary="the quickstart's towers; texts of a picture's class are right for it",
    ),
    Entry(
        name="unicl-tiny",
        config=UniCLConfig(
            embed_dim=64,
            image=ViTConfig(image_size_px=32, patch_size_px=8, width=32, num_layers=2, num_heads=2),
            text=TextConfig(vocab_size=512, context_length=32, width=32, num_layers=2, num_heads=2),
        ),
        num_parameters=79_233,
        paper=UNICL_PAPER,
        summary="for tests: both towers 2 layers of 32",
    ),
)


def _siglip(patch: int, width: int, layers: int, heads: int, mlp_width: int, image_size: int) -> SigLIPConfig:
    """A published SigLIP: both towers of one size, 32,000 tokens."""
    size: dict[str, Any] = {
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_ratio": mlp_width / width,
        "norm_eps": 1e-6,
    }
    return SigLIPConfig(
        embed_dim=width,
        image=ViTConfig(
            image_size_px=image_size, patch_size_px=patch, patch_bias=True, norm_pre=False, pool="map", project=False, **size
        ),
        text=SigLIPTextConfig(**size),
    )


_B, _L, _SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
_SIGLIP = (
    *(
        Entry(name=name, config=config, num_parameters=size, paper=SIGLIP_PAPER, summary="published SigLIP")
        for name, config, size in (
            ("ViT-B/16-SigLIP", _siglip(16, *_B, 224), 203_155_970),
            ("ViT-B/16-SigLIP-256", _siglip(16, *_B, 256), 203_202_050),
            ("ViT-B/16-SigLIP-384", _siglip(16, *_B, 384), 203_447_810),
            ("ViT-B/16-SigLIP-512", _siglip(16, *_B, 512), 203_791_874),
            ("ViT-L/16-SigLIP-256", _siglip(16, *_L, 256), 652_150_786),
            ("ViT-L/16-SigLIP-384", _siglip(16, *_L, 384), 652_478_466),
            ("SO400M/14-SigLIP", _siglip(14, *_SO400M, 224), 877_415_602),
            ("SO400M/14-SigLIP-384", _siglip(14, *_SO400M, 384), 877_960_498),
        )
    ),
    Entry(
        name="siglip-quickstart",
        config=SigLIPConfig(
            embed_dim=256,
            image=ConvNetConfig(),
            text=TextConfig(vocab_size=4096, context_length=20, width=128, num_layers=1, num_heads=4),
            activation="quick_gelu",
            duplicates="multi_positive",
        ),
        num_parameters=1_683_714,
        paper=SIGLIP_PAPER,
        summary="the quickstart's towers with the sigmoid loss",
    ),
    Entry(
        name="siglip-tiny",
        config=SigLIPConfig(
            embed_dim=64,
            image=ViTConfig(
                image_size_px=32,
                patch_size_px=8,
                width=64,
                num_layers=2,
                num_heads=2,
                patch_bias=True,
                norm_pre=False,
                norm_eps=1e-6,
                pool="map",
                project=False,
            ),
            text=SigLIPTextConfig(vocab_size=1024, context_length=16, width=64, num_layers=2, num_heads=2),
        ),
        num_parameters=334_210,
        paper=SIGLIP_PAPER,
        summary="for tests: both towers 2 layers of 64",
    ),
)

CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *(
            Entry(name=name, config=config, num_parameters=size, paper=CLIP_PAPER, summary="published CLIP, QuickGELU")
            for name, config, size in _PUBLISHED
        ),
        *(
            Entry(
                name=f"{name}-gelu",
                config=replace(config, activation="gelu"),
                num_parameters=size,
                paper=CLIP_PAPER,
                summary="the same with GELU (weights trained by open_clip)",
            )
            for name, config, size in _PUBLISHED
        ),
        *_OWN,
        *_SIGLIP,
        *_ALIGN,
        *_LIT,
        *_LLIP,
        *_UNICL,
    )
}


def system_name(config: Any) -> str:
    """The name of the system that a config is of: "clip".

    Raises:
        ValueError: it is no system's config.
    """
    for name, (kind, _) in SYSTEMS.items():
        if type(config) is kind:
            return name
    raise ValueError(
        f"{type(config).__name__} is no system's config; known are {', '.join(c.__name__ for c, _ in SYSTEMS.values())}"
    )


def system_class(config: Any) -> Any:
    """The class whose constructor takes this config."""
    return SYSTEMS[system_name(config)][1]


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    if name in CATALOG:
        return CATALOG[name]
    by_folded = {known.casefold(): known for known in CATALOG}
    near = [by_folded[match] for match in get_close_matches(name.casefold(), list(by_folded), n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(CATALOG)}"
    raise ValueError(f"no model is called {name!r}; {hint} (`wordsight models` lists all)")
