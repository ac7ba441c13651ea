"""LAMB: Adam's update, with each weight's step in proportion to that weight's own length (arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wordsight.train.sharded import add_shares, is_split, local


class Lamb(torch.optim.Optimizer):
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, u = m' / (sqrt(v') + eps) + wd w, w <- w - lr (|w| / |u|) u.

    m' and v' are m and v over 1 - b^t. Where |w| or |u| is 0 their ratio counts as 1, and in a group without decay (gains,
    biases, a temperature) there is no ratio: those are Adam's plain updates, as in the published code. Unlike that code it
    doesn't clip the gradients: the loop does, where the recipe says so.

    Args:
        params: parameters or groups, as for torch's optimizers.
        lr: learning rate, above 0; LAMB's are larger than AdamW's, 1e-3 and up.
        betas: b1, b2.
        eps: added to sqrt(v').
        weight_decay: wd.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if not lr > 0 or not eps > 0 or not weight_decay >= 0:
            raise ValueError(f"LAMB needs lr and eps above 0 and no negative weight_decay, got {lr}, {eps}, {weight_decay}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Lamb takes no closure: compute the gradients first, then call step()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad)

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state, whole = self.state[parameter], parameter
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if state["step"].device.type != "cpu":  # where a checkpoint's state was put; it is a number, and the host asks for it
            state["step"] = state["step"].cpu()
        state["step"] += 1
        (b1, b2), step = group["betas"], state["step"].item()
        parameter, gradient = local(parameter), local(gradient)  # of a weight that is split over processes this one's share
        mean = local(state["exp_avg"]).lerp_(gradient, 1 - b1)
        square = local(state["exp_avg_sq"]).mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        update = (mean / (1 - b1**step)).div_((square / (1 - b2**step)).sqrt_().add_(group["eps"]))
        if group["weight_decay"] > 0:
            update.add_(parameter, alpha=group["weight_decay"])
            length, size = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            if is_split(whole):
                length, size = add_shares(torch.stack([length, size]).square(), whole).sqrt()
            update.mul_(torch.where((length > 0) & (size > 0), length / size, 1.0))
        parameter.sub_(update, alpha=group["lr"])
