"""The folder of an adaptation run: who may write into it, which seeds are done, how the kept classifier takes its place.

```
settings.json        what was asked; another question in the same folder is refused
environment.json     machine and versions of each start
features/            image features by content: computed once for all seeds and methods
tokens/              of the decoder: what it learns from, the same for all seeds that draw the same pictures
features.json        what they cost
seeds/SEED/          classifier/ (without its model), curve.json, nearest_words.json, for each test predictions-, per_class-,
confusions- and
                     reliability-TEST; last of all result.json: figures, validation, costs
classifier/          the kept seed's, with its model: wordsight.load_classifier(DIR)
summary.json         which seed was kept and why, means over seeds, costs
results.json, gallery.json, gallery/, report.html
```
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wordsight.evaluate.results import read_json, write_atomically
from wordsight.train.checkpoint import DISK_FULL, sync_folder
from wordsight.train.distributed import World
from wordsight.train.log import describe_environment
from wordsight.train.recipe import differences
from wordsight.train.rundir import hold

# words of a setting -> the digest that says whether they mean the same: another path to the same model is no difference
SAME_BY = {"words.model": "model", "words.architecture": "model"} | {
    f"words.{name}": "pictures" for name in ("data", "root", "test", "val", "weights", "classes")
}


class AdaptFolder:
    """Everything that a run writes.

    Args:
        path: the folder.
    """

    command = "`wordsight adapt`"

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for a run of these settings.

        Raises:
            ValueError: another process holds it, or it has a run of other settings, or files that are no run of adapt.
            OSError: the disk is full; what is done stays, and the same call goes on from it.
        """
        if not (self.path / "settings.json").exists() and any(
            (self.path / name).exists() for name in ("recipe.json", "classifier")
        ):
            raise ValueError(f"{self.path} holds something else than a run of {self.command}: choose another --run")
        with _naming_a_full_disk(self.path), hold(self.path, "adapting into"):
            self._check(settings)
            self._tidy()
            yield

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.path / "settings.json"
        now = json.loads(json.dumps(settings))  # as it is read back
        old = read_json(path, None)
        if old is None or not any(self.path.glob("*/**/result.json")):  # nothing is done that other settings could mix with
            (self.path / "features.json").unlink(missing_ok=True)
            write_atomically(path, json.dumps(now, indent=1, ensure_ascii=False) + "\n")
            return
        if not isinstance(old, dict) or not isinstance(old.get("identity"), dict):
            raise ValueError(f"{path} is damaged: choose another --run")
        same = {name for name, digest in SAME_BY.items() if old["identity"].get(digest) == now["identity"][digest]}
        changed = [one for one in differences(old, now) if one[0] not in same]
        if changed:
            shown = "; ".join(f"{_plain(key)}: {_short(before)} there, {_short(after)} now" for key, before, after in changed[:5])
            raise ValueError(
                f"{self.path} holds a run of other settings ({shown}). To go on with it, give the same settings; to ask "
                "something else, choose another --run."
            )

    def _tidy(self) -> None:
        """Finish what a killed process has left half done."""
        final, new, old = (self.path / name for name in ("classifier", ".classifier-new", ".classifier-old"))
        if not final.exists() and old.exists():
            os.rename(old, final)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)

    def describe(self, device: torch.device, seed: int) -> None:
        """Add this start of the run to environment.json."""
        path = self.path / "environment.json"
        starts = read_json(path, {"starts": []})["starts"]
        starts.append(describe_environment(World(), device, seed))
        write_atomically(path, json.dumps({"starts": starts}, indent=1) + "\n")

    # ---------------------------------------------------------------------------------------------------------------- seeds

    def seed_dir(self, seed: int) -> Path:
        """A seed's folder."""
        return self.path / "seeds" / str(seed)

    def result(self, seed: int) -> dict[str, Any] | None:
        """What a seed that is done has found; None where it is not."""
        found: dict[str, Any] | None = read_json(self.seed_dir(seed) / "result.json", None)
        return found

    def begin(self, seed: int) -> Path:
        """A seed's folder, without what a killed process has left there."""
        folder = self.seed_dir(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finish(self, seed: int, result: Mapping[str, Any]) -> None:
        """All of a seed is written: say so."""
        write_atomically(self.seed_dir(seed) / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    # ------------------------------------------------------------------------------------------------------------------ whole

    def keep(self, classifier: Any) -> None:
        """Write the kept classifier with its model in the place of the one before, whole or not at all."""
        final, new, old = (self.path / name for name in ("classifier", ".classifier-new", ".classifier-old"))
        classifier.save(new)
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        sync_folder(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def shared_cost(self) -> dict[str, Any] | None:
        """What the features of all pictures cost when they were first computed; None before."""
        found: dict[str, Any] | None = read_json(self.path / "features.json", None)
        return found

    def summary(self) -> dict[str, Any] | None:
        """summary.json, which is written last: None while the run is not complete."""
        found: dict[str, Any] | None = read_json(self.path / "summary.json", None)
        return found

    def write(self, name: str, value: Any) -> None:
        """A JSON file of the folder, whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _naming_a_full_disk(folder: Path) -> Iterator[None]:
    """The system's words for a full disk name no place, and safetensors has an error of its own for it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in DISK_FULL or (isinstance(error, OSError) and error.strerror != os.strerror(number)):
            raise
        raise OSError(
            number,
            f"no room in {folder} ({os.strerror(number)}): what is done there is whole and stays; make room, and run the same "
            "again: it goes on from there",
        ) from error


def _plain(key: str) -> str:
    return key.removeprefix("words.").removeprefix("identity.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
