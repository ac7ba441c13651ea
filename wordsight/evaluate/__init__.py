"""Judging a model by what it can do: zero-shot classification, retrieval, results and the report. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wordsight.evaluate.corruption_error import Corruptions
    from wordsight.evaluate.embedding import Embedded, embed_source
    from wordsight.evaluate.examples import write_examples
    from wordsight.evaluate.few_shot_curve import FewShotCurve
    from wordsight.evaluate.groups import Geography, GroupAccuracy, GroupTable
    from wordsight.evaluate.multi_label import MultiLabel
    from wordsight.evaluate.probing import KNN, LinearProbe, NearestMean, Ridge
    from wordsight.evaluate.prompt_sets import PromptSet, prompt_set
    from wordsight.evaluate.prompt_study import PromptStudy
    from wordsight.evaluate.prompts import class_embeddings, prompt_templates
    from wordsight.evaluate.report import write_report
    from wordsight.evaluate.results import Judgement, name_data, write_results
    from wordsight.evaluate.retrieval import Retrieval
    from wordsight.evaluate.robustness import NaturalShifts, robustness_items
    from wordsight.evaluate.suite import Candidate, SuiteItem, run_suite
    from wordsight.evaluate.vendor_shift import VendorShift
    from wordsight.evaluate.zero_shot import ZeroShot

_HOMES = {
    "Candidate": "suite",
    "Corruptions": "corruption_error",
    "Embedded": "embedding",
    "FewShotCurve": "few_shot_curve",
    "Geography": "groups",
    "GroupAccuracy": "groups",
    "GroupTable": "groups",
    "Judgement": "results",
    "KNN": "probing",
    "LinearProbe": "probing",
    "MultiLabel": "multi_label",
    "NaturalShifts": "robustness",
    "NearestMean": "probing",
    "PromptSet": "prompt_sets",
    "PromptStudy": "prompt_study",
    "Retrieval": "retrieval",
    "Ridge": "probing",
    "SuiteItem": "suite",
    "VendorShift": "vendor_shift",
    "ZeroShot": "zero_shot",
    "class_embeddings": "prompts",
    "embed_source": "embedding",
    "name_data": "results",
    "prompt_set": "prompt_sets",
    "prompt_templates": "prompts",
    "robustness_items": "robustness",
    "run_suite": "suite",
    "write_examples": "examples",
    "write_report": "report",
    "write_results": "results",
}

__all__ = [
    "KNN",
    "Candidate",
    "Corruptions",
    "Embedded",
    "FewShotCurve",
    "Geography",
    "GroupAccuracy",
    "GroupTable",
    "Judgement",
    "LinearProbe",
    "MultiLabel",
    "NaturalShifts",
    "NearestMean",
    "PromptSet",
    "PromptStudy",
    "Retrieval",
    "Ridge",
    "SuiteItem",
    "VendorShift",
    "ZeroShot",
    "class_embeddings",
    "embed_source",
    "name_data",
    "prompt_set",
    "prompt_templates",
    "robustness_items",
    "run_suite",
    "write_examples",
    "write_report",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"wordsight.evaluate.{_HOMES[name]}"), name)
