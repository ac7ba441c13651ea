"""The embedded sample data: where it lies, what it holds. See README.md beside this file; `build.py` makes it."""

import json
from pathlib import Path

SPLITS = ("train", "test-seen", "test-unseen", "unseen")


def path() -> Path:
    """The folder of the shards, the manifest, the tokenizer and the licences."""
    return Path(__file__).parent


def manifest() -> dict:
    """The manifest: files with split, number of samples and SHA-256; seen and unseen class names; unseen groups."""
    return json.loads((path() / "manifest.json").read_text(encoding="utf-8"))


def shards(split: str) -> list[str]:
    """Paths of the tar shards of a split, sorted.

    Args:
        split: "train"; "test-seen" (Twemoji, names that were trained); "test-unseen" (Twemoji, names that were not);
            "unseen" (those in the trained drawings); or the stem of one source, such as "train-noto".

    Raises:
        ValueError: no shard belongs to `split`.
    """
    files = manifest()["files"]
    names = [name for name, entry in files.items() if entry["split"] == split or name.rpartition("-")[0] == split]
    if not names:
        stems = sorted({name.rpartition("-")[0] for name in files})
        raise ValueError(f"no split {split!r} in the sample data; there are {', '.join([*SPLITS, *stems])}")
    return [str(path() / name) for name in sorted(names)]
