"""The loader: the same batches whatever the workers, ranks and the step that it begins at; bad samples named and counted."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import Letters, encoded, members, picture, write_shards, write_tar
from wordsight.data import BadSampleError, DataSource, Loader, TooManyBadSamplesError, iterate, open_source
from wordsight.data.decode import decode
from wordsight.data.loader import caption_index, make_pixels, text_ids
from wordsight.data.order import sample_rng, sample_uniforms
from wordsight.data.transform import Preprocess, TrainTransform
from wordsight.types import BadSample, Batch, Sample


class Memory:
    """A source in memory; bytes that are no picture are bad samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)
        self.bad: list[BadSample] = []
        self.part_sizes = [len(self.samples)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def memory(number: int, bad: Sequence[int] = ()) -> Memory:
    return Memory(
        [
            Sample(
                f"s{i}", b"no picture" if i in bad else encoded(picture(i, (20 + i, 24))), (f"first {i}", f"second {i}", "shared")
            )
            for i in range(number)
        ]
    )


def take(loader: Loader, number: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), number))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert one.bad == other.bad
    for name in ("pixels", "tokens", "text_ids", "image_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def make(source: Any, **options: Any) -> Loader:
    options = {
        "batch_size": 8,
        "transform": TrainTransform(16, scale=(0.3, 1.0), flip=0.5),
        "tokenizer": Letters(),
        "seed": 5,
        **options,
    }
    return Loader(source, **options)


def test_a_batch_is_what_it_should_be(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 6])
    loader = make(tmp_path)
    assert (loader.samples_per_epoch, loader.steps_per_epoch) == (11, 2)
    batch = next(loader.batches())
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (8, 3, 16, 16)
    assert batch.tokens.dtype == batch.text_ids.dtype == batch.image_ids.dtype == torch.int64
    source = open_source(tmp_path)
    for i in range(8):
        sample = source[int(batch.image_ids[i])]
        assert sample.key == batch.keys[i]
        assert torch.equal(batch.tokens[i], Letters()([sample.captions[0]])[0])


@pytest.mark.parametrize("transform", [TrainTransform(16, flip=0.5), Preprocess(16)], ids=["train", "eval"])
@pytest.mark.parametrize("sampling", ["epoch", "replacement"])
def test_batches_do_not_depend_on_the_workers(tmp_path: Path, transform: Any, sampling: str) -> None:
    write_shards(tmp_path, [7, 6])
    alone = take(make(tmp_path, transform=transform, sampling=sampling), 5, start=2)
    state = torch.get_rng_state()
    for workers in (1, 2):
        for one, other in zip(
            alone, take(make(tmp_path, transform=transform, sampling=sampling, num_workers=workers), 5, 2), strict=True
        ):
            assert_same(one, other)
    assert torch.equal(torch.get_rng_state(), state), "the number of workers changed torch's random numbers"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 12), st.sampled_from(["epoch", "replacement"]), st.booleans(), st.integers(0, 3), st.sampled_from([1, 2, 4])
)
def test_resume_at_any_step_and_any_number_of_ranks(step: int, sampling: str, weighted: bool, seed: int, world_size: int) -> None:
    sources: Any = [memory(9, bad=[4]), memory(5)]
    options = {"sampling": sampling, "seed": seed, "batch_size": 4, "max_bad_share": 1.0}
    if weighted:
        options["first_caption_prob"] = 0.5
    whole = take(make(sources, **options), step + 2)[step:]
    ranks = [take(make(sources, rank=r, world_size=world_size, **options), 2, step) for r in range(world_size)]
    for i, expected in enumerate(whole):
        parts = [batches[i] for batches in ranks]
        assert expected.keys == tuple(key for part in parts for key in part.keys)
        assert expected.bad == tuple(bad for part in parts for bad in part.bad)
        for name in ("pixels", "tokens", "text_ids", "image_ids"):
            assert torch.equal(getattr(expected, name), torch.cat([getattr(part, name) for part in parts]))


def test_an_epoch_draws_every_sample_once_and_goes_on() -> None:
    loader = make([memory(12)], batch_size=8)
    ids = torch.cat([batch.image_ids for batch in take(loader, 3)]).tolist()
    assert sorted(ids[:12]) == sorted(ids[12:]) == list(range(12))
    assert ids[:12] != ids[12:]
    assert loader.bad.drawn == 24


