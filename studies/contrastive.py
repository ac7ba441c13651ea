"""Contrastive systems and batch sizes at the same samples seen, three seeds each: `python -m studies.contrastive`.

Every arm sees 65,536 samples of the embedded data and is judged on Twemoji, which nothing is trained on. Runs that are complete
are not repeated, so the command goes on where it stopped. It writes docs/studies/contrastive.json and the tables of
docs/studies/contrastive.md; what the page says beyond them is written by hand.

All arms have the quickstart's data and augmentation, and but for LiT its towers. Learning rates go with the square root of the
batch, the average of the weights has the same horizon in samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from studies.pages import T_OF_THREE, put_tables
from wordsight.recipes.quickstart import quickstart
from wordsight.train.loop import fit
from wordsight.train.recipe import Recipe, find_recipe

SAMPLES = 65_536
SEEDS = (0, 1, 2)
BATCH_SIZES = (64, 256, 1_024, 4_096)
SEEN, UNSEEN = "test-twemoji-seen", "test-twemoji-unseen"
PAGE = Path(__file__).parent.parent / "docs" / "studies" / "contrastive.md"


def at_equal_samples(recipe: Recipe, batch_size: int = 256) -> Recipe:
    """A recipe cut or stretched to the study's samples, at a batch size."""
    steps = SAMPLES // batch_size
    scale = math.sqrt(batch_size / 256)
    optim = replace(
        recipe.optim,
        lr=recipe.optim.lr * scale,
        muon_lr=None if recipe.optim.muon_lr is None else recipe.optim.muon_lr * scale,
        warmup_steps=max(1, steps // 20),
    )
    return replace(
        recipe,
        steps=steps,
        epochs=None,
        samples=None,
        batch_size=batch_size,
        micro_batch_size=None,
        optim=optim,
        ema_decay=0.99 ** (batch_size / 256),
        recalibrate_batches=max(1, 4_096 // batch_size),
        evaluate_every_steps=None,
        checkpoint_every_s=None,
        checkpoint_every_steps=None,
    )


def align_style() -> Recipe:
    """ALIGN's loss on the quickstart's towers: label smoothing of .1, a temperature that starts at 1."""
    recipe = quickstart()
    from wordsight.catalog import find

    return replace(recipe, model=replace(find("clip-quickstart").config, label_smoothing=0.1, init_log_scale=0.0))


def named(name: str) -> Callable[[], Recipe]:
    """The recipe of that name, looked up when it is run."""
    return lambda: find_recipe(name)()


SYSTEMS: dict[str, Callable[[], Recipe]] = {
    "CLIP": quickstart,
    "SigLIP": named("siglip_quickstart"),
    "ALIGN-style": align_style,
    "Llip": named("llip_quickstart"),
    "LiT": named("lit"),
    "UniCL": named("unicl"),
}


def arms() -> dict[str, Callable[[], Recipe]]:
    """Every arm of the study by its folder's name."""
    found: dict[str, Callable[[], Recipe]] = {
        name: (lambda make=make: at_equal_samples(make())) for name, make in SYSTEMS.items()
    }
    for name in ("CLIP", "SigLIP"):
        for batch_size in BATCH_SIZES:
            if batch_size != 256:  # that one is among the systems
                found[f"{name}-{batch_size}"] = lambda make=SYSTEMS[name], size=batch_size: at_equal_samples(make(), size)
    return found


def run(names: Sequence[str], folder: Path) -> None:
    """Train and judge the arms that are not complete."""
    for seed in SEEDS:
        for name in names:
            run_dir = folder / name / f"seed-{seed}"
            if (run_dir / "results.json").exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            fit(replace(arms()[name](), seed=seed), run_dir, device="cpu")


def figures(run_dir: Path) -> dict[str, float] | None:
    """top1 and top5 by split of a complete run."""
    path = run_dir / "results.json"
    if not path.exists():
        return None
    return {f"{r['split']}/{r['metric']}": r["value"] for r in json.loads(path.read_text()) if r["metric"] in ("top1", "top5")}


def collect(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The figures of every seed of every arm that has run."""
    found = {name: [figures(folder / name / f"seed-{seed}") for seed in SEEDS] for name in arms()}
    return {name: [f for f in per_seed if f is not None] for name, per_seed in found.items() if any(per_seed)}


def with_interval(values: Sequence[float]) -> str:
    """The mean over seeds and the 95% interval of that mean."""
    if len(values) < 3:
        return f"{statistics.mean(values):.3f} ({len(values)} seed{'s' * (len(values) > 1)})"
    half = T_OF_THREE * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def tables(results: dict[str, list[dict[str, float]]]) -> str:
    """Both tables in Markdown."""

    def cells(name: str) -> str:
        keys = [f"{SEEN}/top1", f"{SEEN}/top5", f"{UNSEEN}/top1", f"{UNSEEN}/top5"]
        return " | ".join(with_interval([seed[key] for seed in results[name]]) for key in keys)

    head = "R@1 trained names | R@5 | R@1 untrained names | R@5 |\n"
    lines = [f"| System | {head}|---|---|---|---|---|"]
    lines += [f"| {name} | {cells(name)} |" for name in SYSTEMS if name in results]
    lines += ["", f"| Loss and batch | {head}|---|---|---|---|---|"]
    for name, loss in (("CLIP", "softmax"), ("SigLIP", "sigmoid")):
        for size in BATCH_SIZES:
            arm = name if size == 256 else f"{name}-{size}"
            if arm in results:
                lines.append(f"| {loss}, {size:,} ({SAMPLES // size:,} updates) | {cells(arm)} |")
    return "\n".join(lines)


def write_page(results: dict[str, Any]) -> None:
    """Put the tables between the page's marks, and every seed's figures beside it."""
    put_tables(PAGE, "Contrastive systems at the same samples seen", tables(results), results)


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ARM", help=f"which arms (default: all of {', '.join(arms())})")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/contrastive"), help="where the runs are")
    parser.add_argument("--threads", type=int, help="threads of this process (default: torch's)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(arms()))
    if unknown:
        parser.error(f"no arm named {', '.join(unknown)}; there are {', '.join(arms())}")
    if options.threads:
        torch.set_num_threads(options.threads)
    run(options.names or list(arms()), options.folder)
    write_page(collect(options.folder))


if __name__ == "__main__":
    main()
