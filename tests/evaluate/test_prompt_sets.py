"""The published class names and templates: whole, each once, and found by whatever a user or a data set calls them."""

from pathlib import Path

import pytest

from wordsight.evaluate.prompt_sets import (
    PromptSet,
    places_of,
    prompt_set,
    read_classes,
    read_glosses,
    set_names,
    with_glosses,
)

# classes of the data sets as published (arXiv 2103.00020, table 9), templates as in openai/CLIP's notebook and data/prompts.md
PUBLISHED = {
    "birdsnap": (500, 1),
    "caltech101": (102, 34),
    "cifar10": (10, 18),
    "cifar100": (100, 18),
    "clevr_counts": (8, 1),
    "country211": (211, 5),
    "dtd": (47, 8),
    "eurosat": (10, 3),
    "fer2013": (7, 6),
    "fgvc_aircraft": (100, 2),
    "flowers102": (102, 1),
    "food101": (101, 1),
    "gtsrb": (43, 3),
    "hateful_memes": (2, 1),
    "imagenet": (1000, 80),
    "imagenet7": (1000, 7),
    "kinetics700": (700, 28),
    "kitti_distance": (4, 1),
    "mnist": (10, 1),
    "oxford_pets": (37, 1),
    "pcam": (2, 1),
    "rendered_sst2": (2, 1),
    "resisc45": (45, 18),
    "stanford_cars": (196, 8),
    "stl10": (10, 2),
    "sun397": (397, 2),
    "ucf101": (101, 48),
    "voc2007": (20, 1),
}


def test_all_sets_of_the_paper_are_there() -> None:
    assert set_names() == tuple(sorted(PUBLISHED))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_set_is_whole(name: str) -> None:
    found = prompt_set(name)
    num_classes, num_templates = PUBLISHED[name]
    assert (len(found.classes), len(set(found.classes))) == (num_classes, num_classes)
    assert (len(found.templates), len(set(found.templates))) == (num_templates, num_templates)
    for template in found.templates:
        assert template.count("{label}") == 1
        assert not set("{}") & set(template.replace("{label}", ""))
    texts = [*found.classes, *found.templates, *(name for names in found.names.values() for name in names)]
    assert all(text == text.strip() and text.isprintable() and text for text in texts)
    assert set(found.names) <= set(found.classes)
    assert len(set(found.ids)) == len(found.ids) in (0, num_classes)
    assert "openai/CLIP" in found.source
    assert "MIT" in found.source
    assert found.title


def test_imagenet_is_open_clips_but_for_names_that_are_given_twice() -> None:
    """open_clip's list has been mended since: ours is the published one, whose order and most of whose names are the same."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    ours = prompt_set("imagenet")
    assert [template.replace("{label}", "X") for template in ours.templates] == [make("X") for make in OPENAI_IMAGENET_TEMPLATES]
    same = sum(one == other for one, other in zip(ours.classes, IMAGENET_CLASSNAMES, strict=True))
    assert same >= 990
    assert ours.names == {"projectile": ("missile",), "sunglass": ("sunglasses",)}
    assert (ours.ids[0], ours.classes[0]) == ("n01440764", "tench")
    assert (ours.ids[134], ours.classes[134]) == ("n02012849", "crane bird")
    assert ours.ids == tuple(sorted(ours.ids))
    assert set(prompt_set("imagenet7").templates) <= set(ours.templates)


def test_a_set_is_found_by_its_name_in_any_writing_and_an_unknown_one_says_what_is_near() -> None:
    assert prompt_set("CIFAR-10") is prompt_set("cifar10")
    assert prompt_set("imagenet80") is prompt_set("imagenet")
    with pytest.raises(ValueError, match=r"no prompt set 'cifr10' \(do you mean 'cifar10'\?\); there are birdsnap, "):
        prompt_set("cifr10")
    with pytest.raises(ValueError, match=r"no prompt set '../../x'; there are"):
        prompt_set("../../x")


def test_classes_are_a_set_a_file_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\n\r\n dog \n".encode())
    assert read_classes(path).classes == read_classes(str(path)).classes == read_classes(["cat", "dog"]).classes == ("cat", "dog")
    assert read_classes("mnist") is prompt_set("mnist")
    assert read_classes(prompt_set("mnist")) is prompt_set("mnist")
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="has no class names"):
        read_classes(path)
    path.write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="twice or more: 'cat'"):
        read_classes(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not in UTF-8"):
        read_classes(path)
    with pytest.raises(ValueError, match=r"no classes 'food102' \(do you mean 'food101'\?\): give a file"):
        read_classes("food102")


def test_labels_of_data_are_known_by_label_id_spelling_or_place() -> None:
    food, imagenet, counts = prompt_set("food101"), prompt_set("imagenet"), prompt_set("clevr_counts")
    assert places_of({"apple pie"}, food) == ({"apple pie": 0}, "label")
    assert places_of({"apple_pie", "Baby-Back Ribs"}, food) == ({"apple_pie": 0, "Baby-Back Ribs": 1}, "spelling")
    assert places_of({"n01443537", "n01440764"}, imagenet) == ({"n01443537": 1, "n01440764": 0}, "id")
    assert places_of({"000", "099", "100"}, food) == ({"000": 0, "099": 99, "100": 100}, "place")
    assert places_of({"3", "10"}, counts) == ({"3": 1, "10": 0}, "label"), "a number that is a label is no place"
    for wrong in ({"101"}, {"1", "01"}, {"-1"}, {"apple pie", "3"}):
        with pytest.raises(ValueError, match="of another set"):
            places_of(wrong, food)
    with pytest.raises(ValueError, match=r"'appel pie' \(do you mean 'apple pie'\?\)"):
        places_of({"appel pie"}, food)
    with pytest.raises(ValueError, match=r"not among the 2 given classes, e\.g\. '0'"):
        places_of({"0"}, PromptSet(classes=("cat", "dog")))


def test_glosses_change_names_not_labels(tmp_path: Path) -> None:
    path = tmp_path / "glosses.tsv"
    path.write_text("# senses\ncrane\tbird\n\nbat\t{label}, a club\n")
    glosses = read_glosses(path)
    assert glosses == {"crane": "bird", "bat": "{label}, a club"}
    classes = PromptSet(classes=("crane", "bat", "cat"), names={"bat": ("bat", "club")})
    found = with_glosses(classes, glosses)
    assert found.classes == classes.classes
    assert found.names == {"crane": ("crane (bird)",), "bat": ("bat, a club", "club, a club")}
    assert with_glosses(classes, {"cat": "pet"}, "{label}, {gloss}").names["cat"] == ("cat, pet",)
    with pytest.raises(ValueError, match=r"1 glosses are for no class that there is, e.g. 'crain' \(do you mean 'crane'\?\)"):
        with_glosses(classes, {"crain": "bird"})
    with pytest.raises(ValueError, match=r"needs \{label\} and \{gloss\}"):
        with_glosses(classes, {"cat": "pet"}, "{label}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("crane bird\n", "line 1 of"),
        ("crane\t\n", "line 1 of"),
        ("\tbird\n", "line 1 of"),
        ("crane\tbird\ncrane\tmachine\n", "two glosses for 'crane', the second in line 2"),
        ("# nothing\n", "has no glosses"),
    ],
)
def test_wrong_files_of_glosses_say_what_is_wrong(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "glosses.tsv").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_glosses(tmp_path / "glosses.tsv")
    with pytest.raises(ValueError, match="no glosses 'absent'"):
        read_glosses("absent")
