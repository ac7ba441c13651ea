"""The run folder: recipe.json, environment.json, metrics.jsonl, checkpoints/, best/, last/, results.json, report.html."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.evaluate.folders import hold
from wordsight.train import checkpoint as checkpoints
from wordsight.train.checkpoint import Checkpoint
from wordsight.train.distributed import World
from wordsight.train.log import describe_environment
from wordsight.train.recipe import FREE_ON_RESUME, Recipe, differences, to_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RunFolder:
    """Everything that a run writes; only the main process of a run writes into it."""

    def __init__(self, path: Path, recipe: Recipe, world: World, origin: Mapping[str, Any] | None) -> None:
        """Open a run folder, or lay it out.

        Args:
            path: the folder.
            recipe: what is trained into it.
            world: the processes of the run.
            origin: the user's own words for the recipe, `{"recipe": name, "set": [...]}`.
        """
        self.path, self.recipe, self.world = path, recipe, world
        self.origin = dict(origin or {})
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that two trainings never write into it; the system lets go of it however the process ends.

        Raises:
            ValueError: another process holds it, or the folder's recipe is another one.
        """
        if not self.world.is_main:
            yield
            return
        with hold(self.path, "training into"):
            self._check_recipe()
            self._tidy()
            yield

    def _check_recipe(self) -> None:
        """Write recipe.json, or compare the one that is there."""
        resolved = to_json(self.recipe)
        path = self.path / "recipe.json"
        if path.exists():
            old = read_recipe_file(self.path)["resolved"]
            changed = [d for d in differences(old, resolved) if not d[0].startswith(FREE_ON_RESUME)]
            if changed:
                shown = "; ".join(f"{key}: {before!r} there, {now!r} now" for key, before, now in changed[:10])
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({shown}). To go on with it, give the same settings (or only "
                    f"`--run {self.path}`); to train anew, choose another --run."
                )
        write_atomically(path, json.dumps({**self.origin, "resolved": resolved}, indent=1) + "\n")

    def _tidy(self) -> None:
        """Finish what a killed process has left half done."""
        checkpoints.clean(self.checkpoints)
        for name in ("best", "last"):
            final, new, old = self._places(name)
            if not final.exists() and old.exists():
                os.rename(old, final)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)

    def _places(self, name: str) -> tuple[Path, Path, Path]:
        return self.path / name, self.path / f".{name}-new", self.path / f".{name}-old"

    def describe(self, device: torch.device, step: int) -> None:
        """Add this start of the run to environment.json."""
        path = self.path / "environment.json"
        starts = json.loads(path.read_text())["starts"] if path.exists() and step else []
        parallel = self.recipe.parallel if self.world.size > 1 else None
        starts.append({"step": step, **describe_environment(self.world, device, self.recipe.seed), "parallel": parallel})
        write_atomically(path, json.dumps({"starts": starts}, indent=1) + "\n")

    def newest_checkpoint(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to go on from, the same for every process; None at the beginning."""
        if self.world.is_main:
            found = checkpoints.newest(self.checkpoints, say)
            self.world.gather_objects(found)
            return found
        return self.world.gather_objects(None)[0]

    def last_checkpoint(self) -> Path | None:
        """Where the newest checkpoint lies."""
        found = checkpoints.list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def save_checkpoint(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a checkpoint, whole or not at all."""
        checkpoints.save(self.checkpoints, step, state, tensors, self.recipe.keep_checkpoints)

    def save_model(self, system: Any, name: str, step: int) -> None:
        """Write a model folder with its tokenizer and preprocessing in the place of the one before, or leave that as it was.

        Raises:
            OSError: it could not be written.
        """
        from safetensors import SafetensorError

        from wordsight.bundle import save

        final, new, old = self._places(name)
        shutil.rmtree(new, ignore_errors=True)
        towers = {"image_tower": self.recipe.image_weights, "text_tower": self.recipe.text_weights}
        system.provenance = {
            "source": "wordsight train",
            "recipe": self.origin.get("recipe"),
            "seed": self.recipe.seed,
            "step": step,
            "prompts": self.recipe.prompts,
            **{name: source for name, source in towers.items() if source is not None},
        }
        try:
            save(system, new)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            number = re.search(r"os error (\d+)", str(error))  # how safetensors' writer says it
            if isinstance(error, SafetensorError) and number:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(final)) from error
            raise
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        checkpoints.sync_folder(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def write_text(self, name: str, text: str) -> Path:
        """A file of the run folder, whole or not at all."""
        write_atomically(self.path / name, text)
        return self.path / name

    def write_report(self) -> None:
        """report.html, from what the run folder holds."""
        from wordsight.evaluate.report import write_report

        write_report(self.path)

    def resume_command(self) -> str:
        """What a user types to go on."""
        if not self.origin:
            return f"wordsight.train.loop.fit(recipe, {str(self.path)!r})"
        return f"wordsight train --run {shlex.quote(str(self.path))}"


def read_recipe_file(run_dir: Path) -> dict[str, Any]:
    """recipe.json of a run folder.

    Raises:
        ValueError: it is damaged.
    """
    path = run_dir / "recipe.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["resolved"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --run") from error
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: temporary file, fsync, rename."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
