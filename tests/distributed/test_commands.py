"""The commands under torchrun and with --processes, as a user types them: the same results, and an end when a process is killed.

Each process imports torch anew, which takes most of the time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import wordsight
from tests.evaluate.conftest import COLOURS, picture

ROOT = Path(wordsight.__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUM_PICTURES = 27
pytestmark = pytest.mark.timeout(600)

# the command with a slow step, so that there is time to kill a process of it; each writes down its id
SLOW = """
import os, sys, time
import wordsight.data.reader
import wordsight.train.step

def slowly(function, step=[0]):
    def slow(*arguments, **options):
        time.sleep(0.15)
        step[0] += 1
        if step[0] == 4:
            open(os.path.join(os.environ["FOLDER"], "pid-" + os.environ["RANK"]), "w").write(str(os.getpid()))
        return function(*arguments, **options)
    return slow

wordsight.data.reader._ReadMaker.__getitem__ = slowly(wordsight.data.reader._ReadMaker.__getitem__)
wordsight.train.step.Stepper.backward = slowly(wordsight.train.step.Stepper.backward)
from wordsight.cli.main import main
main()
"""
LAUNCH = "import sys; from wordsight.train.distributed import launch; sys.exit(launch([sys.executable, *sys.argv[1:]], 2))"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a table of 27 pictures (one damaged), and the slow program."""
    root = tmp_path_factory.mktemp("commands")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    lines = []
    for i in range(NUM_PICTURES):
        colour = list(COLOURS)[i % 5]
        (root / f"{i}.png").write_bytes(picture(COLOURS[colour], (20 + i, 16)) if i != 5 else b"damaged")
        lines.append(json.dumps({"path": f"{i}.png", "caption": [f"{colour} picture", f"number {i}"], "label": colour}))
    (root / "toys.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "slow.py").write_text(SLOW)
    return root


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def program(place: Path, *words: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, *words], environment(place) | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return done


def killed(place: Path, folder: Path, rank: int, *words: str) -> tuple[float, str]:
    """Run a command, kill its process `rank` once both are at work: seconds until all have ended, and what was said."""
    for path in folder.glob("pid-*"):
        path.unlink()
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=place, env=environment(folder), stdout=said, stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while len([path for path in folder.glob("pid-*") if path.read_text()]) < 2:
            assert process.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.05)
        pids = [int((folder / f"pid-{r}").read_text()) for r in range(2)]
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(timeout=120) != 0
        took = time.monotonic() - began
    finally:
        if process.poll() is None:
            process.kill()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return took, (folder / "said").read_text()


def assert_told(took: float, said: str, rank: int) -> None:
    assert took < 60, took
    assert f"process {rank} of 2 is gone (its connection closed: it was killed" in said
    assert "give the same command again" in said


def test_evaluate_gives_the_same_file_with_1_2_and_3_processes(place: Path) -> None:
    words = ["-m", "wordsight", "evaluate", "tiny", "--data", "toys.jsonl", "--batch-size", "4", "--prompts", "imagenet80"]
    program(place, *words, "--run", "one")
    told = program(place, *TORCHRUN, *words, "--run-dir", "two")
    program(place, *words, "--run", "three", "--processes", "3")
    one, two, three = (json.loads((place / name / "results.json").read_text()) for name in ("one", "two", "three"))
    assert len(one) > 8
    assert one == two == three
    assert (place / "one/results.json").read_bytes() == (place / "two/results.json").read_bytes()
    assert (place / "one/results.json").read_bytes() == (place / "three/results.json").read_bytes()
    assert told.stdout.count("top-1 accuracy") == 1, "the main process alone prints"
    assert told.stderr.count("5.png") == 1
    gallery = [json.loads((place / name / "gallery.json").read_text())["sections"] for name in ("one", "two")]
    for sections in gallery:
        for section in sections:
            section.pop("command")
    assert gallery[0] == gallery[1]


def test_embed_goes_on_after_a_kill_with_another_number_of_processes(place: Path, tmp_path: Path) -> None:
    words = ["embed", "tiny", "--images", "toys.jsonl", "--batch-size", "2", "--part-size", "3"]
    program(place, "-m", "wordsight", *words, "--out", str(tmp_path / "one.npy"))
    took, said = killed(place, tmp_path, 1, "-c", LAUNCH, "slow.py", *words, "--out", str(tmp_path / "more.npy"))
    assert_told(took, said, 1)
    assert "Process 1 of 2 was killed (SIGKILL" in said
    num_parts = len(list((tmp_path / "more.npy.parts").glob("part-*")))
    assert 0 < num_parts < NUM_PICTURES / 3
    done = program(place, "-m", "wordsight", *words, "--processes", "3", "--out", str(tmp_path / "more.npy"))
    assert "Going on after" in done.stderr
    for suffix in ("", ".names.txt", ".json"):
        assert (tmp_path / f"one.npy{suffix}").read_bytes() == (tmp_path / f"more.npy{suffix}").read_bytes()
    assert np.load(tmp_path / "one.npy").shape[0] == NUM_PICTURES - 1
    assert not (tmp_path / "more.npy.parts").exists()


def test_embed_under_torchrun_gives_the_same_bytes_with_more_threads(place: Path, tmp_path: Path) -> None:
    """Matrix products round differently with another number of threads unless the command sees to it."""
    (tmp_path / "texts.txt").write_text("".join(f"a photo of thing number {i}\n" for i in range(23)))
    words = ["-m", "wordsight", "embed", "tiny", "--texts", str(tmp_path / "texts.txt"), "--part-size", "5"]
    program(place, *words, "--out", str(tmp_path / "one.parquet"), threads=2)
    program(place, *TORCHRUN, *words, "--out", str(tmp_path / "two.parquet"), threads=1)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_killed_process_ends_evaluate_under_torchrun(place: Path, tmp_path: Path) -> None:
    words = ["slow.py", "evaluate", "tiny", "--data", "toys.jsonl", "--batch-size", "2", "--run-dir", str(tmp_path / "run")]
    took, said = killed(place, tmp_path, 0, *TORCHRUN, *words)
    assert_told(took, said, 0)


SMALL = ("--set", "steps=40", "--set", "batch_size=8", "--set", "data.sources=sample:train-openclipart", "--device", "cpu")


def test_train_under_torchrun_ends_when_a_process_is_killed_and_goes_on_alone(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "clip_tiny", "--run-dir", str(run), *SMALL, "--set", "checkpoint_every_steps=2"]
    took, said = killed(place, tmp_path, 1, *TORCHRUN, "slow.py", *words)
    assert_told(took, said, 1)
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved, "what was saved is there"
    begun = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["machine"]["processes"] for start in begun] == [2]
    program(place, *TORCHRUN, "-m", "wordsight", *words)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
