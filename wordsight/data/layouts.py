"""The data sets that prompt learning is measured on, in the layout of CoOp's instructions; one door for them and one's own data.

One table says where everything lies: the eleven data sets of CoOp (arXiv 2109.01134, section 4.1) and ImageNet's four variants
for domain generalisation. Nothing is fetched; what is missing is named with its place.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from wordsight.data.few_shot import NAMED, Splits
from wordsight.data.listed import (
    PARTS,
    Row,
    class_folders,
    folders_in,
    listed_splits,
    read_folder,
    read_split_file,
    read_split_table,
    require_pictures,
)
from wordsight.data.tables import TABLE_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a published data set lies.

    Attributes:
        title: what the papers call it.
        folder: its folder in the folder of all data sets.
        needs: the files and folders that must lie in it.
        images: its folder of pictures, from which listed paths start.
        num_classes: how many classes are published.
        kind: how it is listed; see `_READERS`.
    """

    title: str
    folder: str
    needs: tuple[str, ...]
    images: str
    num_classes: int
    kind: str = "split"


# fmt: off
LAYOUTS: dict[str, Layout] = {
    "imagenet": Layout(title="ImageNet", folder="imagenet", images="images", num_classes=1000, kind="imagenet",
                       needs=("images/train", "images/val", "classnames.txt")),
    "caltech101": Layout(title="Caltech101", folder="caltech-101", images="101_ObjectCategories", num_classes=100,
                         needs=("101_ObjectCategories", "split_zhou_Caltech101.json")),
    "oxford_pets": Layout(title="OxfordPets", folder="oxford_pets", images="images", num_classes=37,
                          needs=("images", "split_zhou_OxfordPets.json")),
    "stanford_cars": Layout(title="StanfordCars", folder="stanford_cars", images="", num_classes=196,
                            needs=("cars_train", "cars_test", "split_zhou_StanfordCars.json")),
    "oxford_flowers": Layout(title="Flowers102", folder="oxford_flowers", images="jpg", num_classes=102,
                             needs=("jpg", "split_zhou_OxfordFlowers.json")),
    "food101": Layout(title="Food101", folder="food-101", images="images", num_classes=101,
                      needs=("images", "split_zhou_Food101.json")),
    "fgvc_aircraft": Layout(title="FGVCAircraft", folder="fgvc_aircraft", images="images", num_classes=100, kind="aircraft",
                            needs=("images", "variants.txt", *(f"images_variant_{part}.txt" for part in PARTS))),
    "sun397": Layout(title="SUN397", folder="sun397", images="SUN397", num_classes=397,
                     needs=("SUN397", "split_zhou_SUN397.json")),
    "dtd": Layout(title="DTD", folder="dtd", images="images", num_classes=47,
                  needs=("images", "split_zhou_DescribableTextures.json")),
    "eurosat": Layout(title="EuroSAT", folder="eurosat", images="2750", num_classes=10,
                      needs=("2750", "split_zhou_EuroSAT.json")),
    "ucf101": Layout(title="UCF101", folder="ucf101", images="UCF-101-midframes", num_classes=101,
                     needs=("UCF-101-midframes", "split_zhou_UCF101.json")),
    "imagenetv2": Layout(title="ImageNetV2", folder="imagenetv2", num_classes=1000, kind="numbered",
                         images="imagenetv2-matched-frequency-format-val",
                         needs=("imagenetv2-matched-frequency-format-val", "classnames.txt")),
    "imagenet_sketch": Layout(title="ImageNet-Sketch", folder="imagenet-sketch", images="images", num_classes=1000,
                              kind="wordnet", needs=("images", "classnames.txt")),
    "imagenet_a": Layout(title="ImageNet-A", folder="imagenet-adversarial", images="imagenet-a", num_classes=200, kind="wordnet",
                         needs=("imagenet-a", "classnames.txt")),
    "imagenet_r": Layout(title="ImageNet-R", folder="imagenet-rendition", images="imagenet-r", num_classes=200, kind="wordnet",
                         needs=("imagenet-r", "classnames.txt")),
}
# fmt: on
DOMAIN_SHIFTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")  # learn on ImageNet, be judged here
ELEVEN = tuple(name for name in LAYOUTS if name not in DOMAIN_SHIFTS)  # learn on ImageNet, transfer to the other ten


