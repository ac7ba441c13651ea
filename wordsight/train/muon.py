"""Muon for the weights of linear and convolutional layers (Jordan et al. 2024; arXiv 2502.16982), AdamW for all else.

Shape legend: R rows of a weight (outputs), C columns (inputs times the kernel's places).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# a quintic whose iteration drives singular values towards 1 fast, though not exactly: they end between about .7 and 1.2
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix_RC: Tensor, num_iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: U V' for matrix = U S V', by Newton-Schulz iterations without a decomposition.

    Args:
        matrix_RC: [R, C], any scale.
        num_iterations: of X <- a X + (b A + c A^2) X, A = X X', from X = matrix / ||matrix||.

    Returns:
        [R, C], singular values between about .7 and 1.2 (0 where the matrix has none).
    """
    a, b, c = _COEFFICIENTS
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC  # the smaller side gives the smaller products
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon=True` are updated by Muon instead.

    W <- (1 - lr wd) W - lr sqrt(max(1, R / C)) orthogonalize(g + m (v - g)), v <- m v + (1 - m) g: Nesterov momentum whose
    update has all directions of the weight move alike, where AdamW's follows the few with large gradients. Convolutions count as
    matrices [out, in x kernel].
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.95, **adamw: Any) -> None:
        """Take parameter groups; those of `hidden_weights` carry `muon=True`.

        Args:
            groups: as for AdamW.
            momentum: m.
            adamw: AdamW's own options, for the other groups.
        """
        super().__init__([{"muon": False, **group} for group in groups], **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure: compute the gradients first, then call step()")
        mine = [(group, p, p.grad) for group in self.param_groups if group["muon"] for p in group["params"] if p.grad is not None]
        for _, parameter, _ in mine:
            parameter.grad = None  # so that AdamW passes it over
        super().step()
        for group, parameter, gradient in mine:
            parameter.grad = gradient
            self._update(group, parameter, gradient)

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        velocity = state["momentum"].lerp_(gradient, 1 - self.momentum)
        update_RC = orthogonalize(gradient.lerp(velocity, self.momentum).flatten(1))
        rows, columns = update_RC.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update_RC.view_as(parameter), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def hidden_weights(system: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon is meant for: those of linear and convolutional layers, not embeddings, positions or projections."""
    hidden = [module for module in system.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return {parameter for module in hidden if isinstance(parameter := module.weight, nn.Parameter) and parameter.requires_grad}
