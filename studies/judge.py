"""The judge: the quickstart's CLIP, LiT and a random model through all suites that need no data: `python -m studies.judge`.

The suites `quick`, `failures` and `robustness` on what is embedded; with CIFAR-10's archive zero-shot, a linear probe, ridge,
neighbours, class means and few-shot probes on real photographs (500 training pictures a class, 5,000 test pictures). The random
model is the quickstart's architecture with weights that nothing was learned into. What is done is not repeated. It writes
docs/studies/judge.json and the tables of docs/studies/judge.md; what the page says beyond them is by hand.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import wordsight
from studies.few_labels import cifar
from studies.pages import put_tables
from wordsight.evaluate.compare import Comparison, compare, read_runs
from wordsight.evaluate.compare_report import render_markdown, write_comparison
from wordsight.evaluate.few_shot_curve import FewShotCurve
from wordsight.evaluate.kept import Kept
from wordsight.evaluate.probing import KNN, LinearProbe, NearestMean, Ridge
from wordsight.evaluate.suite import Candidate, SuiteItem, run_suite
from wordsight.evaluate.suites import failures, quick, robustness
from wordsight.evaluate.zero_shot import ZeroShot

TRAIN_A_CLASS = 500
DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "studies" / "judge.md"


def items(root: Path) -> list[SuiteItem]:
    """All that is measured; `failures` has the modes of `quick` with twice the items."""
    found = {item.name: item for item in (*quick(root), *failures(root), *robustness(root)) if not item.missing}
    train, test = root / "cifar10-train.csv", root / "cifar10-test.csv"
    if not train.exists():
        return list(found.values())
    parts: Mapping[str, Path] = {"train": train, "test": test}
    probes: dict[str, Any] = {
        "linear-probe": LinearProbe(),
        "ridge": Ridge(),
        "knn": KNN(),
        "nearest-mean": NearestMean(),
        "few-shot-curve": FewShotCurve(prompts="cifar10"),
    }
    return [
        *found.values(),
        SuiteItem(name="cifar10-zero-shot", evaluator=ZeroShot(prompts="cifar10"), data=test, dataset="CIFAR-10", split="test"),
        *(
            SuiteItem(name=f"cifar10-{name}", evaluator=one, data=parts, dataset="CIFAR-10", split="test")
            for name, one in probes.items()
        ),
    ]


def lay_out_cifar(archive: Path, root: Path) -> None:
    """CIFAR-10's test pictures, and the first TRAIN_A_CLASS training pictures of each class, as two tables."""
    splits = cifar(archive, root)
    for part, most in (("train", TRAIN_A_CLASS), ("test", None)):
        top = next(path for path in sorted(root.rglob(part)) if path.is_dir())
        with open(root / f"cifar10-{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "label"))
            for name in splits.classes:
                for path in sorted((top / name).iterdir())[:most]:
                    writer.writerow((path.relative_to(root), name))


def untaught(model: Any) -> Any:
    """A model of the same architecture, tokenizer and preprocessing with random weights."""
    torch.manual_seed(0)
    found = type(model)(copy.deepcopy(model.config))
    found.tokenizer, found.preprocessor, found.provenance = model.tokenizer, model.preprocessor, {"source": "random weights"}
    return found.eval()


def compared(root: Path) -> tuple[Comparison, Mapping[str, Mapping[str, Kept]]]:
    """What the runs have found, tested against the quickstart's model, and each model's measurements by name."""
    runs = read_runs([root / "runs"])
    found = compare(runs, baseline="quickstart")
    write_comparison(root / "runs", found)
    return found, {run.name: {kept.item: kept for kept in run.measured} for run in runs}


def details(by_model: Mapping[str, Mapping[str, Kept]]) -> str:
    """Tables within findings: the corruptions, drawings seen and unseen, the few-shot curve."""
    parts = []
    for name in ("corruptions-sample", "vendor-shift", "cifar10-few-shot-curve"):
        for model, kept in by_model.items():
            if name in kept and (model != "random" or name == "cifar10-few-shot-curve"):  # at chance, in the table above
                rows = kept[name].table
                head = [key for key in rows[0] if not (name == "corruptions-sample" and key.endswith("ci95"))]
                lines = [head, ["---"] * len(head), *[[_shown(row[key]) for key in head] for row in rows]]
                parts.append(f"**{name}, {model}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
                parts += [f"- {note}" for note in kept[name].notes]
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " – ".join(map(_shown, value))
    return "–" if value is None else str(value)


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lit", default="runs/lit", help="a run of `wordsight train lit`")
    parser.add_argument("--quickstart", default="runs/quickstart", help="a run of `wordsight quickstart`")
    parser.add_argument("--cifar10", type=Path, help="an archive of train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/judge"), help="where runs and features are")
    parser.add_argument("--threads", type=int, help="threads of this process (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.cifar10 is not None:
        lay_out_cifar(options.cifar10, options.folder)
    loaders: dict[str, Callable[[], Any]] = {
        "quickstart": lambda: wordsight.load(options.quickstart),
        "lit": lambda: wordsight.load(options.lit),
        "random": lambda: untaught(wordsight.load(options.quickstart)),
    }
    outcome = run_suite(
        items(options.folder),
        [Candidate(name=name, load=load) for name, load in loaders.items()],
        options.folder / "runs",
        cache=options.folder / "features",
        say=lambda text: print(text, flush=True),
    )
    for model, item, error in outcome.failed:
        print(f"{model}, {item} failed: {error}")
    comparison, by_model = compared(options.folder)
    records = {name: [record for kept in all_of.values() for record in kept.records()] for name, all_of in by_model.items()}
    put_tables(PAGE, "The judge", f"{render_markdown(comparison)}\n{details(by_model)}", records)


if __name__ == "__main__":
    main()
