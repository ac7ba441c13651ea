"""Few labels: every adaptation method on frozen models, three seeds, by shots: `python -m studies.few_labels`.

- CIFAR-10 (half of its test set) with the LiT of frozen EfficientNet-Lite0 and MiniLM: 1, 2, 4, 8 and 16 shots.
- Emoji that the quickstart's CLIP never saw in any drawing, learned from Noto and Fluent (1 or 2 shots) and judged on Twemoji, a
  drawing that it never saw either: new classes and a shifted domain at once. Base-to-new on the same: shots of the first half of
  the names.
- CoOp's context: its length and place on CIFAR-10, and on emoji learned from Noto alone, judged on another drawing.

All methods get the same features of the fixed view, and choose their settings on validation shots where there are any. Cells that
are done are not repeated. It writes docs/studies/few_labels.json, the tables of docs/studies/few_labels.md and the plot
docs/pictures/few_labels.svg; what the page says beyond them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wordsight
from studies.pages import T_OF_THREE, put_tables
from wordsight.adapt import METHODS, image_features, method_class
from wordsight.adapt.features import ImageFeatures, Layer
from wordsight.data import open_source
from wordsight.data.few_shot import LabelledSet, Splits, base_to_new, few_shot, label_source

SEEDS = (1, 2, 3)
CIFAR_SHOTS = (1, 2, 4, 8, 16)
EMOJI_SHOTS = (1, 2)
CONTEXT_SHOTS = 4
CONTEXTS = (("end", 1), ("end", 4), ("end", 16), ("middle", 16), ("front", 16))  # where the class name stands, and M
SHIFT_LENGTHS = (1, 4, 8)
PROJECTED = "linear_probe_projected"
LEARNED = (*(method for method in METHODS if method not in ("zero_shot", "decoder")), PROJECTED)
PROMPT_METHODS = ("coop", "cocoop")
DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "studies" / "few_labels.md", DOCS / "pictures" / "few_labels.svg"


class Work:
    """What has been measured, a file a cell, so that several processes may share the work; and features, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cells").mkdir(parents=True, exist_ok=True)

    def cells(self) -> dict[str, dict[str, float]]:
        """All figures by the cell's name."""
        found = (json.loads(path.read_text()) for path in sorted((self.folder / "cells").glob("*.json")))
        return {cell.pop("cell"): cell for cell in found}

    def cell(self, name: str, measure: Callable[[], dict[str, float]]) -> None:
        """Measure what is not there yet."""
        path = self.folder / "cells" / f"{name.replace('/', '-').replace(' ', '_')}.json"
        if path.exists():
            return
        start = time.process_time()
        found = measure()
        found["seconds"] = time.process_time() - start
        print(name, {key: round(value, 4) for key, value in found.items()}, flush=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"cell": name} | found, indent=1) + "\n")
        temporary.replace(path)

    def features(self, model: Any, pictures: LabelledSet, layer: Layer = "projected") -> ImageFeatures:
        """Those of the fixed view."""
        samples = [pictures.source[i] for i in range(len(pictures))]
        return image_features(model, samples, layer=layer, cache=self.folder / "features", progress=True)


def make(method: str, model: Any, classes: tuple[str, ...], seed: int, **settings: Any) -> Any:
    """The estimator with its own settings; "linear_probe_projected" is CoOp's probe, on the features that all others get."""
    if method == PROJECTED:
        method, settings = "linear_probe", {"layer": "projected", "search": "coop"}
    return method_class(method)(model, classes=list(classes), seed=seed, **settings)


def make_short(method: str, model: Any, classes: tuple[str, ...], seed: int) -> Any:
    """The same for a model whose texts have 20 tokens: names of up to 9 leave no room for CoOp's 16 of context."""
    settings = {"num_context_tokens": 4} if method == "coop" else {}
    return make(method, model, classes, seed, **settings)


def accuracy(classifier: Any, features: ImageFeatures, pictures: LabelledSet) -> float:
    """The share of test pictures that are named rightly."""
    return float(np.mean(classifier.predict(features) == np.array(pictures.labels)))


def fitted(work: Work, classifier: Any, model: Any, drawn: Splits) -> Any:
    """The classifier, fitted to the shots, choosing on the validation shots."""
    assert drawn.train is not None
    layer = classifier.layer
    validation = None if drawn.val is None else (work.features(model, drawn.val, layer), np.array(drawn.val.labels))
    return classifier.fit(work.features(model, drawn.train, layer), np.array(drawn.train.labels), validation=validation)


def judged(work: Work, classifier: Any, model: Any, drawn: Splits) -> dict[str, float]:
    """The accuracy on the test split of a classifier fitted to the shots.

    CoCoOp, which encodes all prompts for each picture, is asked every fifth one of a large split.
    """
    assert drawn.test is not None
    fitted(work, classifier, model, drawn)
    test = drawn.test
    features = work.features(model, test, classifier.layer)
    if type(classifier).__name__ == "CoCoOp" and len(test) > 1000:
        rows = range(0, len(test), 5)
        test, features = test.select(rows), features.take(rows)
    return {"accuracy": accuracy(classifier, features, test)}


