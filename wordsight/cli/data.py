"""`wordsight data stats|check|build|mine-negatives|long-tail`: look at data, find damage, make shards, find hard negatives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli import data_long_tail

if TYPE_CHECKING:
    from wordsight.data.inspect import Facts
    from wordsight.data.sources import Source
    from wordsight.data.text_rules import RuleResult

SETTINGS = {"help_option_names": ["-h", "--help"]}
PATHS = click.argument("paths", metavar="PATH...", nargs=-1, required=True)
WORKERS = click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read.")
JSON = click.option("--json", "as_json", is_flag=True, help="JSON for programs, and no progress.")
SHARE = click.option(
    "--max-bad-share", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="More bad samples are an error."
)
COLUMNS = (
    click.option("--image-column", metavar="NAME", help="Of a table; default: found by its name."),
    click.option("--caption-column", "caption_columns", metavar="NAME", multiple=True, help="Of a table; repeatable."),
)


def _columns(command: Any) -> Any:
    for option in reversed(COLUMNS):
        command = option(command)
    return command


@click.group(
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  wordsight data stats "shards/{000..009}.tar" --sheet sheet.png
  wordsight data build pairs.csv --out shards --size 256 --format webp
""",
)
def command() -> None:
    """Look at a data set, find what is damaged in it, make shards or a skewed split of it, find hard negatives.

    PATH is a tar shard, glob or brace expansion, a table (CSV, TSV, Parquet, JSON Lines), a folder of either or of pictures, a
    URL of shards (s3://...), or sample:SPLIT.
    """


command.add_command(data_long_tail.command)


