"""Tables of parameter names, read both ways: another library's name for ours, ours for theirs.

A row is a pair of templates, e.g. `("visual.ln_post.{wb}", "image_tower.norm_post.{wb}")`. `{n}`, `{m}` stand for a number,
`{wb}` for weight or bias, `{bn}` for what a batch norm holds, `{qkv}` for q, k or v.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = {
    "n": r"\d+",
    "m": r"\d+",
    "wb": "weight|bias",
    "bn": "weight|bias|running_mean|running_var|num_batches_tracked",
    "qkv": "q|k|v",
}


class NameMap:
    """A two-way map between another library's parameter names and ours.

    Args:
        rows: (theirs, ours) templates; the first row that fits a name counts.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        rows = list(rows)
        self._to_ours = [(_pattern(theirs), ours) for theirs, ours in rows]
        self._to_theirs = [(_pattern(ours), theirs) for theirs, ours in rows]

    def ours(self, theirs: str) -> str | None:
        """Our name for theirs, or None where no row fits."""
        return _translate(self._to_ours, theirs)

    def theirs(self, ours: str) -> str | None:
        """Their name for ours, or None where no row fits."""
        return _translate(self._to_theirs, ours)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{_FIELDS[p]})" for i, p in enumerate(parts)))


def _translate(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, template in rows:
        if found := pattern.fullmatch(name):
            return template.format(**found.groupdict())
    return None


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_PART_OF_QKV = re.compile(r"(.*\battn)\.([qkv])\.(weight|bias)")
_QKV = re.compile(r"(.*\battn)\.qkv\.(weight|bias)")


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack `attn.q`, `attn.k`, `attn.v` into `attn.qkv` where all three are there with one shape; else leave them."""
    import torch

    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _PART_OF_QKV.fullmatch(name)
        parts = [state.get(f"{found[1]}.{letter}.{found[3]}") for letter in "qkv"] if found else []
        if found is None or any(p is None or p.shape != tensor.shape or p.dtype != tensor.dtype for p in parts):
            fused[name] = tensor
        elif found[2] == "q":
            fused[f"{found[1]}.qkv.{found[3]}"] = torch.cat([p for p in parts if p is not None])
    return fused


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `fuse_qkv` took: `attn.qkv` as `attn.q`, `attn.k`, `attn.v`."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := _QKV.fullmatch(name):
            split |= {f"{found[1]}.{letter}.{found[2]}": part for letter, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split