def test_the_same_picture_is_cropped_anew() -> None:
    batches = take(make([memory(4)], batch_size=4), 2)
    one, other = ({key: batch.pixels[i] for i, key in enumerate(batch.keys)} for batch in batches)
    assert all(not torch.equal(one[key], other[key]) for key in one)


def test_decoded_in_memory_the_batches_are_the_same() -> None:
    options = {"transform": Preprocess(16), "first_caption_prob": 0.7, "max_bad_share": 0.2, "batch_size": 8}
    plain, cached = (make([memory(13, bad=[3, 7])], cache_decoded=value, **options) for value in (False, True))
    for one, other in zip(take(plain, 6, 1), take(cached, 6, 1), strict=True):
        assert_same(one, other)
    with pytest.raises(ValueError, match="give a Preprocess"):
        make([memory(3)], cache_decoded=True)


def test_weights_say_how_much_of_each_batch(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(30))
    write_tar(tmp_path / "b.tar", members(3, first=30))
    sources = [DataSource(path=tmp_path / "a.tar", weight=0.9), DataSource(path=tmp_path / "b.tar", weight=0.1)]
    for batch in take(make(sources, batch_size=20), 4):
        assert Counter(key.split("/")[0] for key in batch.keys) == {"a.tar": 18, "b.tar": 2}
    with pytest.raises(ValueError, match=r"either every source has a weight or none.*b\.tar"):
        make([sources[0], str(tmp_path / "b.tar")])


def test_ids_are_equal_where_texts_and_pictures_are() -> None:
    batch = next(make([memory(5)], batch_size=40).batches())
    texts = ["".join(chr(c) for c in row.tolist()) for row in batch.tokens]
    for i, j in itertools.combinations(range(40), 2):
        assert (texts[i] == texts[j]) == (batch.text_ids[i] == batch.text_ids[j])
        assert (batch.keys[i] == batch.keys[j]) == (batch.image_ids[i] == batch.image_ids[j])
    assert text_ids(["a", "b"]).tolist() == text_ids(["a", "b", "a"]).tolist()[:2]
    assert text_ids([]).shape == (0,)


@pytest.mark.parametrize(
    ("prob", "expected"), [(0.8, [0.8, 0.1, 0.1]), (None, [1 / 3] * 3), (1.0, [1, 0, 0]), (0.0, [0, 0.5, 0.5])]
)
def test_caption_choice(prob: float | None, expected: list[float]) -> None:
    uniforms = sample_uniforms(7, np.arange(6000) + 10**12)
    chosen = caption_index(np.full(6000, 3), uniforms, prob)
    assert np.allclose(np.bincount(chosen, minlength=3) / 6000, expected, atol=0.02)
    assert [int(caption_index(3, row, prob)) for row in uniforms[:50]] == chosen[:50].tolist()
    assert not caption_index(np.ones(6000, dtype=int), uniforms, prob).any()


def test_a_sample_without_captions_is_described_by_its_label() -> None:
    image = encoded(picture())
    loader = make(Memory([Sample("a", image, (), "cat"), Sample("b", image)]), batch_size=2, max_bad_share=0.5)
    batch = next(loader.batches())
    assert batch.keys == ("a",)
    assert torch.equal(batch.tokens, Letters()(["cat"]))
    assert batch.bad == (BadSample("b", "has neither caption nor label"),)


def test_the_fast_crop_is_pils_crop() -> None:
    transform = TrainTransform(64, scale=(0.5, 1.0), flip=0.5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noisy = np.asarray(picture(seed, (150 + 7 * seed, 260))).astype(int) + rng.integers(-20, 20, (260, 150 + 7 * seed, 3))
        from PIL import Image

        data = encoded(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), "PNG")
        fast = make_pixels(Sample("x", data), transform, 3, seed).int()
        slow = transform(decode(data), sample_rng(3, seed)).int()
        difference = (fast - slow).abs()
        assert difference.max() <= 3
        assert difference.float().mean() < 0.1


def test_scaled_decoding_keeps_the_picture() -> None:
    transform = TrainTransform(32)
    data = encoded(picture(1, (700, 500)), quality=95)
    fast = make_pixels(Sample("x", data), transform, 3, 0).float()
    slow = transform(decode(data), sample_rng(3, 0)).float()
    assert (fast - slow).abs().mean() < 2


def test_evaluation_pixels_are_open_clips() -> None:
    reference = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    source = memory(6)
    for read in iterate(source, Preprocess(32, mean=(0, 0, 0), std=(1, 1, 1)), batch_size=4):
        for sample, pixels in zip(read.samples, read.pixels, strict=True):
            assert torch.allclose(pixels, reference(decode(sample.image)), atol=1 / 255)


