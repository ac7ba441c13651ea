"""ImageNet's natural shifts: the same classes in other pictures, and which ImageNet pictures to compare them with.

| Set | Pictures lie in | Classes |
|---|---|---|
| ImageNet-V2 (1902.10811) | `imagenetv2/imagenetv2-matched-frequency-format-val/<number>` | 1,000, numbered in WordNet order |
| ImageNet-Sketch (1905.13549) | `imagenet-sketch/images/<WordNet id>` | 1,000 |
| ImageNet-A (1907.07174) | `imagenet-adversarial/imagenet-a/<WordNet id>` | 200: those that have a folder |
| ImageNet-R (2006.16241) | `imagenet-rendition/imagenet-r/<WordNet id>` | 200: those that have a folder |
| ImageNet-O (1907.07174) | `imagenet-o/<WordNet id>` | none: a folder is one of 200 that it may be taken for |
| ObjectNet (Barbu 2019) | `objectnet-1.0/images/<folder>`, `objectnet-1.0/mappings` | 113 that it shares with ImageNet |

The first four are in the layout of CoOp's instructions (`layouts.LAYOUTS`), the others as they are unpacked. A subset is
classified among its own classes only, and compared with ImageNet's validation pictures of these classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wordsight.data.decode import decode
from wordsight.data.few_shot import NAMED, LabelledSet
from wordsight.data.layouts import LAYOUTS, read_class_names
from wordsight.data.listed import class_folders, folders_in, listed_set
from wordsight.data.sources import Source
from wordsight.types import BadSample, Sample

SHIFTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r", "objectnet")
ANOMALIES = "imagenet_o"
BORDER_PX = 2  # ObjectNet's red frame is 1 px wide; the programs of its published figures for CLIP models cut 2
_MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)
_OTHERS = {"imagenet_o": ("ImageNet-O", "imagenet-o", ""), "objectnet": ("ObjectNet", "objectnet-1.0", "images")}


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A natural shift of ImageNet.

    Attributes:
        name: of `SHIFTS`, or `ANOMALIES`.
        title: what the papers call it.
        pictures: labelled by class; `pictures.classes` is all there is to choose from. Of `ANOMALIES` no label is right.
        ids: class -> the WordNet ids of the ImageNet classes that count as this one.
        border_px: what was cut off each side of each picture.
    """

    name: str
    title: str
    pictures: LabelledSet
    ids: Mapping[str, tuple[str, ...]]
    border_px: int = 0


class Cropped:
    """The pictures of a source without a border.

    Attributes:
        bad: what the source found damaged.
        part_sizes: the source's.
    """

    def __init__(self, source: Source, border_px: int) -> None:
        self._source, self._border = source, border_px
        self.bad: list[BadSample] = source.bad
        self.part_sizes = source.part_sizes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        """The sample, decoded and cut; raises BadSampleError where it can't be read. A picture that is all border stays whole."""
        sample = self._source[index]
        picture = decode(sample.image, key=sample.key)
        width, height = picture.size
        if min(width, height) > 2 * self._border:
            picture = picture.crop((self._border, self._border, width - self._border, height - self._border))
        return replace(sample, image=picture)


def shift_needs(name: str, root: str | Path) -> tuple[tuple[Path, str], ...]:
    """(path, what to put there) of everything that a shift needs, ImageNet's validation pictures aside.

    Raises:
        ValueError: an unknown name.
    """
    title, folder, images = _place(name)
    start = Path(root) / folder
    needs = [(start / images if images else start, f"the pictures of {title}, in a folder for each class")]
    if name == "objectnet":
        needs += [(start / "mappings" / file, "that file of ObjectNet's own mappings folder") for file in _MAPPINGS]
    return tuple(needs)


def imagenet_needs(root: str | Path) -> tuple[tuple[Path, str], ...]:
    """(path, what to put there) of ImageNet's validation pictures."""
    path = Path(root) / LAYOUTS["imagenet"].folder / LAYOUTS["imagenet"].images / "val"
    return ((path, "ImageNet's 50,000 validation pictures, in a folder for each WordNet id"),)


