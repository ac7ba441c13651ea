"""fit: learns, resumes bit-identically, stops and says how to go on."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import wordsight
from wordsight.data.augment import Augment
from wordsight.evaluate.retrieval import Retrieval
from wordsight.train.checkpoint import DiskFullError
from wordsight.train.distributed import World
from wordsight.train.log import MetricsLog
from wordsight.train.loop import NonFiniteError, Outcome, fit
from wordsight.train.recipe import Evaluation, Recipe
from wordsight.train.rundir import RunFolder
from wordsight.train.setup import Parts, build
from wordsight.types import Batch


def state_of(run: Path) -> dict[str, torch.Tensor]:
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {f"{f.stem}/{n}": t for f in sorted(last.glob("*.safetensors")) for n, t in load_file(f).items()}


def assert_same_run(a: Path, b: Path) -> None:
    one, two = state_of(a), state_of(b)
    assert one.keys() == two.keys()
    assert {n.split("/")[0] for n in one} == {"model", "optimizer", "average"}
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def test_a_run_learns_and_leaves_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    outcome = fit(replace(recipe, steps=40), tmp_path / "run", device="cpu", progress=False)
    assert outcome.complete
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert sum(line["loss"] for line in lines[-10:]) < 0.8 * sum(line["loss"] for line in lines[:10])
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-00000039", "step-00000040"]
    assert {"recipe.json", "environment.json", "metrics.jsonl", "last", "report.html"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's run, never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(recipe, run, device="cpu", progress=False)
    return run


def test_twelve_steps_are_five_and_seven(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    stop_at(recipe, tmp_path / "parts", 5)
    assert [p.name for p in sorted((tmp_path / "parts/checkpoints").iterdir())] == ["step-00000003", "step-00000005"]
    outcome = fit(recipe, tmp_path / "parts", device="cpu", progress=False)
    assert (outcome.step, outcome.complete) == (12, True)
    assert_same_run(whole, tmp_path / "parts")


def stop_at(recipe: Recipe, run: Path, step: int, number: int = signal.SIGTERM) -> Outcome:
    """Train until the signal arrives during update `step`."""

    def build_stopping(*args: Any) -> Parts:
        parts = build(*args)
        batches = parts.loader.batches

        def counted(start: int = 0) -> Iterator[Batch]:
            for at, batch in enumerate(batches(start), start=start + 1):
                if at == step + 1:  # drawn for the step after
                    os.kill(os.getpid(), number)
                yield batch

        parts.loader.batches = counted  # type: ignore[method-assign]
        return parts

    return fit(recipe, run, device="cpu", progress=False, build_parts=build_stopping)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    recipe: Recipe, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_stopping(*args: Any) -> Parts:
        os.kill(os.getpid(), number)
        return build(*args)

    origin = {"recipe": "clip_tiny", "set": []}
    outcome = fit(recipe, tmp_path / "run", device="cpu", origin=origin, build_parts=build_stopping)
    assert (outcome.signal, outcome.step, outcome.complete) == (number, 0, False)
    said = capsys.readouterr().err
    assert f"Stopped by {signal.Signals(number).name}. Step 0 of 12 is saved" in said
    assert f"wordsight train --run {tmp_path / 'run'}" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_recipe_is_refused_and_a_free_field_is_not(recipe: Recipe, tmp_path: Path) -> None:
    stop_at(recipe, tmp_path / "run", 4)
    other = replace(recipe, optim=replace(recipe.optim, lr=0.5))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(optim\.lr: 0\.01 there, 0\.5 now\)"):
        fit(other, tmp_path / "run", device="cpu", progress=False)
    assert fit(replace(recipe, keep_checkpoints=1), tmp_path / "run", device="cpu", progress=False).complete


def test_two_trainings_never_share_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", recipe, World(), None).locked(), pytest.raises(ValueError, match="is training into"):
        fit(recipe, tmp_path / "run", device="cpu", progress=False)


@pytest.mark.parametrize("how", ["flipped bit", "cut", "missing file", "no manifest"])
def test_a_damaged_checkpoint_falls_back(
    recipe: Recipe, whole: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(recipe, tmp_path / "run", 7)
    newest = tmp_path / "run/checkpoints/step-00000007"
    file = newest / "optimizer.safetensors"
    if how == "flipped bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "missing file":
        file.unlink()
    else:
        (newest / "manifest.json").unlink()
    capsys.readouterr()
    fit(recipe, tmp_path / "run", device="cpu")
    said = capsys.readouterr().err
    assert f"The checkpoint {newest} is damaged" in said
    assert "Going on from step 6 of 12" in said
    assert_same_run(whole, tmp_path / "run")


def test_all_checkpoints_damaged_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    stop_at(recipe, tmp_path / "run", 4)
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        fit(recipe, tmp_path / "run", device="cpu", progress=False)


@pytest.mark.parametrize("when", ["checkpoint", "metrics", "model"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    recipe: Recipe, whole: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the checkpoint by a real limit: files may not grow over so many bytes (EFBIG)."""
    stop_at(recipe, tmp_path / "run", 6)
    good = "step-00000012" if when == "model" else "step-00000006"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_safetensors(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if when == "checkpoint":
            limit = (tmp_path / "run/checkpoints/step-00000006/model.safetensors").stat().st_size // 2
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        elif when == "metrics":
            patch.setattr(MetricsLog, "write", full)
        else:
            patch.setattr("wordsight.bundle.save", full_for_safetensors)
        try:
            with pytest.raises(DiskFullError, match=rf"The disk is full at step .* The last good checkpoint is .*{good}"):
                fit(recipe, tmp_path / "run", device="cpu", progress=False)
        finally:
            if when == "checkpoint":
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())][-1] == good
    assert not list((tmp_path / "run").glob("*/.tmp*"))
    fit(recipe, tmp_path / "run", device="cpu", progress=False)
    assert_same_run(whole, tmp_path / "run")


