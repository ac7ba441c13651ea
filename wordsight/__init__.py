"""Wordsight: vision-language models, trained, adapted, judged and used.

The public names are imported on first use, so that `import wordsight` costs nothing beyond what is asked of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wordsight.adapt.estimator import load_classifier
    from wordsight.bundle import convert, create, load, save
    from wordsight.types import Batch, Metric, Sample, Term

_HOME = {
    "load": "wordsight.bundle",
    "create": "wordsight.bundle",
    "save": "wordsight.bundle",
    "convert": "wordsight.bundle",
    "load_classifier": "wordsight.adapt.estimator",
    "Batch": "wordsight.types",
    "Metric": "wordsight.types",
    "Sample": "wordsight.types",
    "Term": "wordsight.types",
}

__all__ = ["Batch", "Metric", "Sample", "Term", "__version__", "convert", "create", "load", "load_classifier", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wordsight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
