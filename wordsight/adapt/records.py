"""From the seeds' results to figures: means over seeds with intervals, the harmonic mean, records of results.json, the summary.

Shape legend: S seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from wordsight.adapt.costs import CARBON_G_PER_KWH, Cost, total, with_carbon
from wordsight.adapt.learn import Validation
from wordsight.adapt.protocol import harmonic_mean, mean_over_seeds


def best_seed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The seed that is best on its validation pictures, the first of equals."""
    best = results[0]
    for one in results[1:]:
        if Validation(**one["validation"]).better_than(Validation(**best["validation"])):
            best = one
    return best


def why_best(results: Sequence[dict[str, Any]], kept: Mapping[str, Any]) -> str:
    """Why that seed's classifier is kept, in a sentence."""
    if kept["validation"] is None:
        return "Zero-shot learns nothing from pictures: there was nothing to choose."
    found = Validation(**kept["validation"])
    right = f"it names {round(found.accuracy * found.count)} of {found.count} validation pictures rightly"
    if len(results) == 1:
        return f"There is one seed; {right}."
    others = ", ".join(f"{one['validation']['accuracy']:.1%}" for one in results if one is not kept)
    others += "; equals go by their loss"
    return f"Of {len(results)} seeds it is best on validation: {right} ({found.accuracy:.1%}; the others {others})."


def means(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each test's metrics averaged over seeds: {name, data, num_classes, metrics}; of one seed, its own figures.

    The interval is Student's t over seeds, which says what another draw of shots would change; of one seed it is the figure's
    own.
    """
    found = []
    for place, test in enumerate(results[0]["tests"]):
        metrics = {}
        for name, first in test["metrics"].items():
            values = [one["tests"][place]["metrics"][name]["value"] for one in results]
            metrics[name] = dict(first)
            if len(values) > 1:
                mean, ci95 = mean_over_seeds(values)
                metrics[name] |= {"value": mean, "ci95": list(ci95)}
        found.append({**test, "metrics": metrics})
    return found


def harmonic(averages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The harmonic mean of the top-1 accuracies on base and new classes.

    Its interval goes from the harmonic mean of both lower bounds to that of both upper ones: it grows with either, so that this
        holds
    the true value whenever both intervals do.
    """
    base, new = (one["metrics"]["top1"] for one in averages)
    return {
        "value": harmonic_mean(base["value"], new["value"]),
        "count": base["count"] + new["count"],
        "ci95": [harmonic_mean(base["ci95"][i], new["ci95"][i]) for i in (0, 1)],
        "chance": harmonic_mean(base["chance"], new["chance"]),
    }


def summarise(
    settings: Mapping[str, Any], results: Sequence[dict[str, Any]], features: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """summary.json: which seed is kept and why, figures over seeds, costs."""
    kept = best_seed(results)
    averages = means(results)
    seeds = [Cost(**one["cost"]) for one in results]
    shared = Cost(**{name: value for name, value in features.items() if name != "count"})
    return {
        "kept": {
            "seed": kept["seed"],
            "method": kept["method"],
            "validation": kept["validation"],
            "why": why_best(results, kept),
        },
        "chosen_by": chosen_by(settings, results),
        "tests": averages,
        "harmonic_mean": harmonic(averages) if settings["protocol"] == "base_to_new" else None,
        "costs": {
            "features": dict(features),
            "seeds": with_carbon(total(seeds)),
            "total": with_carbon(total([shared, *seeds])),
            "carbon_g_per_kwh": CARBON_G_PER_KWH,
        },
        "notes": list(notes),
    }


def chosen_by(settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """What a reader should know of how settings were chosen."""
    if settings["shots"] == 0:
        return "Nothing was chosen: zero-shot learns nothing. The test split's labels were read for these figures alone."
    what = "The method, its settings" if settings["method"] == "auto" else "Settings that a method searches"
    count = results[0]["validation"]["count"]
    return (
        f"{what} and the seed that is kept were chosen on {count} validation pictures a seed. The test split was not looked at "
        "for that: its labels were read afterwards, for these figures alone."
    )


def records(
    settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The figures as records of results.json: of each seed, then over seeds."""
    found = []
    for one in results:
        for test in one["tests"]:
            found += _of_test(settings, test, f"{_how(settings)}, seed {one['seed']}")
    seeds = ", ".join(str(one["seed"]) for one in results)
    over = f"{_how(settings)}, mean of seeds {seeds}, interval of Student's t over seeds"
    if len(results) > 1:
        for test in summary["tests"]:
            found += _of_test(settings, test, over)
    if summary["harmonic_mean"] is not None:
        how = over if len(results) > 1 else f"{_how(settings)}, seed {seeds}"
        test = {
            "name": "base and new",
            "data": summary["tests"][0]["data"],
            "metrics": {"harmonic_mean": summary["harmonic_mean"]},
        }
        found += _of_test(settings, test, f"{how}; of both mean accuracies")
    return found


def _how(settings: Mapping[str, Any]) -> str:
    parameters = settings["parameters"]
    own = f" ({', '.join(f'{key}={value}' for key, value in parameters.items())})" if parameters else ""
    if settings["shots"] == 0:
        return f"{settings['method']}{own}, no shots"
    shots = "all pictures" if settings["shots"] == "all" else f"{settings['shots']} shots a class"
    return f"{settings['method']}{own}, {shots}, chosen on validation pictures"


def _of_test(settings: Mapping[str, Any], test: Mapping[str, Any], protocol: str) -> list[dict[str, Any]]:
    identity = json.dumps([settings["identity"], settings["classes"], test["data"], test["name"], protocol], ensure_ascii=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return [
        {
            "task": settings["protocol"],
            "data": test["data"],
            "split": test["name"],
            "metric": name,
            **{key: metric[key] for key in ("value", "count", "ci95", "chance")},
            "protocol": protocol,
            "fingerprint": digest,
        }
        for name, metric in test["metrics"].items()
    ]
