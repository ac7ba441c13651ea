"""Dassl's few-shot files, `split_fewshot/shot_{K}-seed_{S}.pkl`: which pictures CoOp (arXiv 2109.01134) and its followers drew.

They are pickles of {"train": [Datum, ...], "val": [Datum, ...]}. A pickle is a program. Here its instructions are looked through
before any of them is followed: only those that make texts, numbers, lists, dictionaries and `Datum` objects are known, the only
name that may be looked up is Dassl's Datum, and what stands for it is a plain record. That covers pickle protocols 2 to 5; CoOp
writes the highest.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wordsight.data.few_shot import NAMED, LabelledSet, Splits
from wordsight.data.layouts import published_name

MAX_BYTES = 64 << 20  # 16 shots of 1,000 classes take 2 MB
_DATUM = ("dassl.data.datasets.base_dataset", "Datum")
_FIELDS = {"_impath": str, "_label": int, "_domain": int, "_classname": str}
_INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL NEWOBJ BUILD "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture that was drawn.

    Attributes:
        path: where it lay on the machine that drew it.
        label: its class index, in [0, C).
        class_name: its class name.
        domain: its domain's index; 0 in CoOp's data sets.
    """

    path: str
    label: int
    class_name: str
    domain: int


class _Datum:
    """Stands for Dassl's Datum while a pickle is read: keeps its state, does nothing."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or {k: type(v) for k, v in state.items()} != _FIELDS:
            raise pickle.UnpicklingError(f"a Datum with {str(state)[:100]} in it, not with {', '.join(_FIELDS)}")
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != _DATUM:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Datum


def read_few_shot(path: str | Path) -> dict[str, list[Shot]]:
    """The pictures that a few-shot file lists, by split ("train", and "val" where there is one).

    Args:
        path: `shot_{K}-seed_{S}.pkl`, of pickle protocol 2 to 5.

    Raises:
        ValueError: it asks for more than Dassl's Datum (nothing of it is run), is damaged or too large, or holds something else.
        OSError: the file can't be opened.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"refused to read {path}: {path.stat().st_size:,} bytes, a few-shot file has at most {MAX_BYTES:,}")
    data = path.read_bytes()
    try:
        _look_through(data)
        content = _Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"refused to read {path}: {error}, and a few-shot file holds lists of Dassl's Datum only; nothing of it was run. "
            "Draw the shots again with wordsight.data.few_shot, or write them as a split file (split_zhou_*.json)"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way; what it may do is fixed above
        raise ValueError(f"{path} is a damaged or cut-off pickle ({error!r}): fetch or write it again") from error
    return _shots(path, content)


def _look_through(data: bytes) -> None:
    """Raise UnpicklingError at the first instruction that a list of Datum objects has no need of."""
    count = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), start=1):
        if opcode.name == "GLOBAL" and argument != " ".join(_DATUM):
            raise pickle.UnpicklingError(f"it asks for {str(argument).replace(' ', '.')}")
        if opcode.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:  # the reader would make room for so many
            raise pickle.UnpicklingError(f"it numbers its parts up to {argument} where there are at most {count}")


def _shots(path: Path, content: Any) -> dict[str, list[Shot]]:
    """The content, checked to be lists of complete records by split."""
    if not isinstance(content, dict) or not content or not set(content) <= {"train", "val"}:
        found = (
            f"a dictionary with {', '.join(map(repr, content))}"[:200]
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise ValueError(f'{path} is no few-shot file: expected {{"train": [...], "val": [...]}}, found {found}')
    shots: dict[str, list[Shot]] = {}
    for part, items in content.items():
        if not isinstance(items, list):
            raise ValueError(f"{path}: {part!r} is a {type(items).__name__}, not a list of Datum")
        shots[part] = []
        for number, item in enumerate(items):
            state = getattr(item, "state", None) if isinstance(item, _Datum) else None
            if state is None or state["_label"] < 0:
                raise ValueError(f"{path}: {part}[{number}] is no complete Datum with a class index from 0")
            shots[part].append(
                Shot(path=state["_impath"], label=state["_label"], class_name=state["_classname"], domain=state["_domain"])
            )
    return shots


def use_few_shot(path: str | Path, splits: Splits) -> Splits:
    """The pictures that a few-shot file lists, as shots of a data set: the published draw in place of one's own.

    A picture is found by the end of its path, as the file names it where it lay on another machine.

    Args:
        path: the file; see `read_few_shot`.
        splits: the whole data set, e.g. of `wordsight.data.layouts.open_splits`.

    Returns:
        The splits with the file's train and val pictures in its order, and the test split as it is. Where the file has no val,
        there is none.

    Raises:
        ValueError: as `read_few_shot`; or a picture that the data set lacks, or knows under another class or index.
    """
    shots = read_few_shot(path)
    train = _find(Path(path), shots["train"], splits.train) if "train" in shots else None
    val = _find(Path(path), shots["val"], splits.val) if "val" in shots else None
    note = f"shots as listed in {Path(path).name}" + ("" if val is not None else ", which has no validation pictures")
    return replace(splits, train=train, val=val, notes=(*splits.notes, note))


def _find(path: Path, shots: list[Shot], pictures: LabelledSet | None) -> LabelledSet:
    if pictures is None:
        raise ValueError(f"{path} lists pictures of a split that the data set lacks")
    place = {key: i for i, key in enumerate(pictures.keys)}
    positions, missing = [], []
    for shot in shots:
        parts = shot.path.replace("\\", "/").split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        position = next((place[end] for end in ends if end in place), None)
        if position is None:
            missing.append(shot.path)
            continue
        label = pictures.labels[position]
        if published_name(label) != shot.class_name or pictures.classes.index(label) != shot.label:
            raise ValueError(
                f"{path} calls {shot.path} class {shot.label}, {shot.class_name!r}; in the data set it is class "
                f"{pictures.classes.index(label)}, {label!r}. The file is of another data set or another version of it"
            )
        positions.append(position)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shots)} pictures of {path} are not in the data set: {', '.join(missing[:NAMED])}. The file "
            "is of another data set, or of another split of it"
        )
    return pictures.select(positions)