def cifar(archive: Path, folder: Path) -> Splits:
    """CIFAR-10 from its archive of class folders."""
    root = folder / "cifar10"
    if not root.exists():
        partial = folder / "cifar10.partial"
        with zipfile.ZipFile(archive) as file:
            file.extractall(partial)
        partial.rename(root)
    top = root if (root / "train").exists() else next(path.parent for path in sorted(root.rglob("train")))
    train, test = (label_source(open_source(top / part)) for part in ("train", "test"))
    return Splits(name="CIFAR-10", classes=train.classes, train=train, test=test)


def emoji(train: list[str], test: str) -> Splits:
    """Emoji of names that were held out of all training, in some drawings to learn from and one to be judged by."""
    asked = label_source(open_source(f"sample:{test}"))
    shown = label_source(open_source([f"sample:{name}" for name in train]))
    common = tuple(sorted(set(asked.classes) & set(shown.classes)))
    return Splits(name="emoji", classes=common, train=shown.only(common), test=asked.only(common))


def study_cifar(work: Work, lit: Any, data: Splits, methods: list[str]) -> None:
    """Every method by shots."""
    assert data.test is not None
    test = work.features(lit, data.test)
    work.cell(
        "cifar/zero_shot/0/1", lambda: {"accuracy": accuracy(make("zero_shot", lit, data.classes, 0).fit(), test, data.test)}
    )
    for shots in CIFAR_SHOTS:
        for seed in SEEDS:
            drawn = few_shot(data, shots, seed=seed)
            for method in methods:
                work.cell(
                    f"cifar/{method}/{shots}/{seed}",
                    lambda m=method, s=seed, d=drawn: judged(work, make(m, lit, data.classes, s), lit, d),
                )


def study_emoji(work: Work, clip: Any, methods: list[str]) -> None:
    """New names in a new drawing, by shots; and base-to-new for what carries over to other names."""
    data = emoji(["unseen-noto", "unseen-fluent"], "test-twemoji-unseen")
    assert data.test is not None
    test = work.features(clip, data.test)
    work.cell(
        "emoji/zero_shot/0/1", lambda: {"accuracy": accuracy(make("zero_shot", clip, data.classes, 0).fit(), test, data.test)}
    )
    for shots in EMOJI_SHOTS:
        for seed in SEEDS:
            drawn = few_shot(data, shots, seed=seed, num_val_shots=1 if shots == 1 else 0, allow_fewer=True)
            for method in methods:
                work.cell(
                    f"emoji/{method}/{shots}/{seed}",
                    lambda m=method, s=seed, d=drawn: judged(work, make_short(m, clip, data.classes, s), clip, d),
                )
    base, new = base_to_new(data)
    assert base.test is not None
    assert new.test is not None
    of_base, of_new = work.features(clip, base.test), work.features(clip, new.test)

    def carried(method: str, seed: int) -> dict[str, float]:
        if method == "zero_shot":
            on_base, on_new = (make(method, clip, half.classes, 0).fit() for half in (base, new))
        else:
            drawn = few_shot(base, 2, seed=seed, num_val_shots=0, allow_fewer=True)
            on_base = fitted(work, make_short(method, clip, base.classes, seed), clip, drawn)
            on_new = on_base.with_classes(list(new.classes))
        found = {"base": accuracy(on_base, of_base, base.test), "new": accuracy(on_new, of_new, new.test)}
        return found | {"harmonic": statistics.harmonic_mean(found.values())}

    work.cell("base_to_new/zero_shot/0/1", lambda: carried("zero_shot", 0))
    for seed in SEEDS:
        for method in PROMPT_METHODS:
            work.cell(f"base_to_new/{method}/2/{seed}", lambda m=method, s=seed: carried(m, s))


def study_context(work: Work, lit: Any, data: Splits, clip: Any) -> None:
    """CoOp's length and place of context, in the domain and out of it."""
    noto = emoji(["unseen-noto"], "test-twemoji-unseen")
    for seed in SEEDS:
        drawn = few_shot(data, CONTEXT_SHOTS, seed=seed)
        for place, length in CONTEXTS:
            settings = {"num_context_tokens": length, "position": place}
            work.cell(
                f"context/{place} {length}/{CONTEXT_SHOTS}/{seed}",
                lambda s=seed, d=drawn, o=settings: judged(work, make("coop", lit, data.classes, s, **o), lit, d),
            )
        for length in SHIFT_LENGTHS:
            shots = few_shot(noto, 1, seed=seed, num_val_shots=0)
            work.cell(
                f"shift/{length}/1/{seed}",
                lambda s=seed, d=shots, n=length: judged(
                    work, make("coop", clip, noto.classes, s, num_context_tokens=n), clip, d
                ),
            )


# --------------------------------------------------------------------------------------------------------------- the page


def of_seeds(cells: dict[str, dict[str, float]], prefix: str, key: str) -> list[float]:
    """One figure of all seeds of a cell."""
    return [cells[f"{prefix}/{seed}"][key] for seed in SEEDS if f"{prefix}/{seed}" in cells]


