"""What every test shares: one thread a process, no network, torchvision's import made to work beside a CPU torch."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

# torchvision's wheel is built for CUDA: beside a CPU build of torch its import looks for two operators that are not there.
_torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    try:
        _torchvision_ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # already defined by a torchvision that matches
        continue


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
