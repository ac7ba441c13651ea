"""A built wheel in an empty environment runs the quickstart; then the README's tour runs where it has left its model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("wordsight", "pyproject.toml", "README.md", "LICENSE")


def call(command: list[str], cwd: Path) -> str:
    """What a successful command printed; a failure shows all of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel alone; its dependencies come from this test's environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:  # a copy, so that nothing is built into the checkout
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    call([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    call([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # a path alone: that folder's own .pth files, and so an editable checkout, are not followed
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = call([str(python), "-c", "import wordsight; print(wordsight.__file__)"], folder).strip()
    assert Path(where).is_relative_to(site)
    return python


@pytest.fixture(scope="module")
def quickstart(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that three steps of the quickstart were run in, and what they printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, call([str(installed), "-m", "wordsight", "quickstart", "--steps", "3"], folder)


@pytest.mark.timeout(240)
def test_a_wheel_runs_the_quickstart(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    run = folder / "runs" / "quickstart"
    for step in ("1. Train", "2. Judge", "3. Ask", "Done", "runs/quickstart/report.html", "wordsight classify"):
        assert step in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3]  # every tenth step, the first and the last
    records = json.loads((run / "results.json").read_text())
    judged = {(record["split"], record["metric"]): record for record in records}
    for split in ("test-twemoji-seen", "test-twemoji-unseen"):
        top1 = judged[split, "top1"]
        assert set(top1) == {"task", "data", "split", "metric", "value", "count", "ci95", "chance", "protocol", "fingerprint"}
        assert top1["ci95"][0] <= top1["value"] <= top1["ci95"][1]
        assert 0 < top1["chance"] < 0.01
    assert judged["test-twemoji-seen", "top1"]["count"] > 1500
    report = (run / "report.html").read_text()
    assert "test-twemoji-unseen" in report
    assert not re.search(r"""(src|href)=["']https?://""", report)


def test_a_finished_quickstart_is_judged_again_not_trained_again(installed: Path, quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    weights = folder / "runs" / "quickstart" / "best" / "model.safetensors"
    metrics = (folder / "runs" / "quickstart" / "metrics.jsonl").read_bytes()
    before = weights.read_bytes()
    assert "Done" in call([str(installed), "-m", "wordsight", "quickstart", "--steps", "3"], folder)
    assert weights.read_bytes() == before
    assert (folder / "runs" / "quickstart" / "metrics.jsonl").read_bytes() == metrics


def test_the_readmes_python_tour_runs(installed: Path, quickstart: tuple[Path, str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    folder, _ = quickstart
    call([str(installed), "-c", block], folder)
    assert (folder / "runs" / "fresh" / "model.safetensors").is_file()
    assert (folder / "runs" / "fresh-hf" / "config.json").is_file()


def test_the_readmes_command_line_names_real_commands_and_options(installed: Path, quickstart: tuple[Path, str]) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    commands = [line.split("#")[0].split() for block in blocks for line in block.splitlines() if line.startswith("wordsight ")]
    assert len(commands) >= 6
    helps: dict[str, str] = {}
    for words in commands:
        name = " ".join(words[1:3]) if words[1] == "data" else words[1]
        if name not in helps:
            helps[name] = call([str(installed), "-m", "wordsight", *name.split(), "--help"], quickstart[0])
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", helps[name]), f"{name} has no {option}"
