"""`wordsight embed`: pictures or texts into vectors, in a .npy or Parquet file, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import DEVICES, in_processes, joined, load_model, processes_option

if TYPE_CHECKING:
    import numpy as np

    from wordsight.data.errors import BadReport
    from wordsight.data.sources import Source
    from wordsight.train.distributed import World
    from wordsight.types import BadSample, Sample
    from wordsight.vectors import VectorFile

PROBES = ("a photo of a cat", "🐈 naïve café, 3D & more")  # their tokens stand for the vocabulary in the model's fingerprint


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight embed runs/quickstart --images photos/*.jpg --out photos.npy
  wordsight embed ViT-B-32.pt --texts captions.csv --out captions.parquet --processes 2
""",
)
@click.argument("model")
@click.option("--images", "image", metavar="PATH...", help="Pictures, folders, tar shards, tables or sample:SPLIT.")
@click.argument("more", nargs=-1, metavar="")
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file (a text a line), or a table (a text a row): csv, tsv, parquet, jsonl.",
)
@click.option("--column", metavar="NAME", help="Of the table. Default: caption, text or the like.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write, .npy or .parquet."
)
@click.option("--architecture", metavar="NAME", help="See `wordsight models`; where the file does not say it.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures or texts at once.")
@click.option("--part-size", type=click.IntRange(1), default=4096, show_default=True, help="Saved after so many.")
@processes_option
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode, of each.")
@click.option("--max-bad-share", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="More is an error.")
@click.option("--reduced-decode", is_flag=True, help="Decode large JPEGs at a reduced scale: faster, a little different.")
@click.option("--restart", is_flag=True, help="Discard what an earlier run left at --out.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for programs, and no progress.")
def command(
    model: str,
    image: str | None,
    more: tuple[str, ...],
    texts: Path | None,
    column: str | None,
    out: Path,
    architecture: str | None,
    batch_size: int,
    part_size: int,
    processes: int,
    workers: int,
    max_bad_share: float,
    reduced_decode: bool,
    restart: bool,
    device: str,
    as_json: bool,
) -> int:
    """Turn pictures or texts into vectors of length 1, float32, a row each.

    Stopped or killed, the same command goes on where it was, with any number of processes. Pictures that can't be read get no row
    and are named at the end. The names of the rows are in X.npy.names.txt or the Parquet column "name"; X.npy.json says what the
    vectors depend on.
    """
    if (image is None) == (texts is None):
        raise click.UsageError("give either --images PATH... or --texts FILE")
    if more and image is None:
        raise click.UsageError(f"unexpected argument: {more[0]}")
    if column is not None and texts is None:
        raise click.UsageError("--column names a column of the table that --texts gives")
    if reduced_decode and image is None:
        raise click.UsageError("--reduced-decode is about the pictures that --images gives")

    from wordsight.vectors import check_format

    check_format(out)
    code = in_processes(processes)
    if code is not None:
        return code
    with joined(device) as world:
        from wordsight.data.texts import read_texts
        from wordsight.evaluate.sharing import from_main

        inputs: Source | list[str]
        if texts is not None:
            inputs = read_texts(texts, column)
        else:
            assert image is not None
            inputs = open_pictures([image, *more])
        loaded = load_model(model, architecture, device, world)

        def begin() -> VectorFile:
            from wordsight.evaluate.results import fingerprint
            from wordsight.vectors import VectorFile

            if isinstance(inputs, list):
                what = {"texts": _digest(inputs)}
            else:
                assert image is not None
                what = {"images": _digest(describe_files([image, *more]))}
            if reduced_decode:  # not said where it is off, so that vectors made before the option go on
                what["decoding"] = "reduced"
            run = {"model": fingerprint(loaded, PROBES, "", "embed"), **what, "inputs": len(inputs)}
            return VectorFile(out, run, num_inputs=len(inputs), part_size=part_size, restart=restart)

        file = from_main(world, begin)
        if file.is_complete:
            if world.is_main:
                click.echo(f"{out} was made before from the same model and inputs.", err=True)
        else:
            if file.num_done and world.is_main:
                click.echo(f"Going on after {file.num_done:,} of {len(inputs):,}.", err=True)
            show = not as_json and sys.stderr.isatty()
            _embed(loaded, inputs, file, _Asked(batch_size, workers, max_bad_share, reduced_decode), world, show)
            world.wait()
            if world.is_main:
                file.finish()
        if world.is_main:
            _say(out, file.description, as_json)
    return 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """How to read the inputs."""

    batch_size: int
    workers: int
    max_bad_share: float
    reduced_decode: bool


