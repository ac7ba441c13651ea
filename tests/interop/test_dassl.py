"""Dassl's few-shot pickles: read as they are written, refused where they are more than that, and never run."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest

from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.listed import ListedSource
from wordsight.interop.dassl import Shot, read_few_shot, use_few_shot


class Datum:
    """As Dassl has it: four attributes, set by the constructor."""

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        self._impath, self._label, self._domain, self._classname = impath, label, domain, classname


@pytest.fixture(autouse=True)
def dassl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of Dassl's name, so that pickles name its class."""
    names = "dassl dassl.data dassl.data.datasets dassl.data.datasets.base_dataset".split()
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].Datum = Datum  # type: ignore[attr-defined]
    monkeypatch.setattr(Datum, "__module__", names[-1])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def pictures() -> dict[str, list[Datum]]:
    return {
        part: [
            Datum(f"/data/pets/images/{name}_{part}{i}.jpg", label, 0, name)
            for label, name in enumerate(("cat", "dög"))
            for i in (1, 2)
        ]
        for part in ("train", "val")
    }


def write(path: Path, content: object, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_as_they_are_written(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "shot_2-seed_1.pkl", pictures(), protocol)
    shots = read_few_shot(path)
    assert list(shots) == ["train", "val"]
    assert shots["train"][2] == Shot(path="/data/pets/images/dög_train1.jpg", label=1, class_name="dög", domain=0)
    assert [shot.label for shot in shots["val"]] == [0, 0, 1, 1]
    only = write(tmp_path / "shot_1-seed_1.pkl", {"train": pictures()["train"]}, protocol)  # ImageNet's have no val
    assert list(read_few_shot(only)) == ["train"]


def test_reading_needs_no_dassl(tmp_path: Path) -> None:
    path = write(tmp_path / "shot_2-seed_1.pkl", pictures())
    code = f"""
import sys
from wordsight.interop.dassl import read_few_shot
print(len(read_few_shot({str(path)!r})["train"]), "dassl" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]


def test_many_pictures(tmp_path: Path) -> None:
    many = {"train": [Datum(f"/d/images/train/n{i // 16:08d}/{i}.JPEG", i // 16, 0, f"class {i // 16}") for i in range(4000)]}
    shots = read_few_shot(write(tmp_path / "a.pkl", many))["train"]
    assert (len(shots), shots[-1].label) == (4000, 249)


class Evil:
    """On an unguarded unpickling this writes a file: the tests look whether it is there."""

    def __init__(self, call: object, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


CALLS = {
    "posix.system|os.system|nt.system": lambda mark: Evil(os.system, f"echo pwned > {mark}"),
    "builtins.eval|__builtin__.eval": lambda mark: Evil(eval, f"open({str(mark)!r}, 'w').write('pwned')"),
    "builtins.exec|__builtin__.exec": lambda mark: Evil(exec, f"open({str(mark)!r}, 'w').write('pwned')"),
    "builtins.getattr|__builtin__.getattr": lambda mark: Evil(getattr, "x", "upper"),
    "builtins.open|io.open|_io.open|__builtin__.open": lambda mark: Evil(builtins.open, str(mark), "w"),
    "subprocess.Popen|commands.Popen": lambda mark: Evil(subprocess.Popen, ["touch", str(mark)]),
    "collections.OrderedDict": lambda mark: OrderedDict(a=1),
    "builtins.set|__builtin__.set|EMPTY_SET": lambda mark: {1, 2},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("asked", list(CALLS))
@pytest.mark.parametrize("place", ["alone", "in the list", "as an attribute", "as a key"])
def test_hostile_files_are_refused_and_never_run(tmp_path: Path, protocol: int, asked: str, place: str) -> None:
    mark = tmp_path / "mark"
    evil = CALLS[asked](mark)
    content: object = evil
    if place == "in the list":
        content = {"train": [*pictures()["train"], evil]}
    elif place == "as an attribute":
        content = {"train": [Datum("/a.jpg", 0, 0, evil)]}  # type: ignore[arg-type]
    elif place == "as a key" and isinstance(evil, Evil):
        content = {"train": [], evil: 1}
    path = write(tmp_path / "shot_1-seed_1.pkl", content, protocol)
    with pytest.raises(ValueError, match="refused to read") as error:
        read_few_shot(path)
    assert "nothing of it was run" in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("asked", list(CALLS)[:6])
def test_the_error_says_what_was_asked_for(tmp_path: Path, asked: str) -> None:
    path = write(tmp_path / "a.pkl", CALLS[asked](tmp_path / "mark"), 2)
    with pytest.raises(ValueError, match="refused to read") as error:
        read_few_shot(path)
    assert any(f"it asks for {name}," in str(error.value) for name in asked.split("|"))


DATUM = b"cdassl.data.datasets.base_dataset\nDatum\n"


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x20dassl.data.datasets.base_dataset\x8c\x0fDatum.__class__\x93.",  # a name with a dot
        b"\x80\x02" + DATUM + b")R.",  # calling Datum
        b"\x80\x02cdassl.data.datasets.base_dataset\nos\n.",  # another name of the module
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x02" + DATUM + b"(U\x01xK\x01d\x86b.",  # a byte string, as Python 2 writes them
        b"\x80\x05\x97.",  # a buffer from outside
        b"\x80\x02}r\xff\xff\xff\x7f.",  # room for two thousand million parts
        b"\x80\x02}p999999999\n.",
    ],
)
def test_hostile_programs_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    with pytest.raises(ValueError, match="refused to read"):
        read_few_shot(path)


@pytest.mark.parametrize(
    "state",
    [
        b"N}X\x0c\x00\x00\x00__setstate__NsX\x00\x00\x00\x00\x86b",  # attributes of the class itself
        b"}X\x05\x00\x00\x00stateNsb",
        b"N}X\x05\x00\x00\x00stateNs\x86b",
    ],
)
@pytest.mark.parametrize("made", [b"", b")\x81"])
def test_no_attribute_is_planted(tmp_path: Path, state: bytes, made: bytes) -> None:
    """BUILD on the class, or on one of its objects, with a state that isn't a Datum's; what is read afterwards is whole."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02" + DATUM + made + state + b".")
    with pytest.raises(ValueError, match=r"refused to read|damaged"):
        read_few_shot(path)
    assert len(read_few_shot(write(tmp_path / "b.pkl", pictures()))["train"]) == 4


