"""Classes of unequal size: skewed splits, the published long-tailed data sets, sampling that is balanced by class.

The exponential profile is that of CIFAR-LT (Cui et al., arXiv 1901.05555, section 5; counts as in the program of Cao et al.,
arXiv 1906.07413). ImageNet-LT and Places-LT (Liu et al., arXiv 1904.05160) are list files, lines `path label`; iNaturalist 2018
is JSON in COCO's form; CIFAR-10 and CIFAR-100 are read in their binary version.

Shape legend: B rows drawn, C classes.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wordsight.data.errors import BadSampleError
from wordsight.data.few_shot import NAMED, LabelledSet, Splits, _counted, _draw_order
from wordsight.data.layouts import open_splits, read_class_names
from wordsight.data.listed import PART_NAMES, PARTS, Row, _refuse_repeats, is_inside, listed_splits, require_pictures
from wordsight.data.order import sample_uniforms
from wordsight.types import BadSample, Sample

CLASS_NAMES = "classnames.txt"  # beside list files
_LIST_NAME = re.compile(r"(?P<name>.*)_(?P<part>train|val|test)\.txt", re.IGNORECASE)
_BALANCED = 1 << 16  # tells these random numbers from the streams of `data.order`

# Skewed splits


def exponential_counts(num_max: int, num_classes: int, factor: float) -> list[int]:
    """n_c = floor(n_max factor^(-c / (C - 1))), c = 0 to C - 1: the first class has n_max, the last n_max / factor.

    Args:
        num_max: n_max, pictures of the largest class.
        num_classes: C; a single class has n_max.
        factor: largest over smallest, 1 or more; CIFAR-LT has 10, 50, 100 and others.

    Raises:
        ValueError: numbers out of range, or a factor so large that the last class has no picture.
    """
    if num_classes < 1 or num_max < 1 or not 1 <= factor < math.inf:
        raise ValueError(
            f"a profile needs num_classes, num_max and factor of 1 or more, got {num_classes}, {num_max} and {factor}"
        )
    if num_classes > 1 and num_max * (1 + 1e-9) < factor:
        raise ValueError(
            f"with {num_max} pictures in the largest class a factor of {factor:g} leaves the smallest none; take less"
        )
    exact = [num_max * factor ** (-i / max(num_classes - 1, 1)) for i in range(num_classes)]
    return [math.floor(count * (1 + 1e-9)) for count in exact]  # 4999.9999999 is 5000, rounded


def skew(splits: Splits, factor: float, *, seed: int, num_max: int | None = None, num_val: int = 0) -> Splits:
    """Make training pictures of a balanced data set exponentially rare, class after class; val and test stay as they are.

    Which pictures are kept is a function of (seed, class, picture's name) alone, and those of a larger factor are among those of
    a smaller one. The published draw is of NumPy's global random state.

    Args:
        splits: a data set with a train split.
        factor: pictures of the largest class over those of the smallest.
        seed: which pictures.
        num_max: pictures of the first class; None: as many as the smallest class has.
        num_val: pictures of each class to set aside first as a balanced validation split, where there is none.

    Returns:
        The splits, drawn; pictures lie class by class, and notes say the counts.

    Raises:
        ValueError: no train split, a class with fewer pictures than it should have, or a val split beside `num_val`.
    """
    if splits.train is None:
        raise ValueError(f"{splits.name} has no train split to skew")
    if num_val < 0 or (num_val and splits.val is not None):
        raise ValueError(f"num_val is 0 or more, and 0 where there is a val split; got {num_val} for {splits.name}")
    there = {name: count - num_val for name, count in splits.train.counts().items()}
    most = min(there.values()) if num_max is None else num_max
    if most < 1:
        small = {name: count + num_val for name, count in there.items() if count < 1}
        raise ValueError(
            f"{splits.name} has too few training pictures of {_counted(small)}: each class needs {num_val + 1} or more"
        )
    counts = dict(zip(splits.classes, exponential_counts(most, len(splits.classes), factor), strict=True))
    if small := {name: there[name] for name, count in counts.items() if there[name] < count}:
        wanted = ", ".join(str(counts[name]) for name in list(small)[:NAMED])
        raise ValueError(
            f"{len(small)} of {len(counts)} classes of {splits.name} have fewer pictures than the profile asks for: "
            f"{_counted(small)}; asked for are {wanted}. Take a smaller num_max"
        )
    drawn = _draw_order(splits.train, seed)
    train = splits.train.select([i for name, order in drawn.items() for i in order[num_val : num_val + counts[name]]])
    val = splits.train.select([i for order in drawn.values() for i in order[:num_val]]) if num_val else splits.val
    notes = [
        f"training classes skewed from {most} to {min(counts.values())} pictures, factor {factor:g}, seed {seed}: {len(train)}"
    ]
    if num_val:
        notes.append(f"{num_val} validation pictures a class, set aside from train")
    return replace(splits, train=train, val=val, notes=(*splits.notes, *notes))


# Balanced sampling


class ClassBalancedOrder:
    """Class-balanced sampling: every draw picks a class, all alike, then one of its samples, all alike (Kang 2020).

    arXiv 1910.09217. So a sample is drawn with the weight 1 / n_c, with replacement. What is drawn is a function of (seed, epoch,
    position) alone, whatever was asked for before and by whichever process.

    Args:
        targets: the samples' classes, integers of 0 or more. A class without samples is never drawn.
        seed: of the draws.

    Raises:
        ValueError: no samples, or classes that are no such integers.
    """

    def __init__(self, targets: Sequence[int] | NDArray[Any], *, seed: int) -> None:
        found = np.asarray(targets)
        if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer) or found.min() < 0:
            raise ValueError(f"targets are one class a sample, integers of 0 or more; got {found.dtype} of shape {found.shape}")
        self._samples = np.argsort(found, kind="stable")
        sizes = np.bincount(found)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed

    def indices(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions `start` to `stop` of an epoch, which ends where its user ends it.

        Returns:
            int64 [B], B = stop - start.
        """
        if epoch < 0 or not 0 <= start <= stop:
            raise ValueError(f"epochs and positions are 0 or more, start before stop; got epoch {epoch}, {start} to {stop}")
        sequence = np.random.SeedSequence(self._seed, spawn_key=(_BALANCED, epoch))
        own_seed = int(np.random.default_rng(sequence).integers(2**63))
        uniforms_B2 = sample_uniforms(own_seed, np.arange(start, stop))
        classes_B = (uniforms_B2[:, 0] * len(self._sizes)).astype(np.int64)
        within_B = (uniforms_B2[:, 1] * self._sizes[classes_B]).astype(np.int64)
        return np.asarray(self._samples[self._starts[classes_B] + within_B], np.int64)


# Published data sets


def open_long_tail(data: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Splits:
    """A data set for classes of unequal size; pictures are only listed.

    Args:
        data: one of
            - a folder with list files `*_train.txt`, `*_val.txt`, `*_test.txt` (ImageNet-LT, Places-LT), and, where the classes'
              folders are no names, `classnames.txt`: one a line by number, or `n01440764 tench`;
            - a folder with `train2018.json` and `val2018.json` (iNaturalist 2018);
            - a folder with the binary version of CIFAR-10 or CIFAR-100, to be skewed;
            - whatever `layouts.open_splits` opens: class folders, a table, a split file, a published data set's name.
        root: the folder that listed paths start from; None: the folder itself.
    """
    folder = Path(data)
    start = Path(root) if root is not None else folder
    if folder.is_dir():
        if (folder / "train2018.json").is_file():
            return read_inaturalist(folder, start)
        if any((folder / files[0]).exists() for _, files, *_ in _CIFAR) or _is_cifar_for_python(folder):
            return read_cifar(folder)
        if lists := _lists_in(folder):
            names = folder / CLASS_NAMES
            return read_lists(lists, start, name=folder.resolve().name, classes=names if names.is_file() else None)
    return open_splits(data, root)


def _lists_in(folder: Path) -> dict[str, Path]:
    """The list files of a folder by split.

    Raises:
        ValueError: two data sets' lists.
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if (match := _LIST_NAME.fullmatch(path.name)) and path.is_file():
            found[match["name"]][PART_NAMES[match["part"].lower()]] = path
    if len(found) > 1:
        raise ValueError(f"{folder} holds list files of several data sets, {', '.join(sorted(found))}: give each its own folder")
    return next(iter(found.values()), {})


def read_lists(
    lists: Mapping[str, str | os.PathLike[str]],
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> Splits:
    """List files `*_LT_{train,val,test}.txt`: each line a picture's path and its class's number, as ImageNet-LT and Places-LT.

    Args:
        lists: split ("train", "val", "test") -> file.
        root: the folder that paths start from.
        classes: the class names by number; or a file with one a line, or with `n01440764 tench`, which names the class whose
            folder is n01440764 (by number where folders are called otherwise). None: what the classes' folders are called, as
            far as it takes to tell them apart, if each class has one of its own; else the numbers.
        name: what reports call the data set; None: the first file's name.

    Raises:
        ValueError: lines that are not `path label`, paths that lead out of `root`, numbers without a class, a picture listed
            twice; it names the first ten.
        MissingPicturesError: pictures that are not there: all in its `missing`, the first ten in its message.
    """
    if not lists or not set(lists) <= set(PARTS):
        raise ValueError(f"list files are given for {', '.join(PARTS)}, one or more of them; got {', '.join(lists) or 'none'}")
    numbered = {part: _read_list(Path(path)) for part, path in lists.items()}
    names = _class_names(numbered, classes)
    if wrong := sorted({label for rows in numbered.values() for _, label in rows if label >= len(names)}):
        also = ", ".join(map(str, wrong[:NAMED]))
        raise ValueError(f"there are {len(names)} classes, so labels are 0 to {len(names) - 1}; also listed are {also}")
    first = Path(next(iter(lists.values())))
    rows = {part: [(path, names[label]) for path, label in found] for part, found in numbered.items()}
    _refuse_repeats(first.parent, rows)
    match = _LIST_NAME.fullmatch(first.name)
    splits = listed_splits(name or (match["name"] if match else first.stem), Path(root), rows, names, _absent(names, rows))
    return require_pictures(
        Path(root), splits, f"Paths in {first} start from {root}; give another folder as root, or mend the list"
    )


def _read_list(path: Path) -> list[tuple[str, int]]:
    rows, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        picture, label = ["", *line.rsplit(maxsplit=1)][-2:]
        if not (picture and label.isascii() and label.isdecimal() and len(label) < 10):
            problems.append(f"line {number} is {line[:80]!r}, not a path and a class's number")
        elif not is_inside(picture.strip()):
            problems.append(
                f"line {number}: refused path {picture[:80]!r}; paths are relative and stay in the folder of pictures"
            )
        else:
            rows.append((posixpath.normpath(picture.strip()), int(label)))
    if problems:
        first = "".join(f"\n  {line}" for line in problems[:NAMED])
        raise ValueError(f"{path} has {len(problems)} lines that can't be used:{first}\nMend or remove them.")
    if not rows:
        raise ValueError(f"{path} lists no picture; expected lines such as train/n01440764/n01440764_190.JPEG 0")
    return rows


def _class_names(
    numbered: Mapping[str, list[tuple[str, int]]], classes: Sequence[str] | str | os.PathLike[str] | None
) -> tuple[str, ...]:
    if isinstance(classes, str | os.PathLike):
        lines = [line.strip() for line in Path(classes).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        identities = lines and all(re.match(r"n\d+ ", line) for line in lines)
        if not identities:
            return tuple(lines)
        known, folders = read_class_names(Path(classes)), _class_names(numbered, None)
        return tuple(known[name] for name in folders) if set(folders) <= set(known) else tuple(known.values())
    if classes is not None:
        return tuple(classes)
    listed = [row for rows in numbered.values() for row in rows]
    number = max(label for _, label in listed) + 1
    if number > len(listed):
        raise ValueError(f"label {number - 1} asks for {number} classes, and {len(listed)} pictures are listed: name the classes")
    in_folders: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for path, label in numbered.get("train", listed):
        in_folders[label].add(PurePosixPath(path).parts[:-1])
    if len(in_folders) < number or any(len(found) > 1 for found in in_folders.values()):
        return tuple(map(str, range(number)))
    own = [in_folders[i].pop() for i in range(number)]
    ends = Counter(folder[-length:] for folder in own for length in range(1, len(folder) + 1))
    names = [next((f[-length:] for length in range(1, len(f) + 1) if ends[f[-length:]] == 1), ()) for f in own]
    return tuple("/".join(found) for found in names) if all(names) else tuple(map(str, range(number)))


def _absent(classes: Sequence[str], rows: Mapping[str, list[Row]]) -> list[str]:
    """Notes on classes without pictures in a split."""
    notes = []
    for part, found in rows.items():
        there = {label for _, label in found}
        if missing := [name for name in classes if name not in there]:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            notes.append(
                f"{len(missing)} of {len(classes)} classes have no picture in {part}: {', '.join(missing[:NAMED])}{more}"
            )
    return notes


def read_inaturalist(folder: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, year: int = 2018) -> Splits:
    """iNaturalist's `train2018.json` and `val2018.json`: images, annotations and categories as in COCO.

    Its test pictures have no public labels, so val is the test split, as in the papers. The classes are in the order of their
    ids, named by `name` where the file says all of them and they differ, else by id.

    Args:
        folder: where the two files are.
        root: the folder that `file_name` starts from; None: the same.
        year: in the files' names.

    Raises:
        ValueError: another form, an image without annotation or with two classes, a class that only one file has; named.
        MissingPicturesError: pictures that are not there: all in its `missing`, the first ten in its message.
    """
    start = Path(root) if root is not None else Path(folder)
    files = {part: Path(folder) / f"{stem}{year}.json" for part, stem in (("train", "train"), ("test", "val"))}
    content = {part: _read_coco(path) for part, path in files.items()}
    categories = content["train"][1]
    if content["test"][1] != categories:
        changed = sorted(str(i) for i, _ in set(categories.items()) ^ set(content["test"][1].items()))
        raise ValueError(f"{files['train']} and {files['test']} name different categories, ids {', '.join(changed[:NAMED])}")
    ordered = sorted(categories)
    names = [categories[i] for i in ordered]
    if None in names or len(set(names)) < len(names):
        names = [str(i) for i in ordered]
    named = dict(zip(ordered, map(str, names), strict=True))
    rows = {part: [(path, named[category]) for path, category in found[0]] for part, found in content.items()}
    _refuse_repeats(Path(folder), rows)
    notes = ["iNaturalist's validation pictures are the test split, as is usual; it has no validation split"]
    classes = tuple(named.values())
    splits = listed_splits(f"inaturalist{year}", start, rows, classes, [*notes, *_absent(classes, rows)])
    return require_pictures(start, splits, f"Paths in {files['train']} start from {start}; give another folder as root")


def _read_coco(path: Path) -> tuple[list[tuple[str, int]], dict[int, str | None]]:
    """(path, category id) of each image, and name by category id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        categories = {_whole(one["id"]): one.get("name") for one in content["categories"]}
        paths = {_whole(one["id"]): str(one["file_name"]) for one in content["images"]}
        pairs = [(_whole(one["image_id"]), _whole(one["category_id"])) for one in content["annotations"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in COCO's form: images with id and file_name, annotations with image_id and category_id, categories "
            f"with id and name ({type(error).__name__}: {error}). Files of test pictures have no annotations; give train and val"
        ) from error
    found: dict[int, int] = {}
    problems = []
    for image, category in pairs:
        if image not in paths:
            problems.append(f"an annotation is of image {image}, which is not listed")
        elif category not in categories:
            problems.append(f"image {image} is of category {category}, which is not listed")
        elif found.setdefault(image, category) != category:
            problems.append(f"image {image} is of categories {found[image]} and {category}")
    problems += [f"image {image} has no annotation" for image in paths if image not in found]
    problems += [f"image {image}: refused path {name[:80]!r}" for image, name in paths.items() if not is_inside(name)]
    if problems or not paths:
        first = "".join(f"\n  {line}" for line in problems[:NAMED]) or " it lists no image"
        raise ValueError(f"{path} can't be used, {len(problems)} problems:{first}")
    return [(posixpath.normpath(name), found[image]) for image, name in paths.items()], categories


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"an id is an integer, not {value!r:.40}")
    return value


# name, files of pictures (the last one is test), file of class names, bytes of labels before a picture, which one is the class
_CIFAR = (
    ("cifar10", (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"), "batches.meta.txt", 1, 0),
    ("cifar100", ("train.bin", "test.bin"), "fine_label_names.txt", 2, 1),
)
_CIFAR_BYTES = 3 * 32 * 32


class CifarSource:
    """Pictures of CIFAR's binary files; each is read when it is asked for.

    Args:
        files: path and number of pictures of each file.
        labels: the class of each picture.
        label_bytes: bytes before each picture.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], labels: Sequence[str], label_bytes: int) -> None:
        self.bad: list[BadSample] = []
        self.part_sizes = [count for _, count in files]
        self._ends = np.cumsum(self.part_sizes)
        self._files = files
        self._labels = labels
        self._label_bytes = label_bytes

    def __len__(self) -> int:
        return len(self._labels)

    def key(self, index: int) -> str:
        """The name of a picture: its file and its place in there."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._files[file][0].name}/{index - int(self._ends[file]) + self.part_sizes[file]:05d}"

    def __getitem__(self, index: int) -> Sample:
        """The sample with its 32 x 32 picture; raises BadSampleError where the file can't be read any more."""
        from PIL import Image

        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        at = index - int(self._ends[file]) + self.part_sizes[file]
        try:
            with open(self._files[file][0], "rb") as opened:
                opened.seek(at * (self._label_bytes + _CIFAR_BYTES) + self._label_bytes)
                data = opened.read(_CIFAR_BYTES)
        except OSError as error:
            raise BadSampleError(self.key(index), f"can't be read: {error.strerror or error}") from error
        if len(data) < _CIFAR_BYTES:
            raise BadSampleError(self.key(index), "is cut off")
        pixels = np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
        return Sample(self.key(index), Image.fromarray(np.ascontiguousarray(pixels)), (), self._labels[index])


def read_cifar(folder: str | os.PathLike[str]) -> Splits:
    """CIFAR-10 or CIFAR-100 (fine classes) in the binary version; CIFAR-LT is `skew` of it.

    Raises:
        FileNotFoundError: files that are not there.
        ValueError: files of another length, classes out of range, or the version in Python's pickles, which can run code.
    """
    folder = Path(folder)
    if _is_cifar_for_python(folder):
        raise ValueError(
            f"{folder} holds CIFAR's version for Python, pickles that can run code when they are opened; get the binary version "
            "(cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)"
        )
    for name, files, names_file, label_bytes, which in _CIFAR:
        if not any((folder / file).exists() for file in files):
            continue
        if missing := [file for file in (*files, names_file) if not (folder / file).is_file()]:
            raise FileNotFoundError(f"{name} is not complete under {folder}: there is no {', no '.join(missing)}")
        classes = tuple((folder / names_file).read_text(encoding="utf-8").split())
        parts = {
            "train": _read_cifar_files([folder / file for file in files[:-1]], classes, label_bytes, which),
            "test": _read_cifar_files([folder / files[-1]], classes, label_bytes, which),
        }
        return Splits(name=name, classes=classes, train=parts["train"], test=parts["test"])
    raise FileNotFoundError(
        f"no CIFAR under {folder}: expected data_batch_1.bin to data_batch_5.bin, or train.bin, and the tests"
    )


def _is_cifar_for_python(folder: Path) -> bool:
    return (folder / "data_batch_1").is_file() or (folder / "train").is_file()


def _read_cifar_files(paths: Sequence[Path], classes: Sequence[str], label_bytes: int, which: int) -> LabelledSet:
    row = label_bytes + _CIFAR_BYTES
    labels: list[int] = []
    sizes = []
    for path in paths:
        length = path.stat().st_size
        if not length or length % row:
            raise ValueError(f"{path} has {length:,} bytes; a whole number of pictures of {row:,} is expected. Is it all there?")
        sizes.append((path, length // row))
        labels += np.memmap(path, np.uint8, "r").reshape(-1, row)[:, which].tolist()
    if max(labels) >= len(classes):
        raise ValueError(f"{paths[0].parent} has a picture of class {max(labels)}, and {len(classes)} class names")
    source = CifarSource(sizes, [classes[label] for label in labels], label_bytes)
    keys = tuple(source.key(i) for i in range(len(source)))
    return LabelledSet(source=source, keys=keys, labels=tuple(classes[label] for label in labels), classes=tuple(classes))