class PictureFiles:
    """Picture files as a source: their paths are their names."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.bad: list[Any] = []
        self.part_sizes = [len(self.paths)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        from wordsight.data.tables import read_file
        from wordsight.types import Sample

        return Sample(self.paths[index], read_file(Path(self.paths[index]), self.paths[index]))


def open_pictures(paths: Sequence[str]) -> Source:
    """Picture files, and all that `open_source` takes, one after the other.

    Raises:
        OSError, ValueError: one that is not there, or nothing that can be read.
    """
    from wordsight.data.shards import IMAGE_SUFFIXES
    from wordsight.data.sources import ConcatSource, open_source

    endings = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    sources: list[Source] = []
    files: list[str] = []
    for path in paths:
        if path.lower().endswith(endings) and not Path(path).is_dir():
            if not Path(path).is_file():
                raise FileNotFoundError(f"no such picture: {path}")
            files.append(path)
            continue
        if files:
            sources.append(PictureFiles(files))
            files = []
        sources.append(open_source(path))
    if files:
        sources.append(PictureFiles(files))
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


def describe_files(paths: Sequence[str]) -> list[str]:
    """Name, size and time of every file below the paths: what tells that they are the same as when the run began."""
    from wordsight.data.remote import RemoteFiles
    from wordsight.data.sources import expand

    lines = []
    for path in (found for one in paths for found in expand(one)):
        if isinstance(path, str):  # a URL
            lines.append(f"{path}\t{RemoteFiles().size(path)}\t{RemoteFiles().mark(path)}")
            continue
        for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
            about = file.stat()
            lines.append(f"{file}\t{about.st_size}\t{about.st_mtime_ns}")
    return lines


def _digest(lines: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:32]


def _embed(model: Any, inputs: Source | list[str], file: VectorFile, asked: _Asked, world: World, progress: bool) -> None:
    """Make this process's share of the parts that are missing."""
    from tqdm import tqdm

    from wordsight.data.errors import BadReport

    missing, bad = file.missing, file.bad
    own = missing[world.rank :: world.size]
    world.wait()  # no part may be made before everybody knows what is missing
    report = BadReport(asked.max_bad_share, total=len(inputs))
    report.add(file.num_inputs - sum(map(len, missing)), bad)
    unit = "text" if isinstance(inputs, list) else "picture"
    with tqdm(total=sum(map(len, own)), unit=unit, disable=not progress or not world.is_main) as bar:
        for part in own:
            if isinstance(inputs, list):
                texts = inputs[part.start : part.stop]
                file.write(part, model.embed_texts(texts, batch_size=asked.batch_size).numpy(), texts)
                bar.update(len(part))
            else:
                file.write(part, *_embed_pictures(model, inputs, part, asked, report, bar))


def _embed_pictures(
    model: Any, source: Source, part: range, asked: _Asked, report: BadReport, bar: Any
) -> tuple[np.ndarray, list[str], list[BadSample]]:
    """Vectors and names of a part's pictures that could be read, and the others."""
    import numpy as np

    from wordsight.data.reader import iterate
    from wordsight.data.selection import Selection

    vectors, names = [], []
    bad: list[BadSample] = []
    # whether too many are bad is a question of all parts
    batches = iterate(
        Selection(source, part),
        model.preprocessor,
        batch_size=asked.batch_size,
        num_workers=asked.workers,
        max_bad_share=1.0,
        reduced_decode=asked.reduced_decode,
    )
    for read in batches:
        if read.samples:
            vectors.append(model.embed_pixels(read.pixels).numpy())
        names += [sample.key for sample in read.samples]
        bad += read.bad
        report.add(len(read.samples) + len(read.bad), read.bad)
        bar.update(len(read.samples) + len(read.bad))
    return np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32), names, bad


def _say(out: Path, description: dict[str, Any], as_json: bool) -> None:
    bad = description["bad"]
    if as_json:
        click.echo(json.dumps({"out": str(out), **description}, indent=1, ensure_ascii=False))
        return
    if bad:
        click.echo(f"{len(bad)} {'picture' if len(bad) == 1 else 'pictures'} could not be read and got no row:", err=True)
        for one in bad[:10]:
            click.echo(f"  {one['name']}: {one['reason']}", err=True)
        if len(bad) > 10:
            click.echo(f"  and {len(bad) - 10} more, see {out}.json", err=True)
    click.echo(f"Wrote {out}: {description['rows']:,} rows of {description['dim']} numbers.")
