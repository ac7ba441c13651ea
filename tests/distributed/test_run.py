"""Whole runs in two processes, and the launcher that starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import in_processes
from tests.train.conftest import _quick_report, pairs, recipe, tokenizer_folder  # noqa: F401 - fixtures
from tests.train.test_loop import state_of, stop_at
from wordsight.train.distributed import launch
from wordsight.train.loop import Outcome, fit
from wordsight.train.recipe import Recipe


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(recipe: Recipe, run: Path) -> Callable[[], Outcome]:  # noqa: F811
    return lambda: fit(recipe, run, device="cpu", progress=False)


def test_a_run_of_two_processes_is_the_run_of_one(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    text = pairs.read_text().replace("07.png", "missing.png").replace("11.png", "missing-too.png")
    (pairs.parent / "bad.csv").write_text(text)
    recipe = replace(recipe, data=replace(recipe.data, sources=(str(pairs.parent / "bad.csv"),), max_bad_share=0.5), steps=8)
    fit(recipe, tmp_path / "one", device="cpu", progress=False)
    outcomes = in_processes(2, training(recipe, tmp_path / "two"), tmp_path)
    assert all(outcome.complete for outcome in outcomes)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    a, b = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert max((a[name] - b[name]).abs().max().item() for name in a if name.startswith("model")) < 1e-3


def test_two_processes_stop_together_and_go_on_bit_identically(recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    recipe = replace(recipe, steps=8)
    in_processes(2, training(recipe, tmp_path / "whole"), tmp_path)
    outcomes = in_processes(2, lambda: stop_at(recipe, tmp_path / "parts", 4 if os.environ["RANK"] == "1" else 100), tmp_path)
    assert [outcome.step for outcome in outcomes] == [4, 4]
    assert [outcome.signal for outcome in outcomes] == [signal.SIGTERM] * 2
    in_processes(2, training(recipe, tmp_path / "parts"), tmp_path)
    a, b = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_the_launcher_tells_each_process_its_place(tmp_path: Path) -> None:
    code = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    assert launch([sys.executable, "-S", "-c", code], 3, {}) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3", "3", "3"]


def test_the_launcher_gives_the_first_failure_and_ends_the_others() -> None:
    code = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    began = time.monotonic()
    assert launch([sys.executable, "-S", "-c", code], 2, {}, grace_s=0.2) == 7
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_passes_signals_on(number: int, tmp_path: Path) -> None:
    child = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130)); signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60)"
    )
    command = f"[sys.executable, '-S', '-c', {child!r}]"
    parent = f"import sys; from wordsight.train.distributed import launch; sys.exit(launch({command}, 2, {{}}))"
    process = subprocess.Popen([sys.executable, "-c", parent])
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number


def test_a_signal_while_processes_are_started_reaches_all(tmp_path: Path) -> None:
    parent = (
        "import os, signal, subprocess, sys\n"
        "from wordsight.train import distributed\n"
        "class Started(subprocess.Popen):\n"
        "    def __init__(self, *given, **more):\n"
        "        super().__init__(*given, **more)\n"
        "        os.kill(os.getpid(), signal.SIGINT) if more['env']['RANK'] == '0' else None\n"
        "distributed.subprocess.Popen = Started\n"
        f"code = \"open(r'{tmp_path}/' + __import__('os').environ['RANK'], 'w').close(); __import__('time').sleep(60)\"\n"
        "sys.exit(distributed.launch([sys.executable, '-S', '-c', code], 2, {}))"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", parent], stderr=subprocess.DEVNULL).returncode == 128 + signal.SIGINT
    assert time.monotonic() - began < 50, "neither of both slept to its end"