# Bad samples


def test_bad_samples_are_named_and_make_their_batch_smaller() -> None:
    loader = make([memory(40, bad=[7])], batch_size=40)
    for count, batch in enumerate(itertools.islice(loader.batches(), 3), start=1):
        assert len(batch) == len(batch.keys) == len(batch.tokens) == 39
        assert [bad.key for bad in batch.bad] == ["s7"]
        assert (loader.bad.drawn, loader.bad.count, len(loader.bad)) == (40 * count, count, 1)
    assert "s7: is no picture" in str(loader.bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_are_an_error_that_lists_ten(workers: int) -> None:
    source = memory(100, bad=range(0, 60, 5))
    with pytest.raises(TooManyBadSamplesError, match=r"max_bad_share=0.05") as caught:
        take(make([source], num_workers=workers, batch_size=50), 3)
    named = [line for line in str(caught.value).splitlines() if line.startswith("  s")]
    assert 6 <= len(named) <= 10
    take(make([source], max_bad_share=0.12, num_workers=workers, batch_size=50), 5)
    with pytest.raises(TooManyBadSamplesError):
        list(iterate(source, Preprocess(16)))
    assert sum(len(read.bad) for read in iterate(source, Preprocess(16), max_bad_share=0.12)) == 12


def test_few_bad_samples_never_stop_a_long_run() -> None:
    loader = make([memory(40, bad=[3, 9])], batch_size=8)  # exactly 5%
    for _ in itertools.islice(loader.batches(), 100):
        pass
    assert loader.bad.count == 40


def test_a_share_of_zero_allows_none() -> None:
    with pytest.raises(TooManyBadSamplesError, match="s1: is no picture"):
        take(make([memory(400, bad=[1])], max_bad_share=0, batch_size=100), 4)


class Crashing(Memory):
    """Its fourth sample ends the process that reads it."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Raising(Memory):
    """Its fourth sample meets a mistake in the program."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            raise KeyError("a mistake")
        return super().__getitem__(index)


@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"worker.*exited unexpectedly|killed by signal"):
        take(make([Crashing(memory(8).samples)], num_workers=1), 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_is_no_bad_sample(workers: int) -> None:
    with pytest.raises(KeyError, match="a mistake"):
        take(make([Raising(memory(8).samples)], num_workers=workers), 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 9, "world_size": 2}, "multiple of the 2 processes"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"sampling": "random"}, "sampling"),
        ({"shuffle": "yes"}, "shuffle"),
        ({"first_caption_prob": 2.0}, "first_caption_prob"),
        ({"num_workers": -1}, "num_workers"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_bad_share": 5}, "max_bad_share"),
    ],
)
def test_options_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make([memory(3)], **options)
    with pytest.raises(ValueError, match="no source"):
        make([])
    with pytest.raises(ValueError, match="start_step"):
        next(make([memory(3)]).batches(-1))


# Reading once


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_covers_every_sample_once_in_order(workers: int) -> None:
    source = memory(23, bad=[5, 20])
    reads = list(iterate(source, Preprocess(16), batch_size=4, num_workers=workers, max_bad_share=0.1))
    assert [position for read in reads for position in read.positions] == [i for i in range(23) if i not in (5, 20)]
    assert [sample.key for read in reads for sample in read.samples] == [f"s{i}" for i in range(23) if i not in (5, 20)]
    assert [bad.key for read in reads for bad in read.bad] == ["s5", "s20"]
    assert len(reads) == 6
    preprocess = Preprocess(16)
    for read in reads:
        assert read.pixels.dtype == torch.float32
        for sample, pixels in zip(read.samples, read.pixels, strict=True):
            assert torch.equal(pixels, preprocess(decode(sample.image)))


def test_reading_takes_any_function() -> None:
    (read,) = iterate(memory(3), lambda image: torch.full((3, 2, 2), float(image.width)))
    assert read.pixels[:, 0, 0, 0].tolist() == [20.0, 21.0, 22.0]
    (empty,) = iterate(memory(2, bad=[0, 1]), Preprocess(16), max_bad_share=1.0)
    assert empty.samples == ()
    assert len(empty.bad) == 2


def test_bad_sample_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadSampleError("name", "reason")))
    assert (error.key, error.reason, str(error)) == ("name", "reason", "name: reason")
