"""Natural shifts in synthetic folders: classes by number, by WordNet id and by ObjectNet's mappings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wordsight.data.layouts import LAYOUTS
from wordsight.data.shifts import SHIFTS, imagenet_names, open_imagenet_val, open_shift, shift_needs

IDS = [f"n{i:08}" for i in range(1000)]
NAMES = {identity: f"class {i}" for i, identity in enumerate(IDS)}


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def names_file(path: Path, count: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{identity} {NAMES[identity]}\n" for identity in reversed(IDS[:count])), encoding="utf-8")


def objectnet(root: Path) -> Path:
    """Two shared classes, one of them of two ImageNet classes, and a class of ObjectNet alone. 2012's numbers run backwards."""
    start = root / "objectnet-1.0"
    (start / "mappings").mkdir(parents=True)
    files = {
        "folder_to_objectnet_label.json": {"mug": "Mug", "alarm_clock": "Alarm clock", "jam": "Jam"},
        "objectnet_to_imagenet_1k.json": {"Mug": "coffee mug", "Alarm clock": "analog clock, dial; digital clock"},
        "pytorch_to_imagenet_2012_id.json": {str(i): 999 - i for i in range(1000)},
    }
    for name, content in files.items():
        (start / "mappings" / name).write_text(json.dumps(content), encoding="utf-8")
    lines = [f"name {i}" for i in range(1000)]
    lines[999 - 7], lines[999 - 11], lines[999 - 12] = "coffee mug", "analog clock, dial", "digital clock"
    (start / "mappings" / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for folder in ("mug", "alarm_clock", "jam"):
        framed = np.zeros((20, 30, 3), np.uint8)
        framed[:] = (255, 0, 0)
        framed[2:-2, 2:-2] = (0, 0, 200)
        (start / "images" / folder).mkdir(parents=True)
        Image.fromarray(framed).save(start / "images" / folder / "0.png")
    return start


def test_v2_is_numbered_in_wordnet_order(tmp_path: Path) -> None:
    images = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    for number in (0, 2, 10, 999):
        picture(images / str(number) / "a.jpeg")
    names_file(tmp_path / "imagenetv2" / "classnames.txt")
    shift = open_shift("imagenetv2", tmp_path)
    assert shift.pictures.labels == ("class 0", "class 2", "class 10", "class 999")
    assert shift.pictures.classes == tuple(NAMES.values()), "all 1,000 are to choose from"
    assert shift.ids["class 10"] == (IDS[10],)
    picture(images / "1000" / "a.jpeg")
    with pytest.raises(ValueError, match=r"1 folders in .* are no classes of ImageNetV2: 1000"):
        open_shift("imagenetv2", tmp_path)


def test_subsets_are_the_folders_that_are_there(tmp_path: Path) -> None:
    for name, images in (("imagenet_a", "imagenet-adversarial/imagenet-a"), ("imagenet_r", "imagenet-rendition/imagenet-r"),
                         ("imagenet_sketch", "imagenet-sketch/images"), ("imagenet_o", "imagenet-o")):  # fmt: skip
        for i in (5, 3, 77):
            picture(tmp_path / images / IDS[i] / "x.jpg")
        shift = open_shift(name, tmp_path, NAMES)
        assert shift.pictures.classes == ("class 3", "class 5", "class 77")
        assert shift.ids == {"class 3": (IDS[3],), "class 5": (IDS[5],), "class 77": (IDS[77],)}
        picture(tmp_path / images / "n99999999" / "x.jpg")
        with pytest.raises(ValueError, match="n99999999"):
            open_shift(name, tmp_path, NAMES)


def test_objectnet_is_mapped_and_cut(tmp_path: Path) -> None:
    objectnet(tmp_path)
    shift = open_shift("objectnet", tmp_path, NAMES)
    assert shift.pictures.classes == ("alarm clock", "mug")
    assert shift.ids == {"alarm clock": (IDS[11], IDS[12]), "mug": (IDS[7],)}
    assert shift.pictures.keys == ("alarm_clock/0.png", "mug/0.png"), "jam is none of ImageNet's"
    cut = shift.pictures.source[1].image
    assert isinstance(cut, Image.Image)
    assert cut.size == (26, 16)
    assert cut.getextrema() == ((0, 0), (0, 0), (200, 200)), "the red frame is gone"
    picture(tmp_path / "objectnet-1.0" / "images" / "mug" / "1.png", size=(4, 4))
    tiny = open_shift("objectnet", tmp_path, NAMES).pictures.source[2].image
    assert isinstance(tiny, Image.Image)
    assert tiny.size == (4, 4)


def test_imagenets_pictures_of_the_same_classes(tmp_path: Path) -> None:
    objectnet(tmp_path)
    for i in (7, 11, 12, 13):
        picture(tmp_path / "imagenet" / "images" / "val" / IDS[i] / f"{i}.JPEG")
    matched = open_imagenet_val(tmp_path, open_shift("objectnet", tmp_path, NAMES).ids)
    assert matched.classes == ("alarm clock", "mug")
    assert matched.labels == ("alarm clock", "alarm clock", "mug"), "two classes of ImageNet are one of ObjectNet"
    with pytest.raises(FileNotFoundError, match=f"no folder for 1 of 2 classes: {IDS[14]}"):
        open_imagenet_val(tmp_path, {"a": (IDS[13],), "b": (IDS[14],)})
    with pytest.raises(ValueError, match="belong to two classes"):
        open_imagenet_val(tmp_path, {"a": (IDS[13],), "b": (IDS[13],)})
    with pytest.raises(FileNotFoundError, match="put there ImageNet's 50,000 validation pictures"):
        open_imagenet_val(tmp_path / "elsewhere", {"a": (IDS[13],)})


def test_what_is_missing_is_named_with_its_place(tmp_path: Path) -> None:
    for name in (*SHIFTS, "imagenet_o"):
        with pytest.raises(FileNotFoundError) as caught:
            open_shift(name, tmp_path, NAMES)
        for path, what in shift_needs(name, tmp_path):
            assert str(path) in str(caught.value)
            assert what in str(caught.value)
    with pytest.raises(ValueError, match="no natural shift 'imagenet-x': there are imagenetv2"):
        open_shift("imagenet-x", tmp_path)
    (tmp_path / "imagenet-o").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no class names of ImageNet: put CoOp's classnames\.txt"):
        open_shift("imagenet_o", tmp_path)
    with pytest.raises(FileNotFoundError, match="no pictures in the class folders"):
        open_shift("imagenet_o", tmp_path, NAMES)


def test_names_must_be_imagenets(tmp_path: Path) -> None:
    names_file(tmp_path / "classnames.txt", 999)
    with pytest.raises(ValueError, match="has 999 ids and 999 different names"):
        imagenet_names(tmp_path)
    (tmp_path / "imagenet-o").mkdir()
    with pytest.raises(ValueError, match="names has 1000 ids and 1 different names"):
        open_shift("imagenet_o", tmp_path, dict.fromkeys(IDS, "same"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("objectnet_to_imagenet_1k.json", '{"Mug": "coffee mug, cup"}', r"names 'coffee mug, cup', which is no line of"),
        (
            "objectnet_to_imagenet_1k.json",
            '{"Cup": "coffee mug"}',
            r"class 'Cup', which folder_to_objectnet_label.json has no folder",
        ),
        ("objectnet_to_imagenet_1k.json", "[]", "holds a list"),
        ("folder_to_objectnet_label.json", "{", "is not JSON"),
    ],
)
def test_mappings_that_do_not_fit(tmp_path: Path, name: str, content: str, told: str) -> None:
    (objectnet(tmp_path) / "mappings" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        open_shift("objectnet", tmp_path, NAMES)


def test_layouts_are_those_of_the_few_label_sets() -> None:
    for name in SHIFTS[:4]:
        layout = LAYOUTS[name]
        assert shift_needs(name, "/data")[0][0] == Path("/data") / layout.folder / layout.images
