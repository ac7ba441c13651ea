"""The long tail: methods for unequal classes on frozen models, three seeds: `python -m studies.long_tail`.

- Openclipart by its leaf folders, naturally skewed. Pictures that are alike (bytes or perceptual hash) are one; those that the
  embedded sample data hold, which the models may have learned from, are never judged by.
- Emoji without skin tones by subcategory, naturally skewed: learned from Noto and Fluent, chosen on emoji that were taken out of
  both, judged on Twemoji, a drawing that nothing was learned from.
- CIFAR-10-LT: the published profile with factors 10, 50 and 100.

On two frozen models: the LiT of EfficientNet-Lite0 and MiniLM, and the quickstart's CLIP. Pictures come from the packages that
`wordsight.sample.build` fetches, and from CIFAR-10's archive. A cell that is done is not repeated. It writes
docs/studies/long_tail.json, the tables of docs/studies/long_tail.md and its plot; what the page says beyond them is by hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import wordsight
from studies.few_labels import cifar, table
from studies.pages import T_OF_THREE, put_tables
from wordsight.adapt.grid import run_grid
from wordsight.adapt.grid_methods import ALL, GridRequest
from wordsight.adapt.pictures import open_data
from wordsight.data import open_source
from wordsight.data.few_shot import Splits, hold_out
from wordsight.data.long_tail import skew
from wordsight.sample.build import DEB, clean_words, fetch, perceptual_hash, perceptual_matches, read_concepts

SEEDS = (1, 2, 3)
FACTORS = (10, 50, 100)
SETS = ("openclipart", "emoji", *(f"cifar10-lt-{factor}" for factor in FACTORS))
SIDE_PX = 224  # pictures are kept no larger
MAX_PIXELS = 20_000_000
TEST_SHARE, VAL_SHARE = 0.3, 0.1
DECODER = {  # both are smaller than the published 8,192 steps of 256: two cores
    "quickstart": {"steps": 300, "batch_size": 128},
    "lit": {"steps": 200, "batch_size": 64, "num_layers": 1, "precision": "bfloat16", "learning_rate": 0.01},
}
DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "studies" / "long_tail.md", DOCS / "pictures" / "long_tail.svg"
COLUMNS = ("top1", "top1_many", "top1_medium", "top1_few", "mean_per_class", "macro_f1")


# --------------------------------------------------------------------------------------------------------------- the data


def openclipart(raw: Path, folder: Path) -> Splits:
    """Clip art by leaf folder, as a table that is made once: 60% to learn from, 10% to choose by, 30% to be judged by."""
    listing = folder / "openclipart.csv"
    if not listing.exists():
        _write_openclipart(fetch(raw)[DEB[0]] / "usr/share/openclipart/png", folder, listing)
    return open_data(str(listing))


def _write_openclipart(root: Path, folder: Path, listing: Path) -> None:
    pictures = []
    for path in sorted(root.rglob("*.png")):
        with path.open("rb") as file:  # width and height stand in the header; some are of hundreds of megapixels
            header = file.read(24)
        if int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big") > MAX_PIXELS:
            continue
        with Image.open(path) as image:
            picture = on_white(image)
        pictures.append((path.relative_to(root), picture))
    hashes = [perceptual_hash(picture) for _, picture in pictures]
    alike = perceptual_matches(hashes, hashes)
    sample = open_source("sample:train")
    known = [perceptual_hash(_picture(sample[i])) for i in range(len(sample)) if sample[i].meta["source"] == "openclipart"]
    learned = perceptual_matches(hashes, known).any(1)
    first = [i for i in range(len(pictures)) if not alike[i, :i].any()]
    by_class = defaultdict(list)
    for i in first:
        by_class[clean_words(" ".join(pictures[i][0].parent.parts))].append(i)
    rng, rows = np.random.default_rng(0), []
    for name, members in sorted(by_class.items()):
        free = rng.permutation([i for i in members if not learned[i]]).tolist()
        num_test = round(TEST_SHARE * len(members)) if len(members) > 1 else 0
        num_val = max(1, round(VAL_SHARE * len(members))) if len(members) > 2 else 0
        test, rest = free[:num_test], free[num_test:]
        val = rest[:num_val]
        for i in members:
            split = "test" if i in test else "val" if i in val else "train"
            target = folder / "openclipart" / pictures[i][0].with_suffix(".webp")
            target.parent.mkdir(parents=True, exist_ok=True)
            pictures[i][1].save(target, quality=90)
            rows.append((str(target.relative_to(folder)), name, split))
    print(f"openclipart: {len(pictures)} pictures, {len(first)} unlike, {int(learned[first].sum())} known from the sample data")
    _write_table(listing, rows)


def on_white(image: Image.Image) -> Image.Image:
    """A picture on white, fitted into a square of SIDE_PX."""
    rgba = image.convert("RGBA")
    rgba.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")
    canvas.alpha_composite(rgba, ((SIDE_PX - rgba.width) // 2, (SIDE_PX - rgba.height) // 2))
    return canvas.convert("RGB")


def _picture(sample: Any) -> Image.Image:
    from wordsight.data.decode import decode

    return decode(sample.image, key=sample.key)


def emoji(raw: Path, folder: Path) -> Splits:
    """Emoji by subcategory: one in ten concepts to choose by, in both drawings; a third drawing to be judged by."""
    listing = folder / "emoji.csv"
    if not listing.exists():
        rng, rows = np.random.default_rng(0), []
        by_class = defaultdict(list)
        for concept in read_concepts(fetch(raw)):
            by_class[concept["category"]].append(concept)
        for name, concepts in sorted(by_class.items()):
            num_val = round(VAL_SHARE * len(concepts))
            if len(concepts) > 2:
                num_val = max(1, num_val)
            held_out = set(rng.permutation(len(concepts))[:num_val].tolist())
            for i, concept in enumerate(concepts):
                for vendor, picture in concept["pictures"].items():
                    target = folder / "emoji" / vendor / f"{concept['codepoint']}.webp"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(picture.data)
                    split = "val" if i in held_out else "train"
                    rows.append((str(target.relative_to(folder)), name, "test" if vendor == "twemoji" else split))
        _write_table(listing, rows)
    return open_data(str(listing))


def _write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)
    temporary.replace(path)


def cifar_lt(archive: Path, folder: Path, factor: int) -> Splits:
    """CIFAR-10 skewed, 50 validation pictures a class set aside; 5,000 test pictures as they are."""
    skewed = skew(cifar(archive, folder), factor, seed=1, num_max=4950, num_val=50)
    return replace(skewed, name=f"CIFAR-10-LT, factor {factor}")


def data_of(name: str, options: argparse.Namespace) -> Splits:
    """One of SETS."""
    if name == "openclipart":
        return openclipart(options.raw, options.folder)
    if name == "emoji":
        return emoji(options.raw, options.folder)
    return cifar_lt(options.cifar10, options.folder, int(name.rsplit("-", 1)[1]))


# -------------------------------------------------------------------------------------------------------------- the page


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What has been measured: "SET/MODEL/METHOD/SEED" -> figures and costs."""
    found = {}
    for path in sorted((folder / "runs").glob("*/*/cells/*/*/result.json")):
        cell = json.loads(path.read_text())
        of_set, of_model = path.parts[-6].rsplit("@", 1)
        figures = {name: cell["metrics"][name]["value"] for name in COLUMNS if name in cell["metrics"]}
        figures |= {"validation": cell["validation"]["mean_per_class"]}
        figures |= {name: cell["cost"][name] for name in ("seconds", "cpu_seconds", "peak_memory_bytes", "energy_joules")}
        found[f"{of_set}/{of_model}/{cell['method']}/{cell['seed']}"] = figures
    return found


