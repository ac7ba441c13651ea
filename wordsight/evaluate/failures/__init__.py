"""Tests of what CLIP is known to fail at, made from a seed with exact labels; and the published ones, read from disk.

`generated` is the door of a suite. Imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wordsight.evaluate.failures.attributes import Binding
    from wordsight.evaluate.failures.counting import Counting
    from wordsight.evaluate.failures.items import FailureMode, Item, judge_items
    from wordsight.evaluate.failures.order import Negation, WordOrder
    from wordsight.evaluate.failures.readers import READERS, Published, PublishedTest, published
    from wordsight.evaluate.failures.senses import Polysemy
    from wordsight.evaluate.failures.sheet import contact_sheet
    from wordsight.evaluate.failures.space import SizeDistance, Spatial
    from wordsight.evaluate.failures.writing import Objects, Reading, Typographic

# name -> file; the modes in the order in which a suite runs them
_MODES = {
    "Objects": "writing",
    "Counting": "counting",
    "Spatial": "space",
    "SizeDistance": "space",
    "Binding": "attributes",
    "WordOrder": "order",
    "Negation": "order",
    "Polysemy": "senses",
    "Reading": "writing",
    "Typographic": "writing",
}
_HOMES = _MODES | {
    "FailureMode": "items",
    "Item": "items",
    "Published": "readers",
    "PublishedTest": "readers",
    "READERS": "readers",
    "contact_sheet": "sheet",
    "judge_items": "items",
    "published": "readers",
}

__all__ = [
    "READERS",
    "Binding",
    "Counting",
    "FailureMode",
    "Item",
    "Negation",
    "Objects",
    "Polysemy",
    "Published",
    "PublishedTest",
    "Reading",
    "SizeDistance",
    "Spatial",
    "Typographic",
    "WordOrder",
    "contact_sheet",
    "generated",
    "judge_items",
    "published",
]


def generated(num: int = 200, seed: int = 0) -> list[FailureMode]:
    """All generated modes, `num` items each; the first is no failure but the control: two objects told apart by name.

    Each has `.name`, `.run(model) -> dict[str, Metric]` and `.judge(model, batch_size=64, progress=False) -> Finding`.

    Raises:
        ValueError: `num` below 1.
    """
    return [_get(name)(num=num, seed=seed) for name in _MODES]


def _get(name: str) -> Any:
    return getattr(import_module(f"wordsight.evaluate.failures.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _get(name)