def imagenet_names(root: str | Path) -> dict[str, str]:
    """ImageNet's class names by WordNet id, from the first `classnames.txt` (lines `n01440764 tench`) of a folder of data sets.

    It may lie there, or in the folder of ImageNet or of one of its shifts.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has not 1,000 classes.
    """
    folders = [LAYOUTS[name].folder for name in ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")]
    places = [Path(root) / "classnames.txt", *(Path(root) / folder / "classnames.txt" for folder in folders)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no class names of ImageNet: put CoOp's classnames.txt (lines such as n01440764 tench) at {places[1]}"
        )
    return _thousand(read_class_names(path), str(path))


def open_shift(name: str, root: str | Path, names: Mapping[str, str] | None = None) -> Shift:
    """A natural shift, its pictures only listed.

    Args:
        name: of `SHIFTS`, or `ANOMALIES`.
        root: the folder of all data sets.
        names: ImageNet's class names by WordNet id, each once; None: those of `imagenet_names`.

    Raises:
        FileNotFoundError: parts of it are missing; says what belongs where.
        ValueError: an unknown name, names that are not ImageNet's, folders that are no classes, mappings that do not fit.
    """
    title = _place(name)[0]
    if missing := [(path, what) for path, what in shift_needs(name, root) if not path.exists()]:
        told = "".join(f"\n  {path}: {what}" for path, what in missing)
        raise FileNotFoundError(f"{title} is not complete under {root}; missing:{told}")
    known = _thousand(names, "names") if names is not None else imagenet_names(root)
    images = shift_needs(name, root)[0][0]
    if name == "objectnet":
        return _objectnet(images, sorted(known))
    if name == "imagenetv2":
        folders = {str(i): identity for i, identity in enumerate(sorted(known))}
        chosen = sorted(known)
    else:
        folders = {identity: identity for identity in known}
        chosen = [folder for folder in folders_in(images) if folder in known]
    if others := [folder for folder in folders_in(images) if folder not in folders]:
        raise ValueError(
            f"{len(others)} folders in {images} are no classes of {title}: {', '.join(others[:NAMED])}. Move them away"
        )
    rows = [(path, known[folders[folder]]) for path, folder in class_folders(images)]
    if not rows:
        raise FileNotFoundError(f"no pictures in the class folders of {images}")
    pictures = listed_set(images, rows, [known[identity] for identity in chosen])
    return Shift(name=name, title=title, pictures=pictures, ids={known[identity]: (identity,) for identity in chosen})


def open_imagenet_val(root: str | Path, ids: Mapping[str, Sequence[str]]) -> LabelledSet:
    """ImageNet's validation pictures of some classes, under the names that a shift calls them.

    Args:
        root: the folder of all data sets.
        ids: class -> WordNet ids, e.g. `Shift.ids`.

    Raises:
        FileNotFoundError: no folder of ImageNet's validation pictures, or none for one of the ids.
        ValueError: an id that belongs to two classes.
    """
    ((images, what),) = imagenet_needs(root)
    if not images.is_dir():
        raise FileNotFoundError(f"no {images}: put there {what}")
    counts = Counter(identity for one in ids.values() for identity in one)
    if twice := [identity for identity, count in counts.items() if count > 1]:
        raise ValueError(f"these WordNet ids belong to two classes: {', '.join(twice[:NAMED])}")
    label = {identity: name for name, one in ids.items() for identity in one}
    if missing := sorted(set(label) - set(folders_in(images))):
        raise FileNotFoundError(
            f"{images} has no folder for {len(missing)} of {len(label)} classes: {', '.join(missing[:NAMED])}"
        )
    rows = [(path, label[folder]) for path, folder in class_folders(images) if folder in label]
    return listed_set(images, rows, list(ids))


def shift_title(name: str) -> str:
    """What the papers call a set.

    Raises:
        ValueError: no such set.
    """
    return _place(name)[0]


def _place(name: str) -> tuple[str, str, str]:
    """Title, folder, and the folder of pictures in it."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name not in SHIFTS:
        raise ValueError(f"no natural shift {name!r}: there are {', '.join((*SHIFTS, ANOMALIES))}")
    layout = LAYOUTS[name]
    return layout.title, layout.folder, layout.images


def _thousand(names: Mapping[str, str], where: str) -> dict[str, str]:
    if len(names) != 1000 or len(set(names.values())) != 1000:
        raise ValueError(
            f"{where} has {len(names)} ids and {len(set(names.values()))} different names; ImageNet has 1,000 of each"
        )
    return dict(names)


def _objectnet(images: Path, identities: Sequence[str]) -> Shift:
    """ObjectNet's pictures of the classes that it shares with ImageNet, under its own names in lower case."""
    folder_labels, overlap, numbers, lines = (_mapping(images.parent / "mappings" / name) for name in _MAPPINGS)
    in_2012 = {int(number): identities[int(place)] for place, number in numbers.items()}
    by_name = {line.strip(): in_2012[i] for i, line in enumerate(lines) if i in in_2012}
    folder_of = {label: folder for folder, label in folder_labels.items()}
    ids: dict[str, tuple[str, ...]] = {}
    label_of: dict[str, str] = {}
    for label, named in overlap.items():
        wanted = named.split("; ")
        if unknown := [one for one in wanted if one not in by_name]:
            raise ValueError(
                f"{_MAPPINGS[1]} names {unknown[0]!r}, which is no line of {_MAPPINGS[3]}: take both from one release"
            )
        if label not in folder_of:
            raise ValueError(f"{_MAPPINGS[1]} has the class {label!r}, which {_MAPPINGS[0]} has no folder for")
        ids[label.lower()] = tuple(by_name[one] for one in wanted)
        label_of[folder_of[label]] = label.lower()
    rows = [(path, label_of[folder]) for path, folder in class_folders(images) if folder in label_of]
    if not rows:
        raise FileNotFoundError(f"no pictures in {images} of the {len(ids)} classes that ObjectNet shares with ImageNet")
    listed = listed_set(images, rows, sorted(ids))
    pictures = replace(listed, source=Cropped(listed.source, BORDER_PX))
    return Shift(
        name="objectnet", title="ObjectNet", pictures=pictures, ids={name: ids[name] for name in sorted(ids)}, border_px=BORDER_PX
    )


def _mapping(path: Path) -> Any:
    """The dictionary in a JSON file, or the lines of another."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text.splitlines()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected names and what they map to")
    return content
