"""`wordsight embed`: pictures or texts into vectors, in a .npy or Parquet file, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import DEVICES, load_model

if TYPE_CHECKING:
    from wordsight.data.sources import Source
    from wordsight.types import BadSample, Sample
    from wordsight.vectors import VectorFile

PROBES = ("a photo of a cat", "🐈 naïve café, 3D & more")  # their tokens stand for the vocabulary in the model's fingerprint


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight embed runs/quickstart --images photos/*.jpg --out photos.npy
  wordsight embed ViT-B-32.pt --texts captions.txt --out captions.parquet
""",
)
@click.argument("model")
@click.option("--images", "image", metavar="PATH...", help="Pictures, folders, tar shards, tables or sample:SPLIT.")
@click.argument("more", nargs=-1, metavar="")
@click.option("--texts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A text file: a text a line.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write, .npy or .parquet."
)
@click.option("--architecture", metavar="NAME", help="See `wordsight models`; where the file does not say it.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures or texts at once.")
@click.option("--part-size", type=click.IntRange(1), default=4096, show_default=True, help="Saved after so many.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode pictures.")
@click.option("--max-bad-share", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="More is an error.")
@click.option("--restart", is_flag=True, help="Discard what an earlier run left at --out.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for programs, and no progress.")
def command(
    model: str,
    image: str | None,
    more: tuple[str, ...],
    texts: Path | None,
    out: Path,
    architecture: str | None,
    batch_size: int,
    part_size: int,
    workers: int,
    max_bad_share: float,
    restart: bool,
    device: str,
    as_json: bool,
) -> None:
    """Turn pictures or texts into vectors of length 1, float32, a row each.

    Stopped or killed, the same command goes on where it was. Pictures that can't be read get no row and are named at the end. The
    names of the rows are in X.npy.names.txt or the Parquet column "name"; X.npy.json says what the vectors depend on.
    """
    if (image is None) == (texts is None):
        raise click.UsageError("give either --images PATH... or --texts FILE")
    if more and image is None:
        raise click.UsageError(f"unexpected argument: {more[0]}")

    from wordsight.vectors import VectorFile, check_format

    check_format(out)
    progress = not as_json and sys.stderr.isatty()
    inputs: Source | list[str]
    if texts is not None:
        inputs = read_lines(texts)
        what = {"texts": _digest(inputs)}
    else:
        assert image is not None
        inputs = open_pictures([image, *more])
        what = {"images": _digest(describe_files([image, *more]))}
    loaded = load_model(model, architecture, device)

    from wordsight.evaluate.results import fingerprint

    file = VectorFile(out, {"model": fingerprint(loaded, PROBES, "", "embed"), **what, "inputs": len(inputs)}, restart=restart)
    if file.is_complete:
        click.echo(f"{out} was made before from the same model and inputs.", err=True)
    else:
        if file.num_done:
            click.echo(f"Going on after {file.num_done:,} of {len(inputs):,}.", err=True)
        if isinstance(inputs, list):
            _embed_texts(loaded, inputs, file, batch_size, part_size, progress)
        else:
            _embed_images(loaded, inputs, file, batch_size, part_size, workers, max_bad_share, progress)
        file.finish()
    _say(out, file.description, as_json)


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


class Rest:
    """What of a source comes from `start` on."""

    def __init__(self, source: Source, start: int) -> None:
        self.source, self.start = source, start
        self.bad: list[Any] = []
        self.part_sizes = [len(self)]

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.start + index]


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
    from wordsight.data.sources import _expand

    lines = []
    for path in (found for one in paths for found in _expand(one)):
        if isinstance(path, str):  # a URL
            lines.append(f"{path}\t{RemoteFiles().size(path)}\t{RemoteFiles().mark(path)}")
            continue
        for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
            about = file.stat()
            lines.append(f"{file}\t{about.st_size}\t{about.st_mtime_ns}")
    return lines


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, empty ones too, so that row i belongs to line i + 1.

    Raises:
        ValueError: not UTF-8, or no line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"{path} is empty: write a text a line")
    return lines


def _digest(lines: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:32]


def _embed_texts(model: Any, texts: list[str], file: VectorFile, batch_size: int, part_size: int, progress: bool) -> None:
    from tqdm import tqdm

    with tqdm(total=len(texts), initial=file.num_done, unit="text", disable=not progress) as bar:
        while file.num_done < len(texts):
            part = texts[file.num_done : file.num_done + part_size]
            file.append(len(part), model.embed_texts(part, batch_size=batch_size).numpy(), part)
            bar.update(len(part))


def _embed_images(
    model: Any,
    source: Source,
    file: VectorFile,
    batch_size: int,
    part_size: int,
    workers: int,
    max_bad_share: float,
    progress: bool,
) -> None:
    import numpy as np
    from tqdm import tqdm

    from wordsight.data.reader import iterate

    num_inputs, vectors, names = 0, [], []
    bad: list[BadSample] = []
    rest = Rest(source, file.num_done)
    with tqdm(total=len(source), initial=file.num_done, unit="picture", disable=not progress) as bar:
        for read in iterate(rest, model.preprocessor, batch_size=batch_size, num_workers=workers, max_bad_share=max_bad_share):
            num_inputs += len(read.samples) + len(read.bad)
            if read.samples:
                vectors.append(model.embed_pixels(read.pixels).numpy())
            names += [sample.key for sample in read.samples]
            bad += read.bad
            bar.update(len(read.samples) + len(read.bad))
            if num_inputs >= part_size or file.num_done + num_inputs == len(source):
                file.append(num_inputs, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32), names, bad)
                num_inputs, vectors, names, bad = 0, [], [], []


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
