"""Shots, halves and subsets of labelled sets: closed counts, the same pictures on every machine, errors that name."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from wordsight.data.errors import BadSampleError
from wordsight.data.few_shot import LabelledSet, Splits, base_to_new, class_positions, few_shot, hold_out, label_source
from wordsight.types import BadSample, Sample


class Pictures:
    """A source without files; its samples may be asked for never."""

    def __init__(self, keys: list[str], labels: list[str | None], broken: str = "") -> None:
        self.keys, self.labels, self.broken = keys, labels, broken
        self.bad: list[BadSample] = []
        self.part_sizes = [len(keys)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        if self.keys[index] == self.broken:
            raise BadSampleError(self.broken, "is cut off")
        return Sample(self.keys[index], b"", (), self.labels[index])


CLASSES = ("ant", "bee", "cat", "dog", "eel")


def labelled(
    counts: dict[str, int], *, part: str = "train", classes: tuple[str, ...] = CLASSES, shuffle: int | None = None
) -> LabelledSet:
    rows = [(f"{part}/{name}/{i:03d}.jpg", name) for name, count in counts.items() for i in range(count)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(rows)
    keys, labels = [key for key, _ in rows], [label for _, label in rows]
    return LabelledSet(source=Pictures(keys, labels), keys=tuple(keys), labels=tuple(labels), classes=classes)


def data(train: int = 20, val: int | None = 6, test: int = 5, *, shuffle: int | None = None) -> Splits:
    return Splits(
        name="pets",
        classes=CLASSES,
        train=labelled(dict.fromkeys(CLASSES, train), shuffle=shuffle),
        val=None if val is None else labelled(dict.fromkeys(CLASSES, val), part="val", shuffle=shuffle),
        test=labelled(dict.fromkeys(CLASSES, test), part="test"),
    )


@pytest.mark.parametrize("num_shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("with_val", [True, False])
def test_k_shots_and_at_most_four_to_choose_by(num_shots: int, with_val: bool) -> None:
    drawn = few_shot(data(val=6 if with_val else None), num_shots, seed=2)
    assert drawn.train.counts() == dict.fromkeys(CLASSES, num_shots)
    assert drawn.val.counts() == dict.fromkeys(CLASSES, min(num_shots, 4))
    assert len(set(drawn.train.keys)) == 5 * num_shots
    assert not set(drawn.train.keys) & set(drawn.val.keys)
    assert {key.split("/")[0] for key in drawn.val.keys} == {"val" if with_val else "train"}
    assert ("what the shots left of train" in " ".join(drawn.notes)) is not with_val
    assert len(drawn.test) == 25  # whole
    assert [drawn.train.source[i].key for i in range(len(drawn.train))] == list(drawn.train.keys)
    assert [drawn.train.source[i].label for i in range(len(drawn.train))] == list(drawn.train.labels)
    assert [CLASSES[t] for t in drawn.train.targets()] == list(drawn.train.labels)


def test_a_draw_is_a_function_of_seed_class_and_name() -> None:
    first = few_shot(data(), 4, seed=1)
    for shuffle in range(3):  # whatever order the file system lists in
        again = few_shot(data(shuffle=shuffle), 4, seed=1)
        assert again.train.keys == first.train.keys
        assert again.val.keys == first.val.keys
    # pinned: the same pictures on every machine and in every version
    assert first.train.keys[:4] == PINNED
    more = few_shot(data(), 8, seed=1).train
    assert set(first.train.keys) < set(more.keys)  # K shots are among the K + 1
    other = few_shot(data(), 4, seed=2).train
    assert other.keys != first.train.keys
    alone = few_shot(data().only(("cat", "bee")), 4, seed=1).train  # other classes don't matter
    assert alone.keys[:4] == first.train.keys[8:12]


PINNED = tuple(f"train/ant/{i:03d}.jpg" for i in (9, 3, 8, 10))


def test_draws_are_even() -> None:
    """Each of 20 pictures is drawn equally often over seeds: 400 draws are 20 each, and 5 standard deviations allowed."""
    splits = data().only(("ant", "bee"))
    drawn = Counter(few_shot(splits, 1, seed=seed, num_val_shots=0).train.keys[0] for seed in range(400))
    assert len(drawn) == 20
    assert all(abs(count - 20) < 5 * (400 * 0.05 * 0.95) ** 0.5 for count in drawn.values())


def test_more_shots_than_pictures() -> None:
    splits = replace(data(), train=labelled({"ant": 20, "bee": 3, "cat": 20, "dog": 1, "eel": 20}))
    with pytest.raises(
        ValueError, match=r"2 of 5 classes of pets have fewer than 8 pictures in train: 'bee' \(3\), 'dog' \(1\).*allow_fewer"
    ):
        few_shot(splits, 8)
    drawn = few_shot(splits, 8, allow_fewer=True)
    assert drawn.train.counts() == {"ant": 8, "bee": 3, "cat": 8, "dog": 1, "eel": 8}
    assert any("'bee' (3), 'dog' (1)" in note for note in drawn.notes)
    rest = replace(splits, val=None)  # what is left of train has too few to choose by
    with pytest.raises(ValueError, match=r"fewer than 1 pictures in what the shots left of train: 'dog' \(0\)"):
        few_shot(rest, 1)
    assert few_shot(rest, 1, num_val_shots=0).val is None
    with pytest.raises(ValueError, match=r"fewer than 4 pictures in val: 'ant' \(2\)"):
        few_shot(data(val=2), 16)


def test_what_can_t_be_drawn_is_named() -> None:
    splits = replace(data(), train=labelled({"ant": 5, "cat": 5, "dog": 5}))
    for allow_fewer in (False, True):
        with pytest.raises(ValueError, match="2 of 5 classes of pets have no picture in train: 'bee', 'eel'"):
            few_shot(splits, 1, allow_fewer=allow_fewer)
    with pytest.raises(ValueError, match="num_shots is 1 or more"):
        few_shot(data(), 0)
    with pytest.raises(ValueError, match="has 1 class; a classifier needs at least 2"):
        few_shot(data().only(["ant"]), 1)
    with pytest.raises(ValueError, match="no train split to draw shots from"):
        few_shot(replace(data(), train=None), 1)
    with pytest.raises(ValueError, match="neither train, val nor test"):
        Splits(name="empty", classes=CLASSES)
    with pytest.raises(ValueError, match="other classes than the data set"):
        Splits(name="pets", classes=CLASSES[::-1], train=data().train)
    few = labelled({"ant": 2})
    with pytest.raises(ValueError, match="labels are not among the 1 classes: 'ant'"):
        replace(few, classes=("bee",))
    with pytest.raises(ValueError, match="there twice or more: 'bee'"):
        replace(few, classes=("ant", "bee", "bee"))
    with pytest.raises(ValueError, match="2 samples, 2 keys and 1 labels"):
        replace(few, labels=("ant",))


@pytest.mark.parametrize("num_classes", [4, 5, 37, 101])
def test_base_and_new_halves(num_classes: int) -> None:
    classes = tuple(f"c{i:03d}" for i in reversed(range(num_classes)))  # by class index, not by name
    whole = labelled(dict.fromkeys(classes, 2), classes=classes)
    base, new = base_to_new(Splits(name="d", classes=classes, train=whole, test=whole))
    assert base.classes + new.classes == classes
    assert len(base.classes) == (num_classes + 1) // 2
    for half in (base, new):
        assert set(half.test.labels) == set(half.classes)
        assert half.test.targets()[:3] == [0, 0, 1]
        assert half.test.source[0].label == half.classes[0]
    assert (base.name, new.name) == ("d-base", "d-new")


def test_halves_need_a_choice() -> None:
    with pytest.raises(ValueError, match="at least 4 classes, 2 in each half; pets has 3"):
        base_to_new(data().only(CLASSES[:3]))


def test_columns_of_a_smaller_data_set() -> None:
    assert class_positions(("dog", "bee"), CLASSES) == [3, 1]
    with pytest.raises(ValueError, match="1 of 2 classes are not among the 5 known ones: 'fox'"):
        class_positions(("dog", "fox"), CLASSES)
    with pytest.raises(ValueError, match="'fox'"):
        data().only(("fox", "dog"))


def test_a_test_split_is_held_out_once() -> None:
    splits = replace(data(), test=None, val=None)
    held = hold_out(splits, 0.25)
    assert held.test.counts() == dict.fromkeys(CLASSES, 5)
    assert sorted(held.train.keys + held.test.keys) == sorted(splits.train.keys)
    assert "100 pictures of train" in held.notes[-1]
    one, two = few_shot(held, 4, seed=1), few_shot(held, 4, seed=2)
    assert one.test == two.test == held.test
    assert not set(one.train.keys) & set(held.test.keys)
    two_each = hold_out(replace(splits, train=labelled(dict.fromkeys(CLASSES, 2))), 0.9)
    assert two_each.train.counts() == dict.fromkeys(CLASSES, 1)  # never all of a class
    with pytest.raises(ValueError, match="has train and val and test"):
        hold_out(data())
    with pytest.raises(ValueError, match=r"2 pictures a class; pets has too few of 'ant' \(1\)"):
        hold_out(replace(splits, train=labelled({"ant": 1} | dict.fromkeys(CLASSES[1:], 3))))
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        hold_out(splits, 1)


def test_labels_of_any_source() -> None:
    source = Pictures(["s/2", "s/1", "s/3"], ["bee", "ant", "bee"])
    found = label_source(source)
    assert (found.keys, found.labels, found.classes) == (("s/2", "s/1", "s/3"), ("bee", "ant", "bee"), ("ant", "bee"))
    assert label_source(source, classes=CLASSES).targets() == [1, 0, 1]
    with pytest.raises(
        ValueError, match="2 of 3 samples can't be used as labelled pictures:\n  s/2: is cut off\n  s/3: has no label"
    ):
        label_source(Pictures(["s/2", "s/1", "s/3"], ["bee", "ant", None], broken="s/2"))


def test_embedded_pictures_have_labels() -> None:
    from wordsight.data import open_source

    found = label_source(open_source("sample:test-twemoji-seen"))
    assert len(found.classes) > 10
    assert len(found) >= len(found.classes)
