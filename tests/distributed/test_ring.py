"""Losses around a ring of processes: those of one process with the whole batch, under DDP and FSDP2, with unequal shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.processes import in_processes
from wordsight.losses.contrastive import duplicate_keys, info_nce, sigmoid
from wordsight.losses.ring import Ring
from wordsight.train.distributed import World, join

ROWS = 13
SHARES = {2: [[7, 6], [1, 12], [13, 0]], 3: [[5, 4, 4], [10, 1, 2], [0, 13, 0]]}


class Towers(nn.Module):
    """Two linear towers, a scale and a bias of shape [1], as FSDP wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.tensor([2.0]))
        self.bias = nn.Parameter(torch.tensor([-3.0]))

    def forward(self, loss: str, rows: slice, captions: int, ring: Ring | None) -> Tensor:
        g = torch.Generator().manual_seed(3)
        pictures, words = (torch.randn(ROWS, n, generator=g, dtype=torch.float64)[rows] for n in (6, 5 * captions))
        weights = (0.5 + torch.rand(ROWS, generator=g, dtype=torch.float64))[rows]
        text_ids = torch.randint(8, (ROWS, captions), generator=g)[rows]
        keys = duplicate_keys(text_ids, torch.arange(ROWS)[rows] // 2) if loss.endswith("repeated") else None
        image = F.normalize(self.image(pictures), dim=-1)
        text = F.normalize(self.text(words.unflatten(1, (captions, 5))), dim=-1)
        text = text if captions > 1 else text[:, 0]
        options = {"keys": keys, "weights": weights, "ring": ring, "tile": 3}
        if loss.startswith("sigmoid"):
            return sigmoid(image, text, self.log_scale[0], self.bias[0], **options)
        return info_nce(image, text, self.log_scale[0], label_smoothing=0.1, **options) + 0 * self.bias.sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return {name.removeprefix("module."): whole(p.grad).clone() for name, p in module.named_parameters()}


CASES = [(loss, captions) for loss in ("softmax", "softmax-repeated", "sigmoid", "sigmoid-repeated") for captions in (1, 2)]


def alone(loss: str, captions: int) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    towers = Towers().double()
    value = towers(loss, slice(None), captions, None)
    value.backward()
    return value.item(), gradients(towers)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("processes", [2, 3])
def test_a_ring_gives_the_loss_and_gradients_of_one_process(processes: int, wrapper: str, tmp_path: Path) -> None:
    def run() -> list[tuple[float, dict[str, Tensor]]]:
        world = World.from_environment()
        results = []
        with join(world, torch.device("cpu")):
            for sizes in SHARES[processes]:
                for loss, captions in CASES:
                    torch.manual_seed(0)
                    towers: nn.Module = Towers().double()
                    if wrapper == "ddp":
                        towers = nn.parallel.DistributedDataParallel(towers, find_unused_parameters=True)
                    else:
                        from torch.distributed.fsdp import fully_shard

                        fully_shard(towers)
                    start = sum(sizes[: world.rank])
                    value = towers(loss, slice(start, start + sizes[world.rank]), captions, Ring())
                    value.backward()
                    results.append((value.item(), gradients(towers)))
        return results

    expected = [alone(*case) for case in CASES] * len(SHARES[processes])
    for results in in_processes(processes, run, tmp_path):
        for (value, found), (right_value, right) in zip(results, expected, strict=True):
            assert value == pytest.approx(right_value, abs=1e-12)
            for name, gradient in right.items():
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_negatives_of_every_process_are_negatives_for_all(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    image, text, negatives = (F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=-1) for n in (7, 7, 5))
    scale, bias = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)

    def run() -> tuple[float, float]:
        world = World.from_environment()
        with join(world, torch.device("cpu")):
            rows, others = (slice(0, 3), slice(0, 5)) if world.rank == 0 else (slice(3, 7), slice(5, 5))
            mine = image[rows], text[rows], scale
            return (
                info_nce(*mine, negatives=negatives[others], ring=Ring()).item(),
                sigmoid(*mine, bias, negatives=negatives[others], ring=Ring()).item(),
            )

    expected = (
        info_nce(image, text, scale, negatives=negatives).item(),
        sigmoid(image, text, scale, bias, negatives=negatives).item(),
    )
    for found in in_processes(2, run, tmp_path):
        assert found == pytest.approx(expected, abs=1e-12)


def test_no_process_holds_the_global_batch_or_matrix(tmp_path: Path) -> None:
    """Whatever a process allocates has at most its own or a visitor's rows, or a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes, width = [300, 400, 500], 8

    def run() -> int:
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                made = function(*args, **(kwargs or {}))
                for tensor in made if isinstance(made, tuple | list) else (made,):
                    if isinstance(tensor, torch.Tensor):
                        largest = max(largest, tensor.numel())
                return made

        world = World.from_environment()
        with join(world, torch.device("cpu")):
            image, text = (F.normalize(torch.randn(sizes[world.rank], width), dim=-1).requires_grad_() for _ in range(2))
            with Watch():
                info_nce(image, text, torch.tensor(2.0), ring=Ring(), tile=50).backward()
        return largest

    assert max(in_processes(3, run, tmp_path)) <= max(sizes) * width


def test_unequal_widths_are_an_error_everywhere(tmp_path: Path) -> None:
    def run() -> str:
        world = World.from_environment()
        with join(world, torch.device("cpu")):
            rows = F.normalize(torch.randn(3, 4 + world.rank), dim=-1)
            try:
                info_nce(rows, rows, torch.tensor(1.0), ring=Ring())
            except ValueError as error:
                return str(error)
        return "no error"

    assert all("unequal widths" in message for message in in_processes(2, run, tmp_path))


def test_the_plain_version_is_refused_in_a_ring(tmp_path: Path) -> None:
    def run() -> str:
        with join(World.from_environment(), torch.device("cpu")):
            rows = F.normalize(torch.randn(3, 4), dim=-1)
            try:
                info_nce(rows, rows, torch.tensor(1.0), ring=Ring(), tile=0)
            except ValueError as error:
                return str(error)
        return "no error"

    assert all("tile=0 holds the whole matrix" in message for message in in_processes(2, run, tmp_path))