@command.command(
    short_help="Count samples, sizes, captions, labels, duplicates.",
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  wordsight data stats sample:train --sheet sheet.png
  wordsight data stats pairs.csv --caption-column title --limit 10000 --json
""",
)
@PATHS
@_columns
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet (PNG).")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Look at N samples, evenly spaced, instead of all.")
@WORKERS
@JSON
def stats(
    paths: tuple[str, ...],
    image_column: str | None,
    caption_columns: tuple[str, ...],
    sheet: Path | None,
    limit: int | None,
    workers: int,
    as_json: bool,
) -> None:
    """Count samples, sizes, caption lengths, labels, duplicates and bad members, by the pictures' headers."""
    from wordsight.data.inspect import contact_sheet, read_facts, summarize

    source = _open(paths, image_column, caption_columns)
    count = min(limit or len(source), len(source))
    positions = [place * len(source) // count for place in range(count)]
    facts = _progress(read_facts(source, full=False, num_workers=workers, positions=positions), count, as_json)
    summary = {"paths": list(paths), "size": len(source), **summarize(facts, source.bad)}
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(source).save(sheet, "PNG")
        summary["sheet"] = str(sheet)
    if as_json:
        click.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        _print_summary(summary)


@command.command(
    short_help="Decode every picture and list what can't be read.",
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  wordsight data check "shards/{000..009}.tar" --workers 4
  wordsight data check photos/ --max-bad-share 0 --json
""",
)
@PATHS
@_columns
@SHARE
@WORKERS
@JSON
def check(
    paths: tuple[str, ...],
    image_column: str | None,
    caption_columns: tuple[str, ...],
    max_bad_share: float,
    workers: int,
    as_json: bool,
) -> int:
    """Decode every picture and list by name what can't be read.

    Exit code 1 where more than --max-bad-share of the samples are bad.
    """
    from wordsight.data.inspect import read_facts

    source = _open(paths, image_column, caption_columns)
    bad = [{"name": one.key, "reason": one.reason} for one in source.bad]
    facts = read_facts(source, full=True, num_workers=workers)
    bad += [{"name": one.key, "reason": one.error} for one in _progress(facts, len(source), as_json) if one.error is not None]
    total = len(source) + len(source.bad)
    failed = len(bad) > max_bad_share * total
    if as_json:
        found = {
            "samples": len(source),
            "bad": bad,
            "bad_share": len(bad) / total,
            "max_bad_share": max_bad_share,
            "ok": not failed,
        }
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        for one in bad:
            click.echo(f"{one['name']}: {one['reason']}")
        allowed = f"more than the {max_bad_share:.1%} allowed" if failed else f"{max_bad_share:.1%} allowed"
        click.echo(f"{len(source):,} samples, {len(bad):,} bad ({len(bad) / total:.2%}, {allowed}).")
    return int(failed)


@command.command(
    short_help="Write tar shards in WebDataset's layout.",
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  wordsight data build photos/ --out shards
  wordsight data build pairs.csv --out shards --size 256 --format webp --workers 4
  wordsight data build pairs.csv --out shards --text-rules align,min_ngram_count=3
""",
)
@PATHS
@_columns
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="A new folder for the shards.")
@click.option("--size", "size_px", type=click.IntRange(1), metavar="PX", help="Shrink pictures to this shorter side.")
@click.option(
    "--format", "file_format", type=click.Choice(["keep", "webp", "jpg", "png"]), help="[default: keep; with --size webp]"
)
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of webp and jpg.")
@click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True, help="Samples in a shard.")
@click.option("--text-rules", metavar="RULES", help="Leave out noisy texts: align, or align,min_ngram_count=3,max_aspect=none.")
@SHARE
@WORKERS
@JSON
def build(
    paths: tuple[str, ...],
    image_column: str | None,
    caption_columns: tuple[str, ...],
    out: Path,
    size_px: int | None,
    file_format: str | None,
    quality: int,
    shard_size: int,
    text_rules: str | None,
    max_bad_share: float,
    workers: int,
    as_json: bool,
) -> None:
    """Write tar shards (WebDataset's layout) of pictures, captions and labels.

    The same samples give the same bytes, and --out appears when all of it is written. Bad samples are left out and named.
    """
    if size_px is not None and file_format == "keep":
        raise click.UsageError("--size encodes pictures anew, so --format must be webp, jpg or png")
    from tqdm import tqdm

    from wordsight.data.build import ShardOptions, build_shards

    source = _open(paths, image_column, caption_columns)
    options = ShardOptions(
        file_format=file_format or ("keep" if size_px is None else "webp"),  # type: ignore[arg-type]
        size_px=size_px,
        quality=quality,
        shard_size=shard_size,
    )
    quiet = as_json or not sys.stderr.isatty()
    ruled = None
    if text_rules is not None:
        source, ruled = _rule(source, text_rules, workers, quiet)
        if not as_json:
            click.echo(str(ruled), err=True)
        if len(source) == 0:
            raise ValueError(f"the text rules leave nothing: {ruled}")
    with tqdm(total=len(source), unit="sample", disable=quiet) as bar:
        shards, report = build_shards(source, out, options, num_workers=workers, max_bad_share=max_bad_share, advance=bar.update)
    num_samples, num_bytes = report.drawn - report.count, sum(shard.stat().st_size for shard in shards)
    if as_json:
        bad = [{"name": one.key, "reason": one.reason} for one in report.samples]
        found = {
            "out": str(out),
            "shards": [shard.name for shard in shards],
            "samples": num_samples,
            "bytes": num_bytes,
            "bad": bad,
        }
        if ruled is not None:
            found["text_rules"] = {"texts": len(ruled.kept), "texts_kept": int(ruled.kept.sum()), "removed": ruled.removed}
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for one in report.samples[:10]:
        click.echo(f"Left out: {one.key}: {one.reason}", err=True)
    if len(report) > 10:
        click.echo(f"Left out: {len(report) - 10} more; `wordsight data check` names them all.", err=True)
    click.echo(f"Wrote {len(shards)} shards with {num_samples:,} samples to {out} ({num_bytes / 1e6:,.1f} MB).")


