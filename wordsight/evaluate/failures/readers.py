"""Published tests of composition, read from disk as their authors give them, and scored as items; nothing is fetched.

| name | file | pictures | item |
|---|---|---|---|
| winoground | `examples.jsonl` (or `data/examples.jsonl`) | `images/<image_0>.png` | group |
| aro-relation, aro-attribution | `visual_genome_{relation,attribution}.json` | `images/` | 2 texts |
| aro-order | a JSON list of `{"image", "caption_options"}`, the true one first | where "image" leads | 5 texts |
| sugarcrepe | seven files, `add_att.json` ... `swap_obj.json` | COCO's `val2017/` | 2 texts |
| valse | one instrument's JSON, e.g. `existence.json` | that instrument's | 2 texts |
| clevr-counts | `scenes/CLEVR_<split>_scenes.json` | `images/<split>/` | 8 texts |
| nlvr2 | JSON lines, e.g. `dev.json` | `<pair>-img0.png`, `<pair>-img1.png` | 2 pictures |

Papers: Winoground 2204.03162, ARO 2210.01936, SugarCrepe 2306.14610, VALSE 2112.07566, CLEVR 1612.06890 (as counting: VTAB,
1910.04867), NLVR2 1811.00491.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wordsight.evaluate.failures.files import Pictures, entries, get, lines, read_json, text
from wordsight.evaluate.failures.items import Item, judge_items
from wordsight.evaluate.intervals import share_interval
from wordsight.evaluate.results import Finding
from wordsight.types import Metric

MISSING_SHOWN = 10  # pictures that an error names
SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CLEVR_COUNTS = range(3, 11)
VALID_VOTES = 2  # of VALSE's three annotators

_Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published test, read and ready to be scored.

    Attributes:
        name: one of READERS, with its part, e.g. "valse existence".
        items: the questions.
        how: what the protocol says of how they were made.
        notes: what a reader should know.
        least_in_row: a metric `mean_per_row` is the mean of the rows with so many items or more, over which its interval is;
            None: there is no such metric.
    """

    name: str
    items: tuple[Item, ...]
    how: str
    notes: tuple[str, ...] = ()
    least_in_row: int | None = None

    def run(self, model: Any) -> dict[str, Metric]:
        """The figures alone."""
        return self.judge(model).metrics

    def judge(self, model: Any, *, batch_size: int = 64, progress: bool = False) -> Finding:
        """The figures with their protocol, fingerprint, outcomes and table; arguments as of `FailureMode.judge`."""
        protocol = f"{self.name}, {len(self.items)} items, {self.how}"
        found = judge_items(
            model, self.items, task=self.name, protocol=protocol, notes=self.notes, batch_size=batch_size, progress=progress
        )
        if self.least_in_row is None:
            return found
        rows = [line["accuracy"] for line in found.table if line["items"] >= self.least_in_row]
        if len(rows) < 2:
            note = f"no mean_per_row: {len(rows)} rows have {self.least_in_row} items or more"
            return replace(found, notes=(*found.notes, note))
        chance = found.metrics["accuracy"].chance
        mean = Metric(sum(rows) / len(rows), len(rows), share_interval(rows), "fraction", chance)
        return replace(found, metrics=found.metrics | {"mean_per_row": mean})


def published(name: str, path: _Path, images: _Path | None = None) -> Published:
    """Read a published test by its name.

    Args:
        name: one of `READERS`.
        path: its file or folder; see the module's docstring.
        images: its folder of pictures; None: where its authors put them, or beside the file.

    Raises:
        FileNotFoundError: the file, the folder or pictures are not there; says which.
        ValueError: an unknown name, or a file that is not in its format; says where.
    """
    if name not in READERS:
        raise ValueError(f"published tests are {', '.join(READERS)}, got {name!r}")
    return READERS[name](path, images)


@dataclass(frozen=True, kw_only=True)
class PublishedTest:
    """A published test that is read when it is measured, as an item of a suite.

    Attributes:
        name, path, images: see `published`.
    """

    name: str
    path: str | Path
    images: str | Path | None = None

    def judge(self, model: Any, *, batch_size: int = 64, progress: bool = False) -> Finding:
        """What `Published` finds."""
        return published(self.name, self.path, self.images).judge(model, batch_size=batch_size, progress=progress)