def of_seeds(cells: dict[str, dict[str, Any]], prefix: str, key: str) -> list[float]:
    """One figure of all seeds of a method."""
    return [cells[f"{prefix}/{seed}"][key] for seed in SEEDS if key in cells.get(f"{prefix}/{seed}", {})]


def with_interval(values: list[float]) -> str:
    """Mean over seeds in percent and the 95% interval of that mean (Student's t); no interval where nothing is random."""
    if not values:
        return "-"
    mean = 100 * statistics.mean(values)
    if len(values) < len(SEEDS) or len(set(values)) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * T_OF_THREE * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def tables(cells: dict[str, dict[str, Any]]) -> str:
    """One for each data set and model."""
    parts = []
    keys = dict.fromkeys(tuple(key.split("/")[:2]) for key in cells)
    for of_set, of_model in sorted(keys, key=lambda key: (SETS.index(key[0]), key[1])):
        methods = dict.fromkeys(key.split("/")[2] for key in cells if key.startswith(f"{of_set}/{of_model}/"))
        rows = []
        for method in sorted(methods, key=lambda one: ALL.index(one) if one in ALL else len(ALL)):
            prefix = f"{of_set}/{of_model}/{method}"
            figures = [with_interval(of_seeds(cells, prefix, name)) for name in (*COLUMNS, "validation")]
            seconds = statistics.mean(of_seeds(cells, prefix, "cpu_seconds"))
            joules = statistics.mean(of_seeds(cells, prefix, "energy_joules"))
            memory = max(of_seeds(cells, prefix, "peak_memory_bytes")) / 1e9
            rows.append([method, *figures, f"{seconds:.1f}", f"{memory:.2f}", f"{joules:.0f}"])
        head = ["Method", "all", "many", "medium", "few", "mean per class", "macro F1", "validation", "processor s", "GB", "J"]
        parts.append(f"**{of_set}, {of_model}**\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def gains(cells: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    """(set, model, gain in the mean per class over the linear probe, gain on few) of the method that validation chooses."""
    for of_set in SETS:
        for of_model in DECODER:
            prefix = f"{of_set}/{of_model}/"
            methods = list(dict.fromkeys(key.split("/")[2] for key in cells if key.startswith(prefix)))
            whole = [m for m in methods if len(of_seeds(cells, prefix + m, "validation")) == len(SEEDS)]
            if not whole or not of_seeds(cells, prefix + "linear_probe", "validation"):  # whose seeds are all alike
                continue
            best = max(whole, key=lambda m: statistics.mean(of_seeds(cells, prefix + m, "validation")))
            mean, few = (
                statistics.mean(of_seeds(cells, prefix + best, key) or [math.nan])
                - statistics.mean(of_seeds(cells, prefix + "linear_probe", key) or [math.nan])
                for key in ("mean_per_class", "top1_few")
            )
            yield f"{of_set}, {of_model}", best, mean, few


def draw(cells: dict[str, dict[str, Any]]) -> None:
    """Mean per class on test by method, a panel for each data set, a mark for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "long_tail"
    there = [name for name in SETS if any(key.startswith(f"{name}/") for key in cells)]
    methods = [m for m in (*ALL, *sorted({key.split("/")[2] for key in cells} - set(ALL)))]
    methods = [m for m in methods if any(key.split("/")[2] == m for key in cells)][::-1]
    figure, axes = plt.subplots(1, len(there), figsize=(2.6 * len(there) + 2.6, 0.24 * len(methods) + 1.3), sharey=True)
    for axis, of_set in zip(np.atleast_1d(axes), there, strict=True):
        for of_model, colour in zip(DECODER, ("tab:blue", "tab:orange"), strict=True):
            found = [(y, of_seeds(cells, f"{of_set}/{of_model}/{m}", "mean_per_class")) for y, m in enumerate(methods)]
            for y, values in found:
                if values:
                    axis.plot([100 * min(values), 100 * max(values)], [y, y], color=colour, linewidth=1)
                    axis.plot(100 * statistics.mean(values), y, "o", color=colour, markersize=4)
            axis.plot([], [], "o", color=colour, markersize=4, label=of_model)
        axis.set_title(of_set, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(methods)), methods)
    first.legend(fontsize=7)
    figure.supxlabel("mean accuracy over the classes of the test split, %; lines: three seeds", fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def write_page(cells: dict[str, dict[str, Any]]) -> None:
    """Put the tables between the page's marks, every cell beside it, and the plot."""
    chosen = [
        [where, best, f"{100 * mean:+.1f}", "-" if math.isnan(few) else f"{100 * few:+.1f}"]
        for where, best, mean, few in gains(cells)
    ]
    head = ["", "chosen on validation", "mean per class over the linear probe, points", "few over the linear probe, points"]
    put_tables(PAGE, "The long tail", f"{table(head, chosen)}\n\n{tables(cells)}", cells)
    draw(cells)


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)} (default: all); `page` only writes the page")
    parser.add_argument("--lit", default="runs/lit", help="a run of `wordsight train lit`")
    parser.add_argument("--quickstart", default="runs/quickstart", help="a run of `wordsight quickstart`")
    parser.add_argument("--models", default=",".join(DECODER), help="with commas between")
    parser.add_argument("--methods", default=",".join(ALL), help="of the grid, with commas between")
    parser.add_argument("--part", default="all", help="name of the run of these methods, beside others of the same data")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="as of `wordsight long-tail`")
    parser.add_argument("--cifar10", type=Path, help="an archive of train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--raw", type=Path, default=Path("runs/studies/raw"), help="where packages are fetched to")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/long_tail"), help="where pictures and runs are")
    parser.add_argument("--threads", type=int, help="threads of this process (default: torch's)")
    options = parser.parse_args()
    sets = options.sets or list(SETS)
    if unknown := sorted(set(sets) - {*SETS, "page"}):
        parser.error(f"no data set named {', '.join(unknown)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    from wordsight.adapt.learn import split_settings

    given = split_settings(options.set)
    for name in [one for one in sets if one != "page"]:
        splits = data_of(name, options)
        if splits.test is None:
            splits = hold_out(splits, TEST_SHARE)
        for of_model in options.models.split(","):
            methods = tuple(options.methods.split(","))
            own = {"decoder": DECODER[of_model]} | given
            request = GridRequest(methods=methods, seeds=SEEDS, parameters=own)
            model = wordsight.load(getattr(options, of_model))
            run = options.folder / "runs" / f"{name}@{of_model}" / options.part
            print(run_grid(model, splits, run, request, say=lambda text: print(text, flush=True))["kept"]["sentence"], flush=True)
    write_page(results(options.folder))


if __name__ == "__main__":
    main()
