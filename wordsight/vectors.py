"""Vectors on disk that survive a kill: parts written whole or not at all, then merged into one .npy or .parquet file.

The inputs are cut into parts of equal size, a grid that is fixed when the file is begun. So any number of processes may make
parts at once, in any order, and what is made depends on nothing but the inputs.

Shape legend: N rows in all, R rows of one part, D embedding width (or K x D, where K vectors are kept of an input).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.types import BadSample

FORMATS = (".npy", ".parquet")


class VectorFile:
    """A file of vectors, made or in the making.

    `X.npy` gets `X.npy.names.txt` (the names of its rows; a .parquet has them in its column "name") and `X.npy.json` (what it
    depends on, its size, the inputs that could not be read). Until it is made, the parts lie in `X.npy.parts/`. Another model or
    other inputs never go on with what is there.

    One process makes this object and calls `finish`; others may write parts with a copy of it.

    Args:
        path: where the vectors go, .npy or .parquet.
        run: what they depend on, plain JSON values by name (model, inputs, ...).
        num_inputs: how many inputs there are.
        part_size: inputs of a part; the last one may be smaller. Where parts lie there already, theirs holds.
        restart: discard what an earlier run left.

    Attributes:
        is_complete: whether the file is made already; then only `description` is of use.
        part_size: of the parts.

    Raises:
        ValueError: another ending of `path`, or a file or parts there that do not belong to `run`.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, num_inputs: int, part_size: int = 4096, restart: bool = False) -> None:
        check_format(path)
        self.path, self.run, self.num_inputs, self.part_size = path, run, num_inputs, part_size
        self._folder = path.with_name(path.name + ".parts")
        self._run_path = self._folder / "run.json"
        self._names_path = path.with_name(path.name + ".names.txt")
        self._description_path = path.with_name(path.name + ".json")
        if restart:
            for file in (path, self._names_path, self._description_path):
                file.unlink(missing_ok=True)
            self._remove_parts()
        self.is_complete = path.exists()
        if self.is_complete:
            self._check(path, self._description_path, lambda content: content["run"])
            self._remove_parts()  # where a kill came between the last two steps
            return
        if self._folder.exists() and any(not name.startswith(".") for name in os.listdir(self._folder)):
            self._check(self._folder, self._run_path, lambda content: content["run"])
            self.part_size = int(json.loads(self._run_path.read_text(encoding="utf-8"))["part_size"])
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {"run": run, "part_size": self.part_size}
        _write(self._run_path, lambda file: file.write(json.dumps(content, indent=1).encode()))

    @property
    def parts(self) -> list[range]:
        """The inputs of every part, made or not, in order."""
        return [range(i, min(i + self.part_size, self.num_inputs)) for i in range(0, self.num_inputs, self.part_size)]

    @property
    def missing(self) -> list[range]:
        """The parts that are still to be made, as the disk has it now."""
        return [part for part in self.parts if not self._place(part).exists()]

    @property
    def num_done(self) -> int:
        """The inputs that need not be embedded again."""
        return self.num_inputs - sum(map(len, self.missing))

    @property
    def bad(self) -> list[BadSample]:
        """The inputs of the parts made so far that could not be read."""
        found = [part for part in self.parts if self._place(part).exists()]
        return [BadSample(*one) for part in found for one in self._read(self._place(part), "header")["bad"]]

    def _place(self, part: range) -> Path:
        return self._folder / f"part-{part.start:012d}-{part.stop:012d}.npz"

    def _check(self, there: Path, description: Path, get_run: Callable[[Any], Any]) -> None:
        """An error where what is there is not of this run."""
        try:
            found = dict(get_run(json.loads(description.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{there} was not written by wordsight, or its description is gone: choose another file, or restart to replace it"
            ) from None
        differing = sorted(key for key in {**found, **self.run} if found.get(key) != self.run.get(key))
        if differing:
            raise ValueError(
                f"{there} is of a run with another {' and another '.join(differing)}, and vectors of two runs must not be mixed: "
                "choose another file, or restart to replace it"
            )

    def write(self, part: range, vectors_RD: np.ndarray, names: Sequence[str], bad: Sequence[BadSample] = ()) -> None:
        """Write the vectors of a part; once this returns, a kill does not lose them.

        Args:
            part: one of `parts`.
            vectors_RD: one row for each input that could be read, of any shape.
            names: of the R rows.
            bad: the inputs that could not be read.
        """
        assert len(vectors_RD) == len(names)
        assert len(names) + len(bad) == len(part)
        header = {"names": list(names), "bad": [[one.key, one.reason] for one in bad], "shape": vectors_RD.shape[1:]}
        vectors_RD = vectors_RD.astype(np.float32, copy=False)
        _write(self._place(part), lambda file: np.savez(file, vectors=vectors_RD, header=_to_bytes(header)))

    @property
    def description(self) -> dict[str, Any]:
        """Of the finished file: `rows`, `dim`, `bad` (name and reason each) and `run`."""
        content: dict[str, Any] = json.loads(self._description_path.read_text(encoding="utf-8"))
        return content

    def finish(self) -> None:
        """Merge the parts into the file and remove them.

        Raises:
            ValueError: a missing or damaged part, or not one row.
        """
        missing = self.missing
        if missing:
            raise ValueError(
                f"{len(missing)} parts of {self.path} are not there, the first of inputs {missing[0].start:,} to "
                f"{missing[0].stop:,}: give the command again; several machines must share the folder {self._folder}"
            )
        headers = [self._read(self._place(part), "header") for part in self.parts]
        num_rows = sum(len(header["names"]) for header in headers)
        bad = [{"name": name, "reason": reason} for header in headers for name, reason in header["bad"]]
        if num_rows == 0:
            first = f", first {bad[0]['name']}: {bad[0]['reason']}" if bad else ""
            raise ValueError(f"none of the {self.num_inputs} inputs could be read{first}")
        shape = next(header["shape"] for header in headers if header["names"])
        description = {"rows": num_rows, "dim": shape[-1], "bad": bad, "run": self.run}
        if len(shape) > 1:
            description["shape"] = shape  # of what is kept of one input
        if self.path.suffix == ".npy":
            names = "".join(f"{_one_line(name)}\n" for header in headers for name in header["names"])
            _write(self._names_path, lambda file: file.write(names.encode("utf-8", "surrogateescape")))
        _write(self._description_path, lambda file: file.write(json.dumps(description, indent=1, ensure_ascii=False).encode()))
        merge = self._merge_npy if self.path.suffix == ".npy" else self._merge_parquet
        _write(self.path, lambda file: merge(file, num_rows, shape))  # last: from here on it is complete
        self.is_complete = True
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Parts first, then what says whose they are: a kill in between leaves a run that is known."""
        for part in self._folder.glob("part-*.npz"):
            part.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _vectors(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        for path in map(self._place, self.parts):
            names = self._read(path, "header")["names"]
            if names:
                yield self._read(path, "vectors"), names

    def _merge_npy(self, file: Any, num_rows: int, shape: Sequence[int]) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": (num_rows, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for vectors_RD, _ in self._vectors():
            file.write(vectors_RD.astype("<f4", copy=False).tobytes())

    def _merge_parquet(self, file: Any, num_rows: int, shape: Sequence[int]) -> None:
        """A row's numbers lie in one list, whatever their shape, which the description has."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        dim = math.prod(shape)

        schema = pa.schema([("name", pa.string()), ("embedding", pa.list_(pa.float32(), dim))])
        schema = schema.with_metadata({"wordsight": json.dumps(self.run)})
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for vectors_RD, names in self._vectors():
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_RD.reshape(-1)), dim)
                readable = [name.encode("utf-8", "replace").decode() for name in names]
                writer.write_table(pa.Table.from_arrays([pa.array(readable, pa.string()), embedding], schema=schema))

    def _read(self, path: Path, what: str) -> Any:
        try:
            with np.load(path, allow_pickle=False) as content:
                return json.loads(content["header"].tobytes()) if what == "header" else content[what]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and give the command again") from error


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """The names and the vectors of a finished file.

    Returns:
        (N names, float32 [N, D]; of a .npy as a memory map).

    Raises:
        ValueError: no such format, or the file or its names are damaged or not there.
    """
    check_format(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            names = table["name"].to_pylist()
            vectors_ND = np.asarray(table["embedding"].combine_chunks().flatten(), dtype=np.float32).reshape(len(names), -1)
        else:
            vectors_ND = np.load(path, mmap_mode="r", allow_pickle=False)
            lines = path.with_name(path.name + ".names.txt").read_text(encoding="utf-8", errors="surrogateescape")
            names = lines.removesuffix("\n").split("\n")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{path} can't be read as vectors with names: {error}") from error
    if vectors_ND.ndim != 2 or len(names) != len(vectors_ND):
        raise ValueError(f"{path} has {len(names)} names for vectors of shape {vectors_ND.shape}")
    return names, vectors_ND


def check_format(path: Path) -> None:
    """Raise a ValueError unless the ending says .npy or .parquet."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {' or '.join(FORMATS)}")


def _to_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _one_line(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if "\n" in name or "\r" in name else name


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all: a temporary one, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