def with_interval(values: list[float]) -> str:
    """Mean over seeds and the 95% interval of that mean (Student's t)."""
    if len(values) < 3:
        return "-" if not values else f"{statistics.mean(values):.3f}"
    return f"{statistics.mean(values):.3f} ± {T_OF_THREE * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(head: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(cells: dict[str, dict[str, float]]) -> str:
    """All of them."""
    parts = []
    for data, shots, title in (
        ("cifar", CIFAR_SHOTS, "CIFAR-10, LiT"),
        ("emoji", EMOJI_SHOTS, "Unseen emoji on Twemoji, the quickstart's CLIP"),
    ):
        zero = of_seeds(cells, f"{data}/zero_shot/0", "accuracy")
        rows = [["zero_shot", *[with_interval(zero)] * len(shots), "-"]]
        for method in LEARNED:
            figures = [of_seeds(cells, f"{data}/{method}/{k}", "accuracy") for k in shots]
            if any(figures):
                seconds = of_seeds(cells, f"{data}/{method}/{shots[-1]}", "seconds")
                rows.append([method, *map(with_interval, figures), f"{statistics.mean(seconds):.1f}" if seconds else "-"])
        parts.append(
            f"{title}\n\n"
            + table([*["Method"], *[f"{k} shot{'s' * (k > 1)}" for k in shots], f"processor s at {shots[-1]}"], rows)
        )
    rows = []
    for method in ("zero_shot", *PROMPT_METHODS):
        figures = [
            of_seeds(cells, f"base_to_new/{method}/{0 if method == 'zero_shot' else 2}", key)
            for key in ("base", "new", "harmonic")
        ]
        if any(figures):
            rows.append([method, *map(with_interval, figures)])
    parts.append("Base-to-new on unseen emoji, 2 shots\n\n" + table(["Method", "base", "new", "H"], rows))
    rows = [
        [place, str(length), with_interval(of_seeds(cells, f"context/{place} {length}/{CONTEXT_SHOTS}", "accuracy"))]
        for place, length in CONTEXTS
    ]
    parts.append(f"CoOp's context on CIFAR-10, {CONTEXT_SHOTS} shots\n\n" + table(["Class name at", "M", "accuracy"], rows))
    row = [with_interval(of_seeds(cells, f"shift/{length}/1", "accuracy")) for length in SHIFT_LENGTHS]
    head = ["CoOp from Noto, 1 shot, judged on Twemoji", *[f"M = {length}" for length in SHIFT_LENGTHS]]
    parts.append(table(head, [["accuracy", *row]]))
    return "\n\n".join(parts)


def draw(cells: dict[str, dict[str, float]]) -> None:
    """Accuracy by shots on CIFAR-10."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "few_labels"
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    zero = of_seeds(cells, "cifar/zero_shot/0", "accuracy")
    if zero:
        axes.axhline(zero[0], color="gray", linestyle="--", label="zero_shot")
    for method in LEARNED:
        found = [(k, of_seeds(cells, f"cifar/{method}/{k}", "accuracy")) for k in CIFAR_SHOTS]
        points = [(k, statistics.mean(v), min(v), max(v)) for k, v in found if v]
        if points:
            shots, means, lows, highs = zip(*points, strict=True)
            line = axes.plot(shots, means, marker="o", markersize=3, label=method)[0]
            axes.fill_between(shots, lows, highs, color=line.get_color(), alpha=0.12)
    axes.set(xscale="log", xticks=CIFAR_SHOTS, xticklabels=CIFAR_SHOTS, xlabel="pictures a class", ylabel="accuracy on CIFAR-10")
    axes.minorticks_off()
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def write_page(cells: dict[str, dict[str, float]]) -> None:
    """Put the tables between the page's marks, every cell beside it, and the plot."""
    put_tables(PAGE, "Few labels", tables(cells), cells)
    draw(cells)


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="cifar, emoji, context (default: all); `page` only writes the page"
    )
    parser.add_argument("--lit", default="runs/lit", help="a run of `wordsight train lit`")
    parser.add_argument("--clip", default="runs/quickstart", help="a run of `wordsight quickstart`")
    parser.add_argument("--cifar10", type=Path, help="an archive of train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--methods", default=",".join(LEARNED), help="with commas between")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/few_labels"), help="where cells and features are")
    parser.add_argument("--threads", type=int, help="threads of this process (default: torch's)")
    options = parser.parse_args()
    parts = options.parts or ["cifar", "emoji", "context"]
    if unknown := sorted(set(parts) - {"cifar", "emoji", "context", "page"}):
        parser.error(f"no part named {', '.join(unknown)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    work, methods = Work(options.folder), options.methods.split(",")
    if {"cifar", "context"} & set(parts):
        if options.cifar10 is None:
            parser.error("name CIFAR-10's archive with --cifar10")
        lit, data = wordsight.load(options.lit), cifar(options.cifar10, options.folder)
    if "cifar" in parts:
        study_cifar(work, lit, data, methods)
    if "emoji" in parts:
        study_emoji(work, wordsight.load(options.clip), methods)
    if "context" in parts:
        study_context(work, lit, data, wordsight.load(options.clip))
    write_page(work.cells())


if __name__ == "__main__":
    main()