def test_damaged_files(tmp_path: Path) -> None:
    whole = pickle.dumps(pictures(), 4)
    path = tmp_path / "a.pkl"
    for length in [0, 1, 2, 10, *range(20, len(whole) - 1, 37)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged or cut-off|refused"):
            read_few_shot(path)
    for position in range(2, len(whole), 11):  # other bytes: read, refused or damaged, and nothing else
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with contextlib.suppress(ValueError):
            read_few_shot(path)
    path.write_bytes(b"")
    os.truncate(path, (64 << 20) + 1)
    with pytest.raises(ValueError, match="at most 67,108,864"):
        read_few_shot(path)
    with pytest.raises(FileNotFoundError):
        read_few_shot(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "found a list"),
        ({}, "found a dictionary with"),
        ({"test": []}, "found a dictionary with 'test'"),
        ({"train": {}}, "'train' is a dict"),
        ({"train": ["a.jpg"]}, r"train\[0\] is no complete Datum"),
        ({"train": [Datum("/a.jpg", -1, 0, "a")]}, r"train\[0\] is no complete Datum with a class index from 0"),
        ({"train": [Datum("/a.jpg", "0", 0, "a")]}, "a Datum with"),
        ({"train": [Datum("/a.jpg", True, 0, "a")]}, "a Datum with"),
        ({"train": [Datum(None, 0, 0, "a")]}, "a Datum with"),
    ],
)
def test_other_content(tmp_path: Path, content: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_few_shot(write(tmp_path / "a.pkl", content))


# --------------------------------------------------------------------------------------------- as shots of a data set


def data(classes: tuple[str, ...] = ("cat", "dög")) -> Splits:
    def part(name: str) -> LabelledSet:
        rows = [(f"{label}_{name}{i}.jpg", label) for label in classes for i in range(4)]
        keys, labels = (tuple(column) for column in zip(*rows, strict=True))
        return LabelledSet(source=ListedSource(Path("/here"), rows), keys=keys, labels=labels, classes=classes)

    return Splits(name="pets", classes=classes, train=part("train"), val=part("val"), test=part("test"))


def test_the_published_draw_of_a_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "shot_2-seed_1.pkl", pictures())
    drawn = use_few_shot(path, data())
    assert drawn.train.keys == ("cat_train1.jpg", "cat_train2.jpg", "dög_train1.jpg", "dög_train2.jpg")
    assert drawn.val.keys == ("cat_val1.jpg", "cat_val2.jpg", "dög_val1.jpg", "dög_val2.jpg")
    assert drawn.test.keys == data().test.keys
    assert drawn.notes == ("shots as listed in shot_2-seed_1.pkl",)
    only = write(tmp_path / "b.pkl", {"train": pictures()["train"]})
    assert use_few_shot(only, data()).val is None
    assert "has no validation pictures" in use_few_shot(only, data()).notes[-1]


def test_names_that_imagenet_has_twice(tmp_path: Path) -> None:
    classes = ("missile", "missile (n04008634)")
    path = write(
        tmp_path / "a.pkl", {"train": [Datum(f"/x/{name}_train1.jpg", i, 0, "missile") for i, name in enumerate(classes)]}
    )
    assert use_few_shot(path, data(classes)).train.labels == classes


def test_a_draw_of_another_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", {"train": [*pictures()["train"], Datum("/data/pets/images/fox_1.jpg", 1, 0, "fox")]})
    with pytest.raises(ValueError, match=r"1 of 5 pictures of .* are not in the data set: /data/pets/images/fox_1.jpg"):
        use_few_shot(path, data())
    with pytest.raises(ValueError, match=r"calls .*cat_train1.jpg class 0, 'cat'; in the data set it is class 1, 'cat'"):
        use_few_shot(write(tmp_path / "a.pkl", pictures()), data(("dög", "cat")))
    renamed = {"train": [Datum("cat_train1.jpg", 0, 0, "kitten")]}
    with pytest.raises(ValueError, match="class 0, 'kitten'; in the data set it is class 0, 'cat'"):
        use_few_shot(write(tmp_path / "a.pkl", renamed), data())
    with pytest.raises(ValueError, match="of a split that the data set lacks"):
        use_few_shot(write(tmp_path / "a.pkl", {"val": []}), Splits(name="d", classes=("cat", "dög"), test=data().test))
