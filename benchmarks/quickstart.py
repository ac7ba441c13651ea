"""Seconds of training until the quickstart's model is right on .40 of Twemoji: `python -m benchmarks.quickstart --json OUT`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import main

TARGET = 0.40
METRIC = "zero_shot/test-twemoji-seen/top1"
EVALUATE_EVERY_STEPS = 25
LIMIT_S = 900


def run() -> list[dict]:
    """One row: seconds from the first update, evaluations on the way included, in as many threads as there are cores."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "wordsight", "train", "quickstart", "--run", str(run_dir), "--quiet"]
        command += ["--set", f"evaluate_every_steps={EVALUATE_EVERY_STEPS}"]
        with subprocess.Popen(command) as training:
            step, value = _wait(training, run_dir / "metrics.jsonl")
        seconds = [line["elapsed_s"] for line in _lines(run_dir / "speed.jsonl") if line["step"] <= step][-1]
    note = f"step {step}, R@1 {value:.3f}, one seed, measured every {EVALUATE_EVERY_STEPS} steps; no peer"
    return [
        {
            "name": f"quickstart: until R@1 = {TARGET}",
            "ours": seconds,
            "peer": None,
            "ratio": None,
            "unit": "s",
            "must": None,
            "note": note,
        }
    ]


def _wait(training: subprocess.Popen, metrics: Path) -> tuple[int, float]:
    """The step and figure of the first evaluation that reaches the target; the training is stopped then."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        reached = [line for line in _lines(metrics) if line.get(METRIC, 0) >= TARGET]
        if reached:
            training.send_signal(signal.SIGTERM)
            return reached[0]["step"], reached[0][METRIC]
        if training.poll() is not None:
            raise RuntimeError(f"the training ended with code {training.returncode} before R@1 was {TARGET}")
        time.sleep(0.5)
    training.kill()
    raise TimeoutError(f"R@1 was below {TARGET} for {LIMIT_S} s")


def _lines(path: Path) -> list[dict]:
    """The whole lines of a JSON Lines file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    main(run, "The quickstart's training.")