# --------------------------------------------------------------------------------------------------------------- the readers


def winoground(path: _Path, images: _Path | None = None) -> Published:
    """Winoground: groups; rows are its collapsed tags ("Object", "Relation", "Both") where the file has them.

    Args:
        path: the folder of the data set.
        images: the folder of pictures; None: `images` in `path`.
    """
    folder = Path(path)
    file = next((file for file in (folder / "examples.jsonl", folder / "data" / "examples.jsonl") if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"Winoground needs {folder / 'examples.jsonl'} (or in data/); get it from facebook/winoground")
    pictures = Pictures(Path(images) if images is not None else folder / "images")
    items = []
    for where, entry in lines(file):
        number = get(entry, "id", int, where)
        names = [get(entry, f"image_{k}", str, where) for k in (0, 1)]
        tag = entry.get("collapsed_tag")
        items.append(
            Item(
                key=f"winoground/{number}",
                rows=(tag,) if isinstance(tag, str) and tag else (),
                group=str(number),
                pictures=tuple(pictures.open(name if Path(name).suffix else f"{name}.png") for name in names),
                texts=tuple(get(entry, f"caption_{k}", str, where) for k in (0, 1)),
                right=(0, 1),
            )
        )
    return _made("winoground", items, pictures, "as published", file)


def aro_relation(path: _Path, images: _Path | None = None, *, leave_out: Collection[str] = ()) -> Published:
    """ARO's Visual Genome Relation; rows are relations, of which the paper reports the mean without symmetric ones.

    Args:
        path: the folder that holds `visual_genome_relation.json`, or the file.
        images: the folder of pictures; None: `images` beside the file.
        leave_out: relations that are not asked, e.g. those that the authors take for symmetric.
    """
    found = _visual_genome("aro-relation", path, images, lambda entry, where: get(entry, "relation_name", str, where), leave_out)
    return replace(found, least_in_row=1)


def aro_attribution(path: _Path, images: _Path | None = None) -> Published:
    """ARO's Visual Genome Attribution; rows are pairs of attributes, 25 items or more in a row for the mean of rows.

    Args:
        path: the folder that holds `visual_genome_attribution.json`, or the file.
        images: the folder of pictures; None: `images` beside the file.
    """

    def row(entry: Mapping[str, Any], where: str) -> str:
        pair = get(entry, "attributes", list, where)
        if len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise ValueError(f"{where}: 'attributes' must be two texts, got {pair!r:.80}")
        return f"{pair[0]}_{pair[1]}"

    return replace(_visual_genome("aro-attribution", path, images, row, ()), least_in_row=25)


def _visual_genome(
    name: str,
    path: _Path,
    images: _Path | None,
    row_of: Callable[[Mapping[str, Any], str], str],
    leave_out: Collection[str],
) -> Published:
    file = Path(path) / f"visual_genome_{name.removeprefix('aro-')}.json" if Path(path).is_dir() else Path(path)
    pictures = Pictures(Path(images) if images is not None else file.parent / "images")
    items = []
    for key, where, entry in entries(file):
        row = row_of(entry, where)
        if row in leave_out:
            continue
        left, top, width, height = (get(entry, f"bbox_{side}", int, where) for side in "xywh")
        if width < 1 or height < 1:
            raise ValueError(f"{where}: a box must be a pixel or more in size, got bbox_w={width}, bbox_h={height}")
        picture = get(entry, "image_path", str, where)
        items.append(
            Item(
                key=f"{name}/{key}",
                rows=(row,),
                group=picture,
                pictures=(pictures.open(picture, (left, top, left + width, top + height)),),
                texts=(get(entry, "true_caption", str, where), get(entry, "false_caption", str, where)),
                right=(0,),
            )
        )
    how = "cut to the box" + (f", {len(leave_out)} of the relations left out" if leave_out else "")
    return _made(name, items, pictures, how, file, ("the paper's figure is mean_per_row",))


def aro_order(path: _Path, images: _Path | None = None) -> Published:
    """ARO's COCO or Flickr30k Order: one true caption among shuffled ones.

    ARO shuffles with a parser when it runs, so there is no published file: `path` is its `test_cases` as a JSON list.

    Args:
        path: the file.
        images: the folder that "image" starts from; None: the file's own.
    """
    file = Path(path)
    pictures = Pictures(Path(images) if images is not None else file.parent)
    items = []
    for key, where, entry in entries(file):
        options = get(entry, "caption_options", list, where)
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise ValueError(f"{where}: 'caption_options' must be two texts or more, the true one first, got {options!r:.80}")
        picture = get(entry, "image", str, where)
        items.append(
            Item(
                key=f"aro-order/{key}",
                rows=(),
                group=picture,
                pictures=(pictures.open(picture),),
                texts=tuple(options),
                right=(0,),
            )
        )
    return _made("aro-order", items, pictures, "captions as given", file)


def sugarcrepe(path: _Path, images: _Path | None = None) -> Published:
    """SugarCrepe; rows are its seven categories.

    Args:
        path: the folder of the seven JSON files.
        images: COCO's `val2017`; None: `val2017` in `path`.
    """
    folder = Path(path)
    if missing := [name for name in SUGARCREPE if not (folder / f"{name}.json").exists()]:
        raise FileNotFoundError(f"SugarCrepe's {', '.join(f'{name}.json' for name in missing)} belong into {folder}")
    pictures = Pictures(Path(images) if images is not None else folder / "val2017")
    items = []
    for category in SUGARCREPE:
        for key, where, entry in entries(folder / f"{category}.json"):
            picture = get(entry, "filename", str, where)
            items.append(
                Item(
                    key=f"sugarcrepe/{category}/{key}",
                    rows=(category,),
                    group=picture,
                    pictures=(pictures.open(picture),),
                    texts=(get(entry, "caption", str, where), get(entry, "negative_caption", str, where)),
                    right=(0,),
                )
            )
    return _made("sugarcrepe", items, pictures, "as published", folder)


def valse(path: _Path, images: _Path | None = None, *, only_valid: bool = True) -> Published:
    """One instrument of VALSE: the caption scores higher than its foil (the paper's acc_r).

    Args:
        path: the instrument's JSON file.
        images: its folder of pictures; None: `images` beside the file.
        only_valid: leave out items for which fewer than two of three annotators chose the caption alone, as the authors ask.
    """
    file = Path(path)
    pictures = Pictures(Path(images) if images is not None else file.parent / "images")
    items, left_out = [], 0
    for key, where, entry in entries(file):
        votes = get(get(entry, "mturk", dict, where), "caption", int, f"{where}, 'mturk'")
        if only_valid and votes < VALID_VOTES:
            left_out += 1
            continue
        picture = get(entry, "image_file", str, where)
        items.append(
            Item(
                key=f"valse/{file.stem}/{key}",
                rows=(),
                group=picture,
                pictures=(pictures.open(picture),),
                texts=(text(entry, "caption", where), text(entry, "foil", where)),
                right=(0,),
            )
        )
    how = f"{VALID_VOTES} of 3 annotators agree" if only_valid else "not validated items too"
    notes = (f"{left_out} items are not valid by their annotators and left out",) if left_out else ()
    return _made(f"valse {file.stem}", items, pictures, how, file, notes)


def clevr_counts(path: _Path, images: _Path | None = None, *, split: str = "val") -> Published:
    """CLEVR's scenes as classes 3 to 10 by their number of objects, with CLIP's prompt; rows are the numbers.

    Args:
        path: the folder CLEVR_v1.0.
        images: the folder of the split's pictures; None: `images/<split>` in `path`.
        split: "val" or "train"; the scenes of the test split are not published.
    """
    file = Path(path) / "scenes" / f"CLEVR_{split}_scenes.json"
    pictures = Pictures(Path(images) if images is not None else Path(path) / "images" / split)
    whole = read_json(file)
    scenes = get(whole if isinstance(whole, dict) else {}, "scenes", list, str(file))
    texts = tuple(f"a photo of {count} objects." for count in CLEVR_COUNTS)
    items = []
    for i, scene in enumerate(scenes):
        where = f"{file}, entry {i}"
        if not isinstance(scene, dict):
            raise ValueError(f"{where} must be an object, got {scene!r:.80}")
        count, picture = len(get(scene, "objects", list, where)), get(scene, "image_filename", str, where)
        if count not in CLEVR_COUNTS:
            raise ValueError(f"{where}: CLEVR's scenes have 3 to 10 objects, this one {count}")
        items.append(
            Item(
                key=f"clevr-counts/{picture}",
                rows=(str(count),),
                group=picture,
                pictures=(pictures.open(picture),),
                texts=texts,
                right=(count - CLEVR_COUNTS.start,),
            )
        )
    return _made("clevr-counts", items, pictures, f"{split}, prompt 'a photo of N objects.'", file)


def nlvr2(path: _Path, images: _Path | None = None) -> Published:
    """NLVR2 for models that give scores: is a sentence nearer to a pair that it is true of than to one that it is false of?

    The two pictures of a pair lie side by side on one square. A sentence that comes with pairs of both kinds asks of every (true,
    false) two of them; other sentences are left out. This is not NLVR2's accuracy, which needs a threshold.

    Args:
        path: the JSON lines.
        images: the folder of pictures, as NLVR2 names them; None: `images` beside the file.
    """
    file = Path(path)
    pictures = Pictures(Path(images) if images is not None else file.parent / "images")
    sentences: dict[str, tuple[str, dict[bool, list[str]]]] = {}
    for where, entry in lines(file):
        identifier, label = get(entry, "identifier", str, where), str(entry.get("label")).lower()
        parts = identifier.split("-")
        if len(parts) != 4 or label not in ("true", "false"):
            raise ValueError(
                f"{where}: expected an identifier such as dev-850-0-0 and a label True or False, got {identifier!r:.60} and "
                f"{entry.get('label')!r:.20}"
            )
        name = f"{parts[0]}-{parts[1]}-{parts[3]}"
        _, pairs = sentences.setdefault(name, (get(entry, "sentence", str, where), {True: [], False: []}))
        pairs[label == "true"].append("-".join(parts[:3]))
    items: list[Item] = []
    one_sided = 0
    for name, (sentence, pairs) in sentences.items():
        one_sided += not (pairs[True] and pairs[False])
        for true, false in ((true, false) for true in pairs[True] for false in pairs[False]):
            shown = [pictures.open_pair(f"{pair}-img0.png", f"{pair}-img1.png") for pair in (true, false)]
            place = len(items) % 2  # the right one comes first as often as second
            items.append(
                Item(
                    key=f"nlvr2/{name}/{true}/{false}",
                    rows=(),
                    group=name,
                    pictures=tuple(shown if place == 0 else shown[::-1]),
                    texts=(sentence,),
                    right=(place,),
                )
            )
    notes = (f"{one_sided} sentences come with pairs of one kind alone and ask nothing",) if one_sided else ()
    return _made("nlvr2", items, pictures, "pairs side by side on a square, each true pair against each false one", file, notes)


def _made(name: str, items: Sequence[Item], pictures: Pictures, how: str, file: Path, notes: tuple[str, ...] = ()) -> Published:
    """The test, once all its pictures are known to be there."""
    if pictures.missing:
        shown = ", ".join(list(pictures.missing)[:MISSING_SHOWN])
        more = len(pictures.missing) - MISSING_SHOWN
        raise FileNotFoundError(
            f"{len(pictures.missing)} pictures of {name} are not in {pictures.folder}: {shown}"
            + (f" and {more} more" if more > 0 else "")
        )
    if not items:
        raise ValueError(f"{file} holds no item of {name}" + (f" ({'; '.join(notes)})" if notes else ""))
    return Published(name=name, items=tuple(items), how=how, notes=notes)


READERS: dict[str, Callable[[_Path, _Path | None], Published]] = {
    "winoground": winoground,
    "aro-relation": aro_relation,
    "aro-attribution": aro_attribution,
    "aro-order": aro_order,
    "sugarcrepe": sugarcrepe,
    "valse": valse,
    "clevr-counts": clevr_counts,
    "nlvr2": nlvr2,
}
