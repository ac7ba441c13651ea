"""The state in which a model is judged: evaluation mode, no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def judging(model: Any) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and the model's device; the training mode of every part is put back afterwards."""
    modules = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in modules:
        module.training = False
    tensor = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    try:
        with torch.inference_mode():
            yield tensor.device if tensor is not None else torch.device("cpu")
    finally:
        for module in modules:
            module.training = True
