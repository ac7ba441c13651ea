"""Batches to the device: in order, one ahead and never more, errors in their place; on the CPU nothing happens ahead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.data.test_loader import make
from tests.data.test_rows import RICH, assert_equal, rich
from wordsight.data.prefetch import CudaMover, on_device
from wordsight.data.transform import Preprocess
from wordsight.types import Batch

CPU = torch.device("cpu")


def batch(number: int) -> Batch:
    ids = torch.tensor([number])
    return Batch(
        torch.full((1, 3, 2, 2), number, dtype=torch.uint8), ids[:, None], ids, ids, (f"s{number}",), weights=ids.float()
    )


class Recorder:
    """Notes what happens when: a batch drawn, sent, arrived."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.events: list[str] = []
        self.fail_at = fail_at

    def batches(self, number: int) -> Iterator[Batch]:
        for i in range(number):
            if i == self.fail_at:
                raise RuntimeError(f"no batch {i}")
            self.events.append(f"draw {i}")
            yield batch(i)

    def send(self, one: Batch) -> Batch:
        self.events.append(f"send {one.keys[0][1:]}")
        return replace(one, keys=(f"{one.keys[0]} on its way",))

    def arrive(self, one: Batch) -> Batch:
        name = one.keys[0].removesuffix(" on its way")
        self.events.append(f"arrive {name[1:]}")
        return replace(one, keys=(name,))


def test_the_next_batch_is_sent_before_one_is_used() -> None:
    notes = Recorder()
    for one in on_device(notes.batches(3), CPU, mover=notes):
        notes.events.append(f"use {one.keys[0][1:]}")
    assert notes.events == [
        "draw 0", "send 0", "draw 1", "send 1", "arrive 0", "use 0", "draw 2", "send 2", "arrive 1", "use 1", "arrive 2", "use 2"
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "count", "expected"), [(5, 2, 2), (2, 5, 2), (0, None, 0), (3, 0, 0), (3, None, 3)])
@pytest.mark.parametrize("ahead", [True, False])
def test_no_batch_is_drawn_in_vain(number: int, count: int | None, expected: int, ahead: bool) -> None:
    notes = Recorder()
    found = list(on_device(notes.batches(number), CPU, count=count, mover=notes if ahead else None))
    assert [one.keys[0] for one in found] == [f"s{i}" for i in range(expected)]
    assert sum(event.startswith("draw") for event in notes.events) == expected


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_comes_when_its_batch_is_asked_for(ahead: bool) -> None:
    notes = Recorder(fail_at=2)
    found = on_device(notes.batches(5), CPU, mover=notes if ahead else None)
    assert [next(found).keys[0], next(found).keys[0]] == ["s0", "s1"]
    with pytest.raises(RuntimeError, match="no batch 2"):
        next(found)


def test_on_the_cpu_nothing_happens_ahead() -> None:
    notes = Recorder()
    found = on_device(notes.batches(3), CPU)
    assert notes.events == []
    next(found)
    assert notes.events == ["draw 0"]


def test_a_loaders_batches_stay_the_same() -> None:
    loader = make(rich(), transform=Preprocess(16), **RICH)
    notes = Recorder()
    plain = list(itertools.islice(loader.batches(3), 4))
    for one, other in zip(plain, on_device(loader.batches(3), CPU, count=4, mover=notes), strict=True):
        assert_equal(one, replace(other, keys=one.keys))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_reach_a_gpu_whole(workers: int) -> None:
    device = torch.device("cuda")
    loader = make(rich(), transform=Preprocess(16), num_workers=workers, pin_memory=True, **RICH)
    plain = list(itertools.islice(make(rich(), transform=Preprocess(16), **RICH).batches(), 6))
    for one, other in zip(plain, on_device(loader.batches(), device, count=6, mover=CudaMover(device)), strict=True):
        assert all(tensor.device.type == "cuda" for tensor in other.tensors().values())
        torch.cuda._sleep(1_000_000)  # the device is busy while the next copy is on its way
        assert_equal(one, other.to("cpu"))
