"""The papers' studies as requests: they run as they stand, but for their length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import recipes
from wordsight.adapt.pictures import open_data
from wordsight.adapt.run import adapt


@pytest.mark.parametrize("study", ["coop_context_length", "coop_robustness", "base_to_new"])
def test_a_study_runs_to_its_figures(study: str, tmp_path: Path) -> None:
    model = wordsight.create("clip-tiny")
    folder = colour_folders(tmp_path / "data", {"train": 2, "val": 2, "test": 2})
    shifted = colour_folders(tmp_path / "shifted", {"test": 2}) / "test"
    requests = getattr(recipes, study)(shots=1)
    lengths = set()
    for name, request in requests.items():
        assert request.seeds == ((1,) if name == "zero_shot" else (1, 2, 3))
        short = {} if name == "zero_shot" else {"epochs": 1}
        others = [open_data(str(shifted))] if request.protocol == "domain" else []
        short_request = replace(request, seeds=(1,), parameters={**request.parameters, **short})
        summary = adapt(model, open_data(str(folder)), tmp_path / name, short_request, others=others)
        assert len(summary["tests"]) == {"few_shot": 1, "domain": 2, "base_to_new": 2}[request.protocol]
        assert (summary["harmonic_mean"] is not None) == (request.protocol == "base_to_new")
        if request.method != "zero_shot":
            settings = json.loads((tmp_path / name / "classifier" / "classifier.json").read_text())["settings"]
            lengths.add(settings["num_context_tokens"])
    assert lengths == {"coop_context_length": {4, 8, 16}, "coop_robustness": {4, 16}, "base_to_new": {4}}[study]
