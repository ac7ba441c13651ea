"""AdamW or LAMB without decay on gains, biases and scale (arXiv 1711.05101), warm-up with a cosine (arXiv 1608.03983), averaged
weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wordsight.train.lamb import Lamb
from wordsight.train.muon import MuonAdamW, hidden_weights
from wordsight.train.sharded import add_shares, is_split, local, split_like

if TYPE_CHECKING:
    from wordsight.train.recipe import OptimConfig
    from wordsight.train.sharded import Sharded


def split_by_decay(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(with decay, without): vectors and numbers - gains, biases, scale, class token - are not decayed, matrices are."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else free).append(parameter)
    return decayed, free


def make_optimizer(system: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (in the fused implementation where the device has one) or LAMB over the system's trainable parameters.

    Weights that are split over processes, which must be so already, stand in groups of their own: an update of many tensors at
    once takes one kind.

    Raises:
        ValueError: nothing in the system is trainable, or Muon is to go with LAMB, or to update split matrices, which it needs
            whole.
    """
    # not when the config is made, so that `--set` may change the two in any order
    if config.name == "lamb" and config.muon_lr is not None:
        raise ValueError("Muon goes with AdamW: set optim.muon_lr=none, or optim.name=adamw")
    decayed, free = split_by_decay(system.named_parameters())
    if not decayed and not free:
        raise ValueError("the model has no trainable parameter: set requires_grad on those that are to learn")
    hidden = hidden_weights(system) if config.muon_lr is not None else set()
    if any(is_split(p) for p in hidden):
        raise ValueError("Muon needs whole matrices, and these are split over processes: set optim.muon_lr=none, or parallel=ddp")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if p not in hidden], "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": [p for p in decayed if p in hidden], "weight_decay": config.weight_decay, "muon": True},
    ]
    groups = [
        {**group, "params": part}
        for group in groups
        for part in ([p for p in group["params"] if is_split(p)], [p for p in group["params"] if not is_split(p)])
        if part
    ]
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    kind = torch.optim.AdamW if config.muon_lr is None else MuonAdamW
    return kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of update `step` (from 1): linear over the warm-up, then from lr by the schedule towards lr *
    final_lr_share.

    The schedule would be at its end one update after the last, so that no update is wasted on a rate of 0.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, config: OptimConfig) -> None:
    """Follow the schedule, in proportion where a group has a highest rate of its own (Muon's).

    The schedule is a function of the step, so the optimizer holds no state of it.
    """
    for group in optimizer.param_groups:
        highest = config.muon_lr if config.muon_lr is not None and group["muon"] else config.lr
        group["lr"] = lr / config.lr * highest


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together; they are scaled down to `max_norm` where it is larger (None: left as they are)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient for gradient in gradients if is_split(gradient)]
    if not split:
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        return norm
    with torch.no_grad():
        shares, others = [local(gradient) for gradient in split], [g for g in gradients if not is_split(g)]
        square = add_shares(nn.utils.get_total_norm(shares, foreach=True).square(), split[0])
        norm = (square + sum(g.square().sum() for g in others)).sqrt()
        if max_norm is not None:  # torch's clip_grads_with_norm_ on tensors of one kind
            torch._foreach_mul_([*shares, *others], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Averaged:
    """An exponential moving average of a system's weights, kept as a second system: `average.system` can be evaluated and saved.

    weights = decay_t * weights + (1 - decay_t) * new, decay_t = min(decay, (1 + t) / (10 + t)), so that the first steps do not
    weigh for ever.
    """

    def __init__(self, system: nn.Module, decay: float, sharded: Sharded | None = None) -> None:
        self.decay = decay
        copied = copy.deepcopy(system) if sharded is None else sharded.shares()
        self.system = copied.requires_grad_(False).eval()

    def update(self, system: nn.Module, step: int) -> None:
        """Take the weights of update `step` (from 1) in. Buffers (running statistics) are copied, not averaged."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            mine, new = ([local(p) for p in model.parameters()] for model in (self.system, system))
            torch._foreach_lerp_(mine, new, 1 - decay)
            for kept, newest in zip(self.system.buffers(), system.buffers(), strict=True):
                kept.copy_(newest)


def optimizer_tensors(system: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state as named tensors: `<parameter name>|<state name>`."""
    for name, parameter in system.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}|{key}", value


def restore_optimizer(system: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put what `optimizer_tensors` gave back, as whole tensors; `step` stays where the implementation wants it (beside its
    parameter when fused)."""
    parameters = dict(system.named_parameters())
    state: dict[Tensor, dict[str, Any]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition("|")
        if owner not in parameters:
            raise ValueError(
                f"the optimizer's state names {owner!r}, which the model has not: the checkpoint is of another model"
            )
        share = split_like(value, parameters[owner])
        state.setdefault(parameters[owner], {})[key] = share if is_split(share) else value.to(parameters[owner].device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(state)
