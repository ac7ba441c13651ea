"""Adaptation: a frozen Embedder and few labels in, a classifier out, by scikit-learn's contract. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# method on the command line -> (module, class)
METHODS = {
    "zero_shot": ("wordsight.adapt.zero_shot", "ZeroShot"),
    "coop": ("wordsight.adapt.coop", "CoOp"),
    "cocoop": ("wordsight.adapt.cocoop", "CoCoOp"),
    "linear_probe": ("wordsight.adapt.linear_probe", "LinearProbe"),
    "tip_adapter": ("wordsight.adapt.tip_adapter", "TipAdapter"),
    "tip_adapter_f": ("wordsight.adapt.tip_adapter", "TipAdapterF"),
    "clip_adapter": ("wordsight.adapt.clip_adapter", "ClipAdapter"),
    "lp_plus_plus": ("wordsight.adapt.lp_plus_plus", "LPPlusPlus"),
    "clap": ("wordsight.adapt.clap", "CLAP"),
    "cross_modal_probe": ("wordsight.adapt.cross_modal", "CrossModalProbe"),
    "decoder": ("wordsight.adapt.decoder", "Decoder"),
    "projection": ("wordsight.adapt.projection", "Projection"),
    "fine_tune": ("wordsight.adapt.fine_tune", "FineTune"),
    "lift": ("wordsight.adapt.lift", "LIFT"),
}
_HOME = {name: module for module, name in METHODS.values()} | {
    "ImageFeatures": "wordsight.adapt.features",
    "image_features": "wordsight.adapt.features",
    "load_classifier": "wordsight.adapt.estimator",
    "TokenCache": "wordsight.adapt.token_cache",
    "cache_tokens": "wordsight.adapt.token_cache",
}
__all__ = sorted(_HOME)


def method_class(method: str) -> Any:
    """The estimator of that name.

    Raises:
        ValueError: there is none, with those that there are.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    module, name = METHODS[method]
    return getattr(import_module(module), name)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wordsight.adapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
