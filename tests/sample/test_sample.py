"""The embedded data keeps its promises: nothing that is held out is trained on, by bytes, by looks, by group or by name."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from wordsight import sample
from wordsight.sample import pictures, writing
from wordsight.sample.openclipart import phrase_of


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict]]:
    """Every sample of every shard by split: {key, file (bytes), image, meta}."""
    by_split = defaultdict(list)
    for split in sample.SPLITS:
        for shard in sample.shards(split):
            with tarfile.open(shard) as archive:
                members = {m.name: archive.extractfile(m).read() for m in archive}
            for name, data in members.items():
                key, _, extension = name.rpartition(".")
                if extension != "json":
                    meta = json.loads(members[f"{key}.json"])
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    by_split[split].append({"key": key, "file": data, "image": image, "meta": meta})
    return by_split


def test_manifest_describes_the_shards(samples):
    manifest = sample.manifest()
    on_disk = {p.name for p in sample.path().glob("*.tar")}
    assert on_disk == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((sample.path() / name).read_bytes()).hexdigest() == entry["sha256"], name
    for split in sample.SPLITS:
        expected = sum(entry["samples"] for entry in manifest["files"].values() if entry["split"] == split)
        assert len(samples[split]) == expected
        assert {s["meta"]["split"] for s in samples[split]} == {split}


def test_samples_are_whole(samples):
    for rows in samples.values():
        for row in rows:
            meta = row["meta"]
            assert row["image"].size == (pictures.SIZE_PX, pictures.SIZE_PX)
            assert "." not in row["key"]
            assert meta["captions"][0] == meta["label"]
            assert all(meta["captions"])
            assert set(meta) == {"captions", "label", "group", "source", "codepoint", "split"}


def test_classes_are_unique_and_apart(samples):
    classes = sample.manifest()["classes"]
    for split, kind in (("test-seen", "seen"), ("test-unseen", "unseen")):
        labels = [row["meta"]["label"] for row in samples[split]]
        assert len(labels) == len(set(labels))
        assert set(labels) <= set(classes[kind])
    assert not set(classes["seen"]) & set(classes["unseen"])
    trained = {row["meta"]["label"] for row in samples["train"] if row["meta"]["codepoint"]}
    assert trained == set(classes["seen"])
    assert 1500 <= len(classes["seen"]) <= 1700
    assert 230 <= len(classes["unseen"]) <= 300


def test_twemoji_is_never_trained_on(samples):
    assert {row["meta"]["source"] for row in samples["train"]} == {"noto", "fluent", "openclipart"}


def test_no_held_out_picture_in_train_by_bytes(samples):
    train_files = {row["file"] for row in samples["train"]}
    train_pixels = {row["image"].tobytes() for row in samples["train"]}
    for split in ("test-seen", "test-unseen", "unseen"):
        for row in samples[split]:
            assert row["file"] not in train_files, row["key"]
            assert row["image"].tobytes() not in train_pixels, row["key"]


def test_no_held_out_picture_in_train_by_perceptual_hash(samples):
    held = [row for split in ("test-seen", "test-unseen", "unseen") for row in samples[split]]
    train = samples["train"]
    matches = pictures.perceptual_matches(
        [pictures.perceptual_hash(row["image"]) for row in held], [pictures.perceptual_hash(row["image"]) for row in train]
    )
    pairs = [(held[i]["key"], train[j]["key"]) for i, j in np.argwhere(matches)]
    assert not pairs


def test_perceptual_hash_sees_small_changes_as_the_same_and_colour_as_different(samples):
    image = samples["train"][0]["image"]
    moved = Image.fromarray(np.clip(np.asarray(image).astype(int) + 3, 0, 255).astype(np.uint8))
    swapped = Image.fromarray(np.asarray(image)[..., ::-1].copy())
    hashes = [pictures.perceptual_hash(i) for i in (image, moved.resize((48, 48)), swapped)]
    assert pictures.perceptual_matches(hashes[:1], hashes[1:]).tolist() == [[True, False]]


def test_no_held_out_group_in_train(samples):
    held = set(sample.manifest()["unseen_groups"])
    assert held == {row["meta"]["group"] for row in samples["test-unseen"]}
    assert not held & {row["meta"]["group"] for row in samples["train"]}
    assert not held & {row["meta"]["group"] for row in samples["test-seen"]}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("man health worker", "woman health worker"),
        ("person running", "woman running facing right"),
        ("one o clock", "seven thirty"),
        ("kiss", "couple with heart"),
        ("red heart", "blue heart"),
        ("mouse", "mouse face"),
    ],
)
def test_variants_of_one_base_share_a_group(samples, a, b):
    group = {row["meta"]["label"]: row["meta"]["group"] for rows in samples.values() for row in rows}
    assert group[a] == group[b]


def test_held_out_names_are_not_in_openclipart(samples):
    manifest = sample.manifest()
    phrases = [f" {phrase} " for phrase in manifest["unseen_phrases"]]
    assert {phrase_of(name).strip() for name in manifest["classes"]["unseen"]} <= set(manifest["unseen_phrases"])
    for row in samples["train"]:
        if row["meta"]["source"] == "openclipart":
            text = "|".join(phrase_of(caption) for caption in row["meta"]["captions"])
            assert not [phrase for phrase in phrases if phrase in text], row["key"]


def test_no_trained_caption_is_a_held_out_name(samples):
    unseen = set(sample.manifest()["classes"]["unseen"])
    assert not [row["key"] for row in samples["train"] if unseen & set(row["meta"]["captions"])]


def test_size_and_licences():
    files = [p for p in sample.path().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 22e6
    names = {p.name for p in (sample.path() / "LICENSES").iterdir()}
    for word in ("emoji-datasource", "emojilib", "openclipart", "Apache-2.0", "CC-BY-4.0", "fluent"):
        assert any(word.lower() in name.lower() for name in names), word


def test_tokenizer_has_clips_conventions():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sample.path() / "tokenizer.json"))
    start, end = tokenizer.token_to_id("<|startoftext|>"), tokenizer.token_to_id("<|endoftext|>")
    size = tokenizer.get_vocab_size()
    assert size <= writing.VOCABULARY_SIZE
    assert (start, end) == (size - 2, size - 1)
    ids = tokenizer.encode("Red  APPLE, ñ 7\n").ids
    assert [ids[0], ids[-1]] == [start, end]
    assert end not in ids[1:-1]
    assert tokenizer.encode("red apple, ñ 7").ids == ids


def test_shards_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="train-noto"):
        sample.shards("trian")


def test_writing_a_shard_twice_gives_the_same_bytes(tmp_path):
    picture = pictures.store(Image.new("RGB", (64, 64), "red"))
    rows = [{"key": key, "picture": picture, "meta": {"label": key}} for key in "ba"]
    writing.write_shard(tmp_path / "1.tar", rows)
    writing.write_shard(tmp_path / "2.tar", rows[::-1])
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
