"""A ring of processes: every process's block of rows passes by every other one, without ever being gathered.

While a process computes on the block that it holds, that block is already on its way to the next one. What the processes add to a
block (its columns' sums, its gradient) travels one hop behind it and comes home at the end.

Shape legend: T rows of a block, X anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Block = Sequence[Tensor]
_AHEAD, _BEHIND = 0, 100  # tags that keep apart what travels at the same time


class Ring:
    """The processes of a group in rank order, each of which sends to the next and receives from the one before.

    Args:
        group: a process group of torch.distributed; None is the default one, or this process alone where there is none.

    Attributes:
        rank: this process's place.
        size: processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)

    @classmethod
    def of_one(cls) -> Ring:
        """This process alone."""
        ring = cls.__new__(cls)
        ring.group, ring.rank, ring.size = None, 0, 1
        return ring

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, a new tensor without gradient."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def shapes(self, tensor: Tensor) -> list[tuple[int, ...]]:
        """The shape of every process's tensor, in rank order.

        Raises:
            ValueError: on every process, if they differ in more than the number of rows.
        """
        if self.size == 1:
            return [tuple(tensor.shape)]
        mine = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        shapes = [tuple(part.tolist()) for part in parts]
        if len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"the processes hold embeddings of unequal widths: {shapes}; all must have the same model")
        return shapes

    def around(
        self,
        block: Block,
        sizes: Sequence[int],
        visit: Callable[[Block, int], Tensor | None],
        merge: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
    ) -> Tensor | None:
        """Show every process's block to `visit`, once, and bring home what was made for this process's own.

        Args:
            block: tensors [T, ...] of this process; they are not changed.
            sizes: T of every process, in rank order.
            visit: (a block, the rank that it is from) -> what this process adds for its rows, [T, X]; or None, on every process.
            merge: puts two such additions together, in the memory of the first if it likes.

        Returns:
            all processes' additions for the own block, merged; None if there are none.
        """
        added: Tensor | None = None
        behind: _Exchange | None = None
        for hop in range(self.size):
            owner = (self.rank - hop) % self.size
            before = (owner - 1) % self.size
            ahead = self._exchange(block, sizes[before], _AHEAD) if hop < self.size - 1 else None
            own = visit(block, owner)
            if own is not None:
                added = own if behind is None else merge(behind.wait()[0], own)
                behind = self._exchange([added], sizes[before], _BEHIND) if self.size > 1 else None
            if ahead is not None:
                block = ahead.wait()
        return added if behind is None else behind.wait()[0]

    def _exchange(self, tensors: Block, rows: int, first_tag: int) -> _Exchange:
        """Start to send `tensors` to the next process and to receive their like, with `rows` rows, from the one before."""
        received = [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in tensors]
        following, preceding = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if self.group is not None:
            following, preceding = (dist.get_global_rank(self.group, rank) for rank in (following, preceding))
        operations = []
        sent = [tensor.contiguous() for tensor in tensors]
        for tag, (outgoing, incoming) in enumerate(zip(sent, received, strict=True), first_tag):
            if outgoing.numel():  # a process may have no rows: nothing is sent, and the other side knows it
                operations.append(dist.P2POp(dist.isend, outgoing, following, self.group, tag))
            if incoming.numel():
                operations.append(dist.P2POp(dist.irecv, incoming, preceding, self.group, tag))
        return _Exchange(dist.batch_isend_irecv(operations) if operations else [], sent, received)


class _Exchange:
    """Tensors on their way."""

    def __init__(self, works: Sequence[dist.Work], sent: Block, received: Block) -> None:
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Block:
        """What has come, once all of it has, and what was sent has left."""
        for work in self._works:
            work.wait()
        self._sent = ()
        return self._received