def poison(at: set[int]) -> Callable[..., Parts]:
    """Parts whose model gets undefined pixels in some steps."""

    def build_poisoned(*args: Any) -> Parts:
        parts = build(*args)
        batches = parts.loader.batches

        def poisoned(start: int = 0) -> Iterator[Batch]:
            for step, batch in enumerate(batches(start), start=start + 1):
                yield replace(batch, pixels=batch.pixels * float("nan")) if step in at else batch

        parts.loader.batches = poisoned  # type: ignore[method-assign]
        return parts

    return build_poisoned


def test_a_loss_that_is_not_finite_stops(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as error:
        fit(recipe, tmp_path / "run", device="cpu", progress=False, build_parts=poison({5}))
    message = str(error.value)
    assert "Step 5: the loss is nan. Nothing was updated" in message
    assert "step-00000003" in message
    names = (tmp_path / "run/nonfinite-step-5.txt").read_text().split()
    assert len(names) == 10
    assert all(name in message for name in names)
    assert all(torch.isfinite(t).all() for t in state_of(tmp_path / "run").values())


def test_skipping_leaves_the_weights_alone(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipping = replace(recipe, on_nonfinite="skip", keep_checkpoints=12, checkpoint_every_steps=1)
    outcome = fit(skipping, tmp_path / "run", device="cpu", build_parts=poison({5, 6}))
    assert outcome.complete
    assert "Step 5: the loss is nan; the update is skipped" in capsys.readouterr().err
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    for name in ("model", "average", "optimizer"):
        four, six, seven = (load_file(folders[i] / f"{name}.safetensors") for i in (3, 5, 6))
        assert all(torch.equal(four[n], six[n]) for n in four)
        assert any(not torch.equal(six[n], seven[n]) for n in six)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [5, 6]


def test_skipping_for_ever_stops(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wordsight.train.loop.MAX_SKIPS", 3)
    with pytest.raises(NonFiniteError, match="Step 5: the loss is nan, as in the 3 updates before"):
        fit(
            replace(recipe, on_nonfinite="skip"),
            tmp_path / "run",
            device="cpu",
            progress=False,
            build_parts=poison(set(range(2, 20))),
        )


def test_evaluations_choose_the_best_model_and_survive_a_stop(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(evaluator=Retrieval(ks=(1, 5)), data=str(pairs), name="pairs")
    recipe = replace(recipe, evaluations=(evaluation,), evaluate_every_steps=5, best_metric="pairs/text_to_image_R@5")
    whole = fit(recipe, tmp_path / "whole", device="cpu", progress=False)
    stop_at(recipe, tmp_path / "parts", 7)
    parts = fit(recipe, tmp_path / "parts", device="cpu", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert parts == whole
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["pairs/text_to_image_R@5"] for line in lines if "pairs/text_to_image_R@5" in line}
    assert list(measured) == [5, 10, 12]
    assert whole.best is not None
    assert whole.best["value"] == max(measured.values()) == measured[whole.best["step"]]
    model = wordsight.load(tmp_path / "whole")
    assert Retrieval(ks=(1, 5)).run(model, pairs)["text_to_image_R@5"].value == whole.best["value"]
    records = json.loads((tmp_path / "whole/results.json").read_text())
    assert {r["metric"]: r["value"] for r in records}["text_to_image_R@5"] == whole.best["value"]
    wrong = replace(recipe, best_metric="pairs/top1")
    with pytest.raises(
        ValueError, match="best_metric 'pairs/top1' is not measured; the evaluations give pairs/image_to_text_R@1"
    ):
        fit(wrong, tmp_path / "wrong", device="cpu", progress=False)


def test_workers_and_augmentation_change_nothing_on_resuming(recipe: Recipe, tmp_path: Path) -> None:
    augmented = replace(recipe, data=replace(recipe.data, augment=Augment(), crop_scale=None), steps=6)
    fit(augmented, tmp_path / "whole", device="cpu", progress=False)
    stop_at(augmented, tmp_path / "parts", 4)
    fit(replace(augmented, data=replace(augmented.data, num_workers=1)), tmp_path / "parts", device="cpu", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_micro_batches_change_nothing_but_rounding(recipe: Recipe, tmp_path: Path) -> None:
    """Patch dropout, stochastic depth and augmentation belong to the row, however the batch is split."""
    augmented = replace(recipe, data=replace(recipe.data, augment=Augment(), crop_scale=None), steps=4)
    losses = []
    for micro in (None, 3):
        fit(replace(augmented, micro_batch_size=micro), tmp_path / str(micro), device="cpu", progress=False)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()])
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


def test_a_model_and_tokenizer_that_do_not_fit_are_refused_at_the_start(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs its tokenizer"):
        fit(replace(recipe, tokenizer=None), tmp_path / "run", device="cpu", progress=False)
    wide = replace(recipe.model, text=replace(recipe.model.text, vocab_size=600))
    with pytest.raises(ValueError, match=r"the tokenizer has 540 tokens, the text tower 600"):
        fit(replace(recipe, model=wide), tmp_path / "run2", device="cpu", progress=False)


def test_a_machine_that_cannot_compile_is_told(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler(*_: Any, **__: Any) -> None:
        raise InvalidCxxCompiler()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)
        with pytest.raises(
            ValueError, match=r"compile=true does not work here \(InvalidCxxCompiler: .*install it, or set compile=false"
        ):
            fit(replace(recipe, compile=True), tmp_path / "run", device="cpu", progress=False)
