"""Pictures and JSON of published tests on disk, with errors that say which file, entry and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from wordsight.data.decode import decode
from wordsight.data.errors import BadSampleError

T = TypeVar("T")

PAIR_PX = 448  # the side of the square that holds two pictures
_HALF_PX, _GAP_PX = 220, 8


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture on disk.

    Attributes:
        path: the file.
        box: what is cut out: left, top, right, bottom in pixels.
    """

    path: Path
    box: tuple[int, int, int, int] | None = None

    def __call__(self) -> Image.Image:
        """RGB.

        Raises:
            ValueError: it can't be decoded; names the file.
        """
        try:
            picture = decode(self.path.read_bytes(), key=str(self.path))
        except BadSampleError as error:
            raise ValueError(f"{error}: get it anew, or take its items out of the file that lists it") from error
        return picture if self.box is None else picture.crop(self.box)


@dataclass(frozen=True, slots=True)
class PicturePair:
    """Two pictures side by side on a white square, each as large as its half allows."""

    left: PictureFile
    right: PictureFile

    def __call__(self) -> Image.Image:
        """RGB, `PAIR_PX` x `PAIR_PX`."""
        square = Image.new("RGB", (PAIR_PX, PAIR_PX), "white")
        for k, file in enumerate((self.left, self.right)):
            picture = file()
            scale = min(_HALF_PX / picture.width, PAIR_PX / picture.height)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            left = k * (_HALF_PX + _GAP_PX) + (_HALF_PX - size[0]) // 2
            square.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, (PAIR_PX - size[1]) // 2))
        return square


class Pictures:
    """The folder of a data set's pictures; remembers what is missing, so that it can be told at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: dict[str, None] = {}

    def open(self, name: str, box: tuple[int, int, int, int] | None = None) -> PictureFile:
        """A picture by its name in the folder; it is not read yet."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the name of a picture must lie in {self.folder}, got {name!r}")
        if not (self.folder / name).is_file():
            self.missing[name] = None
        return PictureFile(self.folder / name, box)

    def open_pair(self, left: str, right: str) -> PicturePair:
        """Two pictures as one."""
        return PicturePair(self.open(left), self.open(right))


def read_json(file: Path) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error


def entries(file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, place in words, and object, of a list of objects or an object of objects."""
    whole = read_json(file)
    if not isinstance(whole, list | dict):
        raise ValueError(f"{file} must hold a list or an object of entries, got {type(whole).__name__}")
    for key, entry in whole.items() if isinstance(whole, dict) else enumerate(whole):
        if not isinstance(entry, dict):
            raise ValueError(f"{file}, entry {key} must be an object, got {entry!r:.80}")
        yield str(key), f"{file}, entry {key}", entry


def lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place in words, and object, of JSON lines."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error})") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{file}, line {number} must be an object, got {entry!r:.80}")
            yield f"{file}, line {number}", entry


def get(entry: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """A field of the kind that the format has; a ValueError says where it is not."""
    if key not in entry:
        raise ValueError(f"{where} has no {key!r} (it has {', '.join(map(repr, list(entry)[:10])) or 'nothing'})")
    value = entry[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {key!r} must be of type {kind.__name__}, got {value!r:.80}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    return value


def text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A text, which some files give as a list of one."""
    value = entry.get(key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return get({key: value[0]}, key, str, where)
    return get(entry, key, str, where)