def open_splits(data: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Splits:
    """A data set with its splits, by name or by path; pictures are only listed.

    Args:
        data: one of
            - a published data set's name (`LAYOUTS`, or its title: "dtd", "OxfordPets"), with `root`;
            - a folder: a published data set's, or class folders, also in train/, val/ and test/;
            - a table (.csv, .tsv, .parquet, .jsonl) with columns path, label and, if there is one, split;
            - a split file in the format of `split_zhou_*.json`.
        root: with a name, the folder of all data sets or the data set's own; with a table or split file, the folder that its
            paths start from (None: its own, or the folder of pictures where the file is a published one).

    Returns:
        Splits; classes in the published order, or sorted.

    Raises:
        FileNotFoundError: nothing lies there, or parts of it are missing; says what belongs where.
        ValueError: an unknown name, or a listing that can't be used; says why.
    """
    path = Path(data)
    start = Path(root) if root is not None else None
    if path.is_file():
        if path.suffix.lower() == ".json":
            return read_split_file(path, start if start is not None else _published_root(path))
        if path.name.lower().endswith(TABLE_SUFFIXES):
            return read_split_table(path, start)
        raise ValueError(f"{path} is neither a table ({', '.join(TABLE_SUFFIXES)}) nor a split file (.json)")
    if path.is_dir() and start is None:
        name = next((name for name, layout in LAYOUTS.items() if _complete(path, layout)), None)
        return read_folder(path) if name is None else _read(name, path)
    name = _by_name(os.fspath(data))
    if start is None:
        raise FileNotFoundError(f"no {path} here; to open the published data set {name}, give the folder that holds it as root")
    own = start / LAYOUTS[name].folder
    return _read(name, start if not own.is_dir() and _complete(start, LAYOUTS[name]) else own)


def _by_name(text: str) -> str:
    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    known = {plain(alias): name for name, layout in LAYOUTS.items() for alias in (name, layout.title, layout.folder)}
    if plain(text) in known:
        return known[plain(text)]
    if near := difflib.get_close_matches(plain(text), known, n=1):
        hint = f"did you mean {known[near[0]]}?"
    else:
        hint = f"published data sets are {', '.join(LAYOUTS)}"
    raise FileNotFoundError(f"{text} is no file, no folder and no published data set's name; {hint}")


def _complete(folder: Path, layout: Layout) -> bool:
    return all((folder / need).exists() for need in layout.needs)


def _published_root(path: Path) -> Path | None:
    """Where the paths of a published split file start; None for any other file."""
    for layout in LAYOUTS.values():
        if path.name in layout.needs and layout.kind == "split":
            return path.parent / layout.images
    return None


def _read(name: str, folder: Path) -> Splits:
    """A published data set in its own folder."""
    layout = LAYOUTS[name]
    if missing := [need for need in layout.needs if not (folder / need).exists()]:
        places = "\n".join(f"  {folder / need}" + ("" if Path(need).suffix else os.sep) for need in layout.needs)
        raise FileNotFoundError(
            f"{layout.title} is not complete under {folder}: there is no {', no '.join(missing)}. It belongs there as\n{places}\n"
            "CoOp's DATASETS.md (github.com/KaiyangZhou/CoOp) says where to get it"
        )
    splits = _READERS[layout.kind](name, folder, layout)
    if len(splits.classes) == layout.num_classes:
        return splits
    note = f"{layout.title} is published with {layout.num_classes:,} classes; {folder} has {len(splits.classes):,}"
    return replace(splits, notes=(*splits.notes, note))


# ------------------------------------------------------------------------------------------------------------- the layouts


def _read_split(name: str, folder: Path, layout: Layout) -> Splits:
    """A split file beside a folder of pictures."""
    file = next(need for need in layout.needs if need.endswith(".json"))
    return read_split_file(folder / file, folder / layout.images, name=name)


def _read_imagenet(name: str, folder: Path, layout: Layout) -> Splits:
    """Train and val in folders of WordNet identities; val is what ImageNet is judged by, so there is no validation split."""
    names = read_class_names(folder / "classnames.txt")
    images = folder / layout.images
    present = sorted({*_identities(images / "train", names), *_identities(images / "val", names)})
    rows = {part: _some_pictures(images, under, names) for part, under in (("train", "train"), ("test", "val"))}
    note = "ImageNet's validation pictures are the test split, as is usual; it has no validation split"
    return listed_splits(name, images, rows, [names[identity] for identity in present], (note,))


def _read_wordnet(name: str, folder: Path, layout: Layout) -> Splits:
    """One folder a WordNet identity, for tests only; the classes are those that have a folder."""
    names = read_class_names(folder / "classnames.txt")
    images = folder / layout.images
    classes = [names[identity] for identity in _identities(images, names)]
    return listed_splits(name, images, {"test": _some_pictures(images, "", names)}, classes)


def _read_numbered(name: str, folder: Path, layout: Layout) -> Splits:
    """One folder a class index (0, 1, ..., 999), for tests only; index i is the i-th WordNet identity in sorted order."""
    names = [label for _, label in sorted(read_class_names(folder / "classnames.txt").items())]
    numbered = {str(i): label for i, label in enumerate(names)}
    images = folder / layout.images
    if others := [number for number in folders_in(images) if number not in numbered]:
        raise ValueError(
            f"{images / others[0]} is no class: classnames.txt has {len(names)}, so folders are 0 to {len(names) - 1}"
        )
    return listed_splits(name, images, {"test": _some_pictures(images, "", numbered)}, names)


def _read_aircraft(name: str, folder: Path, layout: Layout) -> Splits:
    """FGVC Aircraft by variant: `variants.txt` names the classes, `images_variant_<split>.txt` has lines `1025794 707-320`."""
    classes = [line for line in _lines(folder / "variants.txt") if line]
    known = set(classes)
    listed = {}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        rows = []
        for number, line in enumerate(_lines(file), start=1):
            picture, _, variant = line.partition(" ")
            if line and variant not in known:
                raise ValueError(f"{file}, line {number}: {variant!r} is no variant of variants.txt")
            if line:
                rows.append((f"{picture}.jpg", variant))
        listed[part] = rows
    splits = listed_splits(name, folder / layout.images, listed, classes)
    return require_pictures(folder / layout.images, splits, f"Put the pictures of {layout.title} there")


_READERS: dict[str, Callable[[str, Path, Layout], Splits]] = {
    "split": _read_split,
    "imagenet": _read_imagenet,
    "wordnet": _read_wordnet,
    "numbered": _read_numbered,
    "aircraft": _read_aircraft,
}


def read_class_names(path: Path) -> dict[str, str]:
    """CoOp's `classnames.txt`, lines `n01440764 tench`: class name by WordNet identity.

    Some names are there twice (the published list calls two classes "missile" and two "sunglasses"). As names tell classes apart
    here, all but the first one get their identity in brackets: "missile (n04008634)". The published program gives both the same
    prompt, so that it can't tell them apart.

    Raises:
        ValueError: a line of another form, or an identity that is there twice.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line:
            continue
        identity, _, name = line.partition(" ")
        if not re.fullmatch(r"n\d+", identity) or not name.strip() or identity in names:
            raise ValueError(
                f"{path}, line {number} is {line[:80]!r}; expected a new identity and a name, such as n01440764 tench"
            )
        names[identity] = name.strip()
    if not names:
        raise ValueError(f"{path} is empty; expected lines such as n01440764 tench")
    seen: set[str] = set()
    for identity, name in sorted(names.items()):
        if name in seen:
            names[identity] = f"{name} ({identity})"
        seen.add(names[identity])
    return names


def published_name(name: str) -> str:
    """A class name without the WordNet identity that `read_class_names` may have put after it."""
    return re.sub(r" \(n\d{8}\)$", "", name)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


def _identities(images: Path, names: dict[str, str]) -> list[str]:
    """The class folders of `images`, sorted, each known to have a name."""
    found = folders_in(images)
    if unknown := [identity for identity in found if identity not in names]:
        raise ValueError(
            f"{len(unknown)} folders in {images} are not in classnames.txt: {', '.join(unknown[:NAMED])}. Take ImageNet's whole "
            "classnames.txt, or move other folders away"
        )
    return found


def _some_pictures(images: Path, under: str, names: dict[str, str]) -> list[Row]:
    """The pictures of `images/under` with class names in place of what their folders are called."""
    rows = [(path, names[folder]) for path, folder in class_folders(images, under)]
    if not rows:
        raise FileNotFoundError(f"no pictures in the class folders of {images / under}")
    return rows
