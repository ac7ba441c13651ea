"""FSDP2: each process holds its share of every weight, of its gradient and of the optimizer's moments (ZeRO, arXiv 1910.02054;
arXiv 2304.11277).

A block's weights are gathered when it computes, forward and backward, and let go of afterwards; its gradients are averaged over
the processes and split at once, micro-batch by micro-batch, so no process ever holds all gradients. What is no block (embeddings,
positions, projections) is gathered as one unit. Numbers (a scale, a bias) can't be split, and the parameters that the loss itself
uses are wanted outside of the towers: every process keeps those whole, and their gradients are averaged apart.

A share is a DTensor. Files hold whole tensors: `whole` puts one together, `split_like` takes this process's share of one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wordsight.system import ContrastiveSystem
from wordsight.train.distributed import World

if TYPE_CHECKING:
    from wordsight.train.recipe import Recipe

CONTAINERS = (nn.ModuleList, nn.Sequential)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ENTRIES = ("forward_row",)  # methods besides `forward` by which a tower calls a block


def check(recipe: Recipe) -> None:
    """Whether the recipe's parts go together with its `parallel`.

    Raises:
        ValueError: which part does not.
    """
    if recipe.parallel == "fsdp" and recipe.optim.muon_lr is not None:
        raise ValueError("Muon needs whole matrices, parallel=fsdp splits them: set optim.muon_lr=none, or parallel=ddp")
    if recipe.parallel == "fsdp" and recipe.compile:
        raise ValueError("a tower whose blocks are gathered one by one is no single graph: set compile=false, or parallel=ddp")


def is_split(tensor: Tensor) -> bool:
    """Whether this process holds only its share of `tensor`."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes seconds to import


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is split (it may have no elements), the tensor itself otherwise; no copy."""
    share: Tensor = tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return share


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is split, put together by all processes, which must all ask for it; others as they are."""
    found: Tensor = tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return found


def split_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's share of a whole tensor that every process has, split as `model` is; as it is where `model` is whole."""
    if not is_split(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    split = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    share = split.to_local().clone()  # a view would keep the whole alive
    found: Tensor = DTensor.from_local(share, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return found


def add_shares(values: Tensor, model: Tensor) -> Tensor:
    """Sums over the shares of `model` -> sums over the whole of it, in place, on all processes; as they are where it is whole."""
    if is_split(model):
        import torch.distributed as dist

        dist.all_reduce(values, group=model.device_mesh.get_group())  # type: ignore[attr-defined]
    return values


class Sharded:
    """A system whose weights are split over the processes of a world, in place, and the copies that are made of it.

    Attributes:
        system: the system, its weights split.
        kept: its parameters that every process keeps whole, and whose gradients `average_kept` averages.
    """

    def __init__(
        self, system: nn.Module, world: World, device: torch.device, *, precision: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        """Split `system`, which is whole and the same on every process; afterwards it computes by `embeddings` or `loss` alone.

        Args:
            system: on its device.
            world: the processes, connected.
            device: of this process.
            precision: with "bf16" the weights of blocks that are made of linear layers, convolutions and norms travel, and are
                held while a block computes, as bfloat16. That changes nothing: autocast rounds the weights of products so anyway,
                norms (which it computes in float32) are kept whole then, and gradients are added up in float32.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # no tower writes into what a block gave
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self.system, self.world = system, world
        self._blank = _without_weights(system)
        halved = {block for block in blocks(system) if precision == "bf16" and _is_of_products(block)}
        self.kept = _kept(system, halved)
        for parameter in self.kept:
            dist.broadcast(parameter.detach(), 0)  # as DDP does for every one
        common: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (world.size,)),
            "ignored_params": set(self.kept),
        }
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(system):
            fully_shard(block, mp_policy=half if block in halved else MixedPrecisionPolicy(), **common)
            for entry in ENTRIES:
                if hasattr(block, entry):
                    register_fsdp_forward_method(block, entry)
        fully_shard(system, **common)
        register_fsdp_forward_method(system, "embeddings" if isinstance(system, ContrastiveSystem) else "loss")

    def average_kept(self) -> None:
        """Average over the processes the gradients that FSDP leaves alone, in place."""
        gradients = [parameter.grad for parameter in self.kept if parameter.grad is not None]
        if gradients:
            flat = self.world.add(torch.cat([gradient.flatten() for gradient in gradients])) / self.world.size
            for gradient, value in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(value.view_as(gradient))

    def shares(self) -> nn.Module:
        """A second system with weights of its own, split in the same way; it can't compute."""
        return self._filled({name: p.detach().clone() for name, p in _named(self.system)}, self.system)

    def whole(self, holder: nn.Module) -> nn.Module:
        """A plain copy of the system, or of what `shares` gave, with whole weights of its own; all processes must ask for it."""
        return self._filled({name: _own(p) for name, p in _named(holder)}, holder)

    def zeros(self) -> nn.Module:
        """A plain copy of the system whose weights are all 0, for counting; one process may ask for it alone."""
        device = local(next(self.system.parameters())).device
        weights = {name: torch.zeros(p.shape, dtype=p.dtype, device=device) for name, p in _named(self.system)}
        return self._filled(weights, self.system)

    def _filled(self, weights: Mapping[str, Tensor], holder: nn.Module) -> nn.Module:
        """The blank copy with these weights and the holder's buffers and mode."""
        filled = copy.deepcopy(self._blank)
        made: dict[Tensor, nn.Parameter] = {}  # a weight that is in two places stays one
        for name, blank in list(filled.named_parameters(remove_duplicate=False)):
            owner, _, last = name.rpartition(".")
            if blank not in made:
                made[blank] = nn.Parameter(weights[name], requires_grad=blank.requires_grad)
            setattr(filled.get_submodule(owner), last, made[blank])
        for mine, theirs in zip(filled.buffers(), holder.buffers(), strict=True):
            mine.copy_(theirs)
        return filled.train(holder.training)


def blocks(system: nn.Module) -> Iterator[nn.Module]:
    """The units whose weights are gathered together, inner ones first: modules with parts of their own that stand in a list."""
    found = {
        child: None
        for module in system.modules()
        if isinstance(module, CONTAINERS)
        for child in module.children()
        if not isinstance(child, CONTAINERS) and any(True for _ in child.children()) and any(True for _ in child.parameters())
    }
    return reversed(found)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's shares."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def _kept(system: nn.Module, halved: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that are not split: numbers, those of the loss itself, and norms in blocks that travel as bfloat16."""
    kept = set(system.loss_parameters()) if isinstance(system, ContrastiveSystem) else set()
    for block in halved:
        kept |= {p for module in block.modules() if isinstance(module, NORMS) for p in module.parameters()}
    return [parameter for parameter in system.parameters() if parameter.ndim == 0 or parameter in kept]


def _is_of_products(block: nn.Module) -> bool:
    """Whether all weights of a block are those of products, whose operands autocast rounds, and of norms."""
    owners = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
    return all(isinstance(module, (nn.Linear, nn.Conv2d, *NORMS)) for module in owners)


def _without_weights(system: nn.Module) -> nn.Module:
    """A deep copy whose parameters have shapes and no memory; buffers are copied."""
    blanks: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in system.parameters()
    }
    return copy.deepcopy(system, blanks)


def _named(system: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return system.named_parameters(remove_duplicate=False)


def _own(parameter: nn.Parameter) -> Tensor:
    return whole(parameter.detach()) if is_split(parameter) else parameter.detach().clone()
