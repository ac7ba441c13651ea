"""From files to batches: sources, decoding, transforms, tokenizers, loading. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wordsight.data.errors import BadReport, BadSampleError, TooManyBadSamplesError
    from wordsight.data.loader import Loader
    from wordsight.data.reader import Read, iterate
    from wordsight.data.remote import RemoteConfig
    from wordsight.data.sources import DataSource, Source, open_source

_HOMES = {
    "BadReport": "errors",
    "BadSampleError": "errors",
    "DataSource": "sources",
    "Loader": "loader",
    "Read": "reader",
    "RemoteConfig": "remote",
    "Source": "sources",
    "TooManyBadSamplesError": "errors",
    "iterate": "reader",
    "open_source": "sources",
}

__all__ = [
    "BadReport",
    "BadSampleError",
    "DataSource",
    "Loader",
    "Read",
    "RemoteConfig",
    "Source",
    "TooManyBadSamplesError",
    "iterate",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"wordsight.data.{_HOMES[name]}"), name)
