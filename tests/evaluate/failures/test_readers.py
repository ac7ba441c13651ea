"""Published tests from small files in their authors' formats: read, scored, and named where they are damaged or incomplete."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluate.failures.conftest import Scorer, oracle
from wordsight.evaluate.failures import READERS, Published, published
from wordsight.evaluate.failures.files import PAIR_PX
from wordsight.evaluate.failures.readers import SUGARCREPE, aro_relation, clevr_counts, valse


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def colours(folder: Path, *names: str) -> None:
    """Pictures that differ from each other."""
    for k, name in enumerate(names):
        picture(folder / name, (10 + 40 * k, 200 - 30 * k, 90))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries) + "\n")


# ---------------------------------------------------------------------------------------------------------------- fixtures


def make_winoground(root: Path) -> Path:
    colours(root / "images", *(f"ex_{i}_img_{k}.png" for i in (0, 1) for k in (0, 1)))
    lines(
        root / "examples.jsonl",
        [
            {
                "id": i,
                "image_0": f"ex_{i}_img_0",
                "image_1": f"ex_{i}_img_1",
                "caption_0": f"old tree {i}",
                "caption_1": f"tree old {i}",
                "collapsed_tag": ("Object", "Relation")[i],
            }
            for i in (0, 1)
        ],
    )
    return root


def visual_genome(kind: str, row: dict[str, Any]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        colours(root / "images", "a.jpg", "b.jpg")
        box = {"bbox_x": 2, "bbox_y": 1, "bbox_w": 10, "bbox_h": 6}
        entries = [
            {"image_path": name, "true_caption": f"cup on table {name}", "false_caption": f"table on cup {name}", **box, **row}
            for name in ("a.jpg", "b.jpg")
        ]
        write(root / f"visual_genome_{kind}.json", entries)
        return root

    return make


def make_order(root: Path) -> Path:
    colours(root, "val2014/a.jpg", "val2014/b.jpg")
    entries = [
        {"image": f"val2014/{name}.jpg", "caption_options": [f"{name} one two", f"two {name} one", f"one two {name}"]}
        for name in "ab"
    ]
    return write(root / "coco_order.json", entries)


def make_sugarcrepe(root: Path) -> Path:
    colours(root / "val2017", "1.jpg", "2.jpg")
    for category in SUGARCREPE:
        entries = {
            str(k): {"filename": f"{k}.jpg", "caption": f"{category} {k}", "negative_caption": f"no {category} {k}"}
            for k in (1, 2)
        }
        write(root / f"{category}.json", entries)
    return root


def make_valse(root: Path) -> Path:
    colours(root / "images", "a.jpg", "b.jpg")
    entry = {"dataset": "SWiG", "mturk": {"caption": 3, "foil": 0, "other": 0}}
    entries = {
        "x_0": {**entry, "image_file": "a.jpg", "caption": "A man exercises.", "foil": "A torso exercises."},
        "x 1": {**entry, "image_file": "b.jpg", "caption": ["A dog runs."], "foil": ["A cat runs."]},
        "x_2": {**entry, "image_file": "gone.jpg", "caption": "?", "foil": "!", "mturk": {"caption": 1, "foil": 2, "other": 0}},
    }
    return write(root / "actant-swap.json", entries)


def make_clevr(root: Path) -> Path:
    colours(root / "images" / "val", "CLEVR_val_000000.png", "CLEVR_val_000001.png")
    scenes = [{"image_filename": f"CLEVR_val_00000{i}.png", "objects": [{}] * (3 + 7 * i)} for i in (0, 1)]
    write(root / "scenes" / "CLEVR_val_scenes.json", {"info": {}, "scenes": scenes})
    return root


def nlvr2_entry(pair: int, label: Any, sentence: int = 0) -> dict[str, Any]:
    return {"identifier": f"dev-7-{pair}-{sentence}", "sentence": f"There are two dogs {sentence}.", "label": label}


def make_nlvr2(root: Path) -> Path:
    colours(root / "images", *(f"dev-7-{pair}-img{k}.png" for pair in range(3) for k in (0, 1)))
    entries = [nlvr2_entry(0, "True"), nlvr2_entry(1, "False"), nlvr2_entry(2, "False"), nlvr2_entry(0, "True", 1)]
    return lines(root / "dev.json", entries)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "winoground": make_winoground,
    "aro-relation": visual_genome("relation", {"relation_name": "on"}),
    "aro-attribution": visual_genome("attribution", {"attributes": ["white", "round"]}),
    "aro-order": make_order,
    "sugarcrepe": make_sugarcrepe,
    "valse": make_valse,
    "clevr-counts": make_clevr,
    "nlvr2": make_nlvr2,
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Published]:
    return lambda name: published(name, MAKERS[name](tmp_path / name))


# ------------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("name", "kind", "rows", "chance"),
    [
        ("winoground", (2, 2), ["Object", "Relation"], 0.5),
        ("aro-relation", (1, 2), ["on"], 0.5),
        ("aro-attribution", (1, 2), ["white_round"], 0.5),
        ("aro-order", (1, 3), [], 1 / 3),
        ("sugarcrepe", (1, 2), list(SUGARCREPE), 0.5),
        ("valse", (1, 2), [], 0.5),
        ("clevr-counts", (1, 8), ["3", "10"], 1 / 8),
        ("nlvr2", (2, 1), [], 0.5),
    ],
)
def test_each_format_is_read_and_an_oracle_is_right(
    make: Callable[[str], Published], name: str, kind: tuple[int, int], rows: list[str], chance: float
) -> None:
    test = make(name)
    assert {(len(item.pictures), len(item.texts)) for item in test.items} == {kind}
    found = test.judge(oracle(test.items), batch_size=3)
    assert found.metrics["accuracy"].value == 1
    assert found.metrics["accuracy"].chance == chance
    assert [line["row"] for line in found.table] == rows
    assert found.protocol.startswith(f"{test.name}, {len(test.items)} items, ")
    assert test.run(Scorer(lambda picture, text: 0.0))["accuracy"].value == 0  # ties
    assert len({key for outcome in found.outcomes for key in outcome.keys}) >= len(test.items)


def test_all_readers_are_tried() -> None:
    assert list(MAKERS) == list(READERS)
    with pytest.raises(ValueError, match=r"published tests are winoground, .*, got 'cola'"):
        published("cola", ".")


def test_captions_foils_and_answers_are_those_of_the_files(make: Callable[[str], Published]) -> None:
    assert [item.texts for item in make("winoground").items] == [("old tree 0", "tree old 0"), ("old tree 1", "tree old 1")]
    assert [item.texts for item in make("valse").items] == [
        ("A man exercises.", "A torso exercises."),
        ("A dog runs.", "A cat runs."),
    ]
    assert make("valse").items[1].key == "valse/actant-swap/x 1"
    sugar = make("sugarcrepe")
    assert (sugar.items[0].texts, sugar.items[0].right) == (("add_att 1", "no add_att 1"), (0,))
    assert len(sugar.items) == 14
    clevr = make("clevr-counts").items
    assert [item.texts[item.right[0]] for item in clevr] == ["a photo of 3 objects.", "a photo of 10 objects."]
    assert make("aro-order").items[1].texts == ("b one two", "two b one", "one two b")


def test_boxes_are_cut_out_and_pairs_lie_side_by_side(make: Callable[[str], Published]) -> None:
    assert make("aro-relation").items[0].pictures[0]().size == (10, 6)
    items = make("nlvr2").items
    assert [item.key for item in items] == ["nlvr2/dev-7-0/dev-7-0/dev-7-1", "nlvr2/dev-7-0/dev-7-0/dev-7-2"]
    assert [item.right for item in items] == [(0,), (1,)]  # the true pair first as often as second
    assert items[0].pictures[0] == items[1].pictures[1]
    square = items[0].pictures[0]()
    assert square.size == (PAIR_PX, PAIR_PX)
    assert square.getpixel((110, 224)) == (10, 200, 90)
    assert square.getpixel((338, 224)) == (50, 170, 90)
    assert square.getpixel((224, 224)) == square.getpixel((110, 10)) == (255, 255, 255)


def test_the_mean_of_rows_and_left_out_relations(tmp_path: Path) -> None:
    root = tmp_path / "aro"
    colours(root / "images", "a.jpg")
    box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 10, "bbox_h": 6}
    entries = [
        {"image_path": "a.jpg", "true_caption": text, "false_caption": f"no {text}", "relation_name": row, **box}
        for row, text in (("on", "good 1"), ("on", "good 2"), ("on", "bad"), ("near", "bad 2"), ("in", "good 3"))
    ]
    write(root / "visual_genome_relation.json", entries)
    judge = Scorer(lambda picture, text: float(("no" not in text) == ("good" in text)))
    found = aro_relation(root).judge(judge)
    assert found.metrics["accuracy"].value == pytest.approx(3 / 5)
    assert found.metrics["mean_per_row"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.metrics["mean_per_row"].count == 3
    fewer = aro_relation(root, leave_out=["near"]).judge(judge)
    assert fewer.metrics["mean_per_row"].value == pytest.approx(5 / 6)
    assert "1 of the relations left out" in fewer.protocol
    alone = aro_relation(root, leave_out=["near", "in"]).judge(judge)
    assert "mean_per_row" not in alone.metrics
    assert alone.notes[-1] == "no mean_per_row: 1 rows have 1 items or more"


def test_what_is_left_out_is_told(make: Callable[[str], Published], tmp_path: Path) -> None:
    assert make("valse").notes == ("1 items are not valid by their annotators and left out",)
    assert make("nlvr2").notes == ("1 sentences come with pairs of one kind alone and ask nothing",)
    colours(tmp_path / "valse" / "images", "gone.jpg")
    everything = valse(tmp_path / "valse" / "actant-swap.json", only_valid=False)
    assert len(everything.items) == 3
    assert "not validated" in everything.how
    assert everything.notes == ()


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", list(MAKERS))
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        published(name, tmp_path / "nothing")


@pytest.mark.parametrize("name", list(MAKERS))
def test_missing_pictures_are_listed(name: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"\d pictures of {name}.* are not in {tmp_path}/elsewhere: "):
        published(name, path, tmp_path / "elsewhere")


def test_ten_of_many_missing_pictures_are_shown(tmp_path: Path) -> None:
    scenes = [{"image_filename": f"{i:02}.png", "objects": [0] * 5} for i in range(13)]
    write(tmp_path / "scenes" / "CLEVR_val_scenes.json", {"scenes": scenes})
    with pytest.raises(FileNotFoundError) as error:
        clevr_counts(tmp_path)
    assert "13 pictures of clevr-counts" in str(error.value)
    assert str(error.value).endswith("08.png, 09.png and 3 more")


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("winoground", "examples.jsonl", '{"id": 0}\n', r"examples.jsonl, line 1 has no 'image_0' \(it has 'id'\)"),
        ("winoground", "examples.jsonl", '\n{"id"', "examples.jsonl, line 2 is not JSON"),
        ("winoground", "examples.jsonl", "[1]\n", "line 1 must be an object"),
        ("winoground", "examples.jsonl", "\n", "holds no item of winoground"),
        ("aro-relation", "visual_genome_relation.json", "[{", "visual_genome_relation.json is not JSON"),
        (
            "aro-relation",
            "visual_genome_relation.json",
            '[{"relation_name": 3}]',
            "entry 0: 'relation_name' must be of type str, got 3",
        ),
        ("aro-relation", "visual_genome_relation.json", "[[]]", "entry 0 must be an object"),
        ("aro-relation", "visual_genome_relation.json", "7", "must hold a list or an object of entries, got int"),
        ("aro-attribution", "visual_genome_attribution.json", '[{"attributes": ["a"]}]', "'attributes' must be two texts"),
        ("aro-order", "coco_order.json", '[{"caption_options": ["a"], "image": "a"}]', "must be two texts or more"),
        ("sugarcrepe", "swap_att.json", '{"k": {"filename": " "}}', "swap_att.json, entry k: 'filename' is empty"),
        (
            "sugarcrepe",
            "swap_att.json",
            '{"k": {"filename": "1.jpg", "caption": null}}',
            "'caption' must be of type str, got None",
        ),
        ("valse", "actant-swap.json", '{"k": {"mturk": {"caption": true}}}', "'mturk': 'caption' must be of type int, got True"),
        (
            "valse",
            "actant-swap.json",
            '{"k": {"mturk": {"caption": 3}, "image_file": "a.jpg", "caption": ["a", "b"]}}',
            "'caption' must",
        ),
        ("clevr-counts", "scenes/CLEVR_val_scenes.json", "[]", "has no 'scenes'"),
        ("clevr-counts", "scenes/CLEVR_val_scenes.json", '{"scenes": [3]}', "entry 0 must be an object, got 3"),
        (
            "clevr-counts",
            "scenes/CLEVR_val_scenes.json",
            '{"scenes": [{"objects": [], "image_filename": "a"}]}',
            "have 3 to 10 objects, this one 0",
        ),
        ("nlvr2", "dev.json", '{"identifier": "dev-1", "label": "True"}', "expected an identifier such as dev-850-0-0"),
        ("nlvr2", "dev.json", '{"identifier": "dev-1-0-0", "label": "maybe"}', "'maybe'"),
        ("nlvr2", "dev.json", json.dumps(nlvr2_entry(0, "True")), "holds no item of nlvr2 .1 sentences"),
    ],
)
def test_damaged_files_are_named_with_the_place(name: str, file: str, content: str, said: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path / name)
    write(tmp_path / name / file, content)
    with pytest.raises(ValueError, match=said):
        published(name, path)


def test_hostile_names_boxes_and_pictures(tmp_path: Path) -> None:
    root = MAKERS["sugarcrepe"](tmp_path / "s")
    for name in ("../secret.jpg", "/etc/passwd"):
        write(root / "add_att.json", {"0": {"filename": name, "caption": "a", "negative_caption": "b"}})
        with pytest.raises(ValueError, match="the name of a picture must lie in"):
            published("sugarcrepe", root)
    (root / "add_att.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"SugarCrepe's add_att.json belong into"):
        published("sugarcrepe", root)

    aro = MAKERS["aro-relation"](tmp_path / "a")
    entries = json.loads((aro / "visual_genome_relation.json").read_text())
    write(aro / "visual_genome_relation.json", [entries[0] | {"bbox_w": 0}])
    with pytest.raises(ValueError, match="a box must be a pixel or more in size, got bbox_w=0"):
        published("aro-relation", aro)

    path = MAKERS["valse"](tmp_path / "v")
    (tmp_path / "v" / "images" / "a.jpg").write_bytes(b"no picture")
    test = published("valse", path)
    with pytest.raises(ValueError, match=r"v/images/a.jpg: .*get it anew"):
        test.judge(Scorer(lambda picture, text: 0.0))
