"""Run every benchmark, each in a process of its own, and write docs/benchmarks.md: `python -m benchmarks [NAME ...]`.

A benchmark is a module here with `run() -> list[dict]`: rows of name, ours, peer, unit, ratio (above 1: ours is better), must
(the ratio that it has to reach, or None) and note. With `--json OUT` it writes those rows itself. Names on the command line
replace only their own rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BENCHMARKS = (
    "train_step",
    "encode",
    "tokenizer",
    "data_pipeline",
    "contrastive_loss",
    "few_shot",
    "prompt_learning",
    "classifier_builder",
    "token_cache",
    "retrieval_scale",
    "quickstart",
)
DOCS = Path(__file__).parent.parent / "docs"
ROWS = DOCS / "benchmarks.json"
PACKAGES = ("wordsight", "torch", "open_clip_torch", "torchvision", "webdataset", "pillow", "simplejpeg", "tokenizers", "numpy")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str:
    """A package's installed version, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def measure(name: str) -> dict:
    """One benchmark's rows, with the day, machine and versions that they were measured with."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)], check=True)
        rows = json.loads(out.read_text())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "rows": rows,
        "day": date.today().isoformat(),
        "machine": f"{cpu_model()}, {cores} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {package: package_version(package) for package in PACKAGES},
    }


def figure(value: float | None) -> str:
    """Three significant digits, a dash for nothing."""
    return "-" if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def render(results: dict[str, dict]) -> str:
    """The Markdown page: a table of all rows, then where and with what each was measured."""
    lines = [
        "# Benchmarks",
        "",
        "Each row was measured in one run with its peer beside it, by `make bench` (or `python -m benchmarks NAME` for one).",
        "A ratio above 1 means that Wordsight is better: faster, or smaller. The bold ones fall short of what they must reach;",
        "their note says what limits them.",
        "",
        "| What | Wordsight | Peer | Unit | Ratio | Must reach | Note |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        for row in results.get(name, {}).get("rows", []):
            ratio, must = row.get("ratio"), row.get("must")
            short = ratio is not None and must is not None and ratio < must
            shown = f"**{figure(ratio)}**" if short else figure(ratio)
            cells = (
                row["name"],
                figure(row.get("ours")),
                figure(row.get("peer")),
                row["unit"],
                shown,
                figure(must),
                row.get("note") or "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Where and with what", ""]
    for name in BENCHMARKS:
        if name in results:
            result = results[name]
            versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
            lines.append(f"- `{name}` ({result['day']}): {result['machine']}; {versions}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for, keep the rest, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to measure (default: all of {', '.join(BENCHMARKS)})")
    names = parser.parse_args().names or BENCHMARKS
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    results = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for name in names:
        print(f"== {name}", flush=True)
        results[name] = measure(name)
        ROWS.write_text(json.dumps(results, indent=1) + "\n")
        (DOCS / "benchmarks.md").write_text(render(results))
    print(f"Written: {DOCS / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