def _rule(source: Source, text_rules: str, workers: int, quiet: bool) -> tuple[Source, RuleResult]:
    from tqdm import tqdm

    from wordsight.data.text_rules import TextRules, rule_source

    rules = TextRules.parse(text_rules)
    with tqdm(total=len(source), unit="sample", desc="text rules", disable=quiet) as bar:
        return rule_source(source, rules, num_workers=workers, advance=bar.update)


@command.command(
    "mine-negatives",
    short_help="Find hard negatives: similar texts of other pictures.",
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  wordsight data mine-negatives pairs.csv --model runs/mine --out negatives.parquet
  wordsight train clip --set data.sources=pairs.csv --set data.num_negatives=4 --set data.negatives_table=negatives.parquet ...
""",
)
@PATHS
@_columns
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The table to write, .parquet.")
@click.option("--model", metavar="MODEL", help="Whose text embeddings say what is similar.")
@click.option(
    "--vectors",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Embeddings instead: what `wordsight embed --texts` wrote of the lines of --list-texts.",
)
@click.option("--list-texts", type=click.Path(dir_okay=False, path_type=Path), help="Write the data's different texts, and stop.")
@click.option("--k", type=click.IntRange(1), default=8, show_default=True, help="Negatives of each text.")
@click.option("--max-similarity", type=click.FloatRange(-1, 1), help="Leave out texts that are nearer, which may mean the same.")
@click.option("--architecture", metavar="NAME", help="See `wordsight models`; where the model's file does not say it.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@WORKERS
@JSON
def mine_negatives(
    paths: tuple[str, ...],
    image_column: str | None,
    caption_columns: tuple[str, ...],
    out: Path,
    model: str | None,
    vectors: Path | None,
    list_texts: Path | None,
    k: int,
    max_similarity: float | None,
    architecture: str | None,
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    """Find for each text the most similar texts of other pictures, and write the table that training reads.

    Texts of one picture are never each other's negatives. Give --model, or --vectors.
    """
    if sum(option is not None for option in (model, vectors, list_texts)) != 1:
        raise click.UsageError("give one of --model, --vectors and --list-texts")
    if out.suffix.lower() != ".parquet":
        raise click.UsageError(f"--out must end in .parquet, got {out.name}")
    from tqdm import tqdm

    from wordsight.data.inspect import read_facts
    from wordsight.data.negatives import mine

    source = _open(paths, image_column, caption_columns)
    texts: list[str] = []
    pictures: list[bytes] = []
    for facts in _progress(read_facts(source, full=False, num_workers=workers), len(source), as_json):
        own = facts.captions or ((facts.label,) if facts.label else ())
        texts += own
        pictures += [facts.digest] * len(own)
    if not texts:
        raise ValueError(f"no text in {', '.join(paths)}")
    different = list(dict.fromkeys(text.replace("\n", " ") for text in texts) if list_texts else dict.fromkeys(texts))
    if list_texts is not None:
        list_texts.write_text("\n".join(different) + "\n", encoding="utf-8")
        click.echo(f"Wrote {len(different):,} texts to {list_texts}; embed them, and give the vectors with --vectors.")
        return
    found = _vectors_of(different, vectors, model, architecture, device, as_json)
    row_of = {text: row for row, text in enumerate(different)}
    with tqdm(total=len(different), unit="text", disable=as_json or not sys.stderr.isatty()) as bar:
        mined = mine(
            texts,
            found[[row_of[text] for text in texts]],
            k,
            picture_ids=pictures,
            max_similarity=max_similarity,
            advance=bar.update,
        )
    mined.write(out)
    count = int((mined.places >= 0).sum())
    if as_json:
        click.echo(json.dumps({"out": str(out), "texts": len(mined.texts), "negatives": count}, indent=1))
    else:
        click.echo(f"Wrote {out}: {len(mined.texts):,} texts with {count / len(mined.texts):.1f} negatives each.")


def _vectors_of(
    texts: list[str], vectors: Path | None, model: str | None, architecture: str | None, device: str, as_json: bool
) -> Any:
    """[number of texts, D], from a file of `wordsight embed --texts` or from a model."""
    if vectors is not None:
        from wordsight.vectors import read_vectors

        names, found = read_vectors(vectors)
        row_of = {name: row for row, name in enumerate(names)}
        missing = [text for text in texts if text.replace("\n", " ") not in row_of]
        if missing:
            raise ValueError(
                f"{vectors} has no vector for {len(missing):,} of {len(texts):,} texts, the first {missing[0]!r:.80}"
            )
        return found[[row_of[text.replace("\n", " ")] for text in texts]]
    from wordsight.cli.loading import load_model

    assert model is not None
    loaded = load_model(model, architecture, device)
    return loaded.embed_texts(texts, progress=not as_json and sys.stderr.isatty()).numpy()


def _open(paths: tuple[str, ...], image_column: str | None, caption_columns: tuple[str, ...]) -> Source:
    from wordsight.data.sources import DataSource, open_source

    spec = DataSource(path=list(paths), image_column=image_column, caption_columns=list(caption_columns) or None)
    return open_source(spec)


def _progress(facts: Iterable[Facts], total: int, as_json: bool) -> Iterator[Facts]:
    from tqdm import tqdm

    yield from tqdm(facts, total=total, unit="sample", disable=as_json or not sys.stderr.isatty())


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    looked = "" if summary["samples"] == summary["size"] else f", {summary['samples']:,} of them looked at"
    formats = ", ".join(f"{count:,} {name}" for name, count in summary["formats"].items())
    console.print(Text(f"{summary['size']:,} samples{looked}: {formats}; {summary['bytes'] / 1e6:,.1f} MB of pictures"))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in summary["width_px"]:
        table.add_column(name, justify="right")
    titles = {
        "width_px": "width, px",
        "height_px": "height, px",
        "aspect": "width / height",
        "captions_per_sample": "captions a sample",
        "caption_words": "words a caption",
        "caption_tokens": "tokens a caption",
    }
    for key, title in titles.items():
        if summary[key]:
            table.add_row(title, *(f"{value:,.2f}" if key == "aspect" else f"{value:,.0f}" for value in summary[key].values()))
    console.print(table)
    if summary["captions"]:
        console.print("Tokens a caption:")
        most = max(summary["caption_tokens_histogram"].values())
        for bound, count in summary["caption_tokens_histogram"].items():
            label = "over 75" if bound == "more" else f"to {bound}"
            console.print(Text(f"  {label:>8} {count:>9,} {'█' * round(40 * count / most)}"))
    if summary["labels"]:
        first = ", ".join(f"{label} ({count:,})" for label, count in list(summary["labels"].items())[:5])
        console.print(Text(f"{len(summary['labels']):,} labels: {first}{', ...' if len(summary['labels']) > 5 else ''}"))
    notes = {
        "without_caption": "Samples without a caption",
        "cut_captions": "Captions longer than CLIP reads (75 tokens)",
        "repeated_captions": "Captions that are the same as an earlier one",
    }
    for key, title in notes.items():
        console.print(Text(f"{title}: {summary[key]:,}"))
    same = [f"{one['name']} = {one['first']}" for one in summary["duplicates"]]
    _print_names(console, same, "Pictures that are the same file as an earlier one")
    _print_names(console, [f"{one['name']}: {one['reason']}" for one in summary["bad"]], "Bad samples")
    if "sheet" in summary:
        console.print(Text(f"Contact sheet: {summary['sheet']}"))


def _print_names(console: Any, found: list[str], title: str) -> None:
    from rich.text import Text

    console.print(Text(f"{title}: {len(found):,}"))
    for line in found[:5]:
        console.print(Text(f"  {line}"))
    if len(found) > 5:
        console.print(Text("  ... (all of them with --json)"))
