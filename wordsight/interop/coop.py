"""Learned prompts in CoOp's and CoCoOp's files (arXiv 2109.01134, 2203.05557), in and out.

`<out>/prompt_learner/model.pth.tar-<epochs>` holds {state_dict, epoch, optimizer, scheduler, val_result}. The state dict has the
context vectors `ctx`, CoCoOp's network `meta_net.linear{1,2}.{weight,bias}`, and `token_prefix` and `token_suffix`: embeddings of
the prompts' other tokens, which belong to the training classes and are dropped here as in the published programs. Where the class
name stands (end, middle, front) is not in it. The published scheduler's state has a scheduler and an optimizer in it as pickled
objects; inert ones stand for them.

Shape legend: C classes, M context tokens, W width of the text tower, L context length, V width of the joint embedding, H hidden
(V // 16).
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wordsight.interop.safe_read import CheckpointError, load_pickle

FOLDER = "prompt_learner"
META_NET = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
_TOKENS = ("token_prefix", "token_suffix")
_SHAPES = {  # by the letters of the legend; S is L - 1 - M
    **{f"meta_net.{name}": letters for name, letters in zip(META_NET, ("HV", "H", "WH", "W"), strict=True)},
    "token_prefix": "C1W",
    "token_suffix": "CSW",
}


@dataclass(frozen=True, kw_only=True)
class LearnedPrompts:
    """What was learned.

    Attributes:
        context: float32 [M, W], or [C, M, W] where each class has its own.
        meta_net: CoCoOp's network from the normalised image embedding to what is added to each context token; float32,
            "linear1.weight" [H, V], "linear1.bias" [H], "linear2.weight" [W, H], "linear2.bias" [W]. None in CoOp.
        epoch: how many epochs were trained; None where the file doesn't say.
        num_classes: C of the classes it was trained on; None where the file doesn't tell.
        notes: what a user should be told about how it was read.
    """

    context: Tensor
    meta_net: dict[str, Tensor] | None = None
    epoch: int | None = None
    num_classes: int | None = None
    notes: tuple[str, ...] = ()


class _Inert:
    """Stands for a scheduler or an optimizer: keeps nothing, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_SCHEDULERS = ("StepLR", "MultiStepLR", "CosineAnnealingLR")
_OPTIMIZERS = ("sgd.SGD", "adam.Adam", "adamw.AdamW", "rmsprop.RMSprop")
_STAND_INS: list[tuple[Any, str]] = [
    *((_Inert, f"torch.optim.lr_scheduler.{name}") for name in _SCHEDULERS),
    *((_Inert, f"torch.optim.{name}") for name in _OPTIMIZERS),
    (_empty_dict, "collections.defaultdict"),  # an optimizer's state
    (_Inert, "builtins.dict"),  # what that makes for a missing key
]


def read_prompts(
    path: str | Path,
    *,
    epoch: int | None = None,
    width: int | None = None,
    image_width: int | None = None,
    num_classes: int | None = None,
) -> LearnedPrompts:
    """Read learned prompts from a file of CoOp or CoCoOp.

    Args:
        path: the file, or the run's folder, of which the last epoch's file is taken.
        epoch: of a folder, the epoch to take.
        width: W of the model that is to use it; None: not checked.
        image_width: V of that model, for CoCoOp's network; None: not checked.
        num_classes: how many classes it is to be used for; None: not checked.

    Returns:
        The tensors, widened to float32.

    Raises:
        CheckpointError: the file asks for more than tensors, is damaged, holds other names or shapes or values that are not
            finite, is for another width, or has class-specific context for another number of classes.
        FileNotFoundError: no such file, or no file of that epoch.
    """
    path = _find(Path(path), epoch)
    content = load_pickle(path, allowed=_STAND_INS)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no checkpoint of CoOp: expected a dictionary with tensors by name under 'state_dict'")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    _check_names(path, state)
    if odd := [name for name, value in state.items() if not _is_plain(value)]:
        raise CheckpointError(f"{path}: {', '.join(odd)} is no plain tensor of floating-point numbers, as learned prompts are")
    _check(str(path), state, width=width, image_width=image_width)
    context = state["ctx"].float()
    meta_net = {name: state[f"meta_net.{name}"].float() for name in META_NET} if "meta_net.linear1.weight" in state else None
    trained = len(state["token_prefix"]) if "token_prefix" in state else len(context) if context.ndim == 3 else None
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    notes = [f"{path} is stored as {', '.join(dtypes)} and read as float32"] if dtypes != ["float32"] else []
    if num_classes is not None and trained is not None and num_classes != trained:
        told = f"{path} was trained on {trained} classes and is to be used for {num_classes}"
        if context.ndim == 3:
            raise CheckpointError(
                f"{told}, but its context is class-specific: each class has its own, and others have none. Use it for its own "
                "classes, or train a unified context (class_specific=False)"
            )
        notes.append(f"{told}; the context is unified, so it fits")
    told_epoch = content.get("epoch")
    done = told_epoch if isinstance(told_epoch, int) and not isinstance(told_epoch, bool) else None
    return LearnedPrompts(context=context, meta_net=meta_net, epoch=done, num_classes=trained, notes=tuple(notes))


def _find(path: Path, epoch: int | None) -> Path:
    """The file itself, or the one of a run's folder."""
    if path.is_file():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    files = {
        int(file.name.rsplit("-", 1)[1]): file for file in folder.iterdir() if re.fullmatch(r"model\.pth\.tar-\d+", file.name)
    }
    if not files:
        raise FileNotFoundError(f"no {FOLDER}/model.pth.tar-<epoch> in {path}")
    if epoch is not None and epoch not in files:
        raise FileNotFoundError(f"no epoch {epoch} in {folder}; there are {', '.join(map(str, sorted(files)))}")
    return files[epoch if epoch is not None else max(files)]


def _is_plain(value: Tensor) -> bool:
    """Floating-point numbers that lie in memory one by one; a file may claim a huge tensor over a single stored number."""
    if not value.is_floating_point() or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _check_names(path: Path, state: Mapping[str, Tensor]) -> None:
    meta_net = {f"meta_net.{name}" for name in META_NET}
    needed = {"ctx"} | (meta_net if any(name.startswith("meta_net.") for name in state) else set())
    missing, unknown = sorted(needed - set(state)), sorted(set(state) - {"ctx", *_TOKENS, *meta_net})
    if missing or unknown:
        told = [f"it lacks {', '.join(missing)}"] if missing else []
        told += [f"it has {', '.join(unknown[:8])}"] if unknown else []
        raise CheckpointError(
            f"{path} is no checkpoint of CoOp or CoCoOp: {' and '.join(told)}. Expected ctx, token_prefix, token_suffix and, for "
            f"CoCoOp, {', '.join(sorted(meta_net))}"
        )


def _check(where: str, state: Mapping[str, Tensor], *, width: int | None = None, image_width: int | None = None) -> None:
    """Raise where shapes don't fit each other or the model, or what was learned is not finite."""
    context = state["ctx"]
    if context.ndim not in (2, 3) or 0 in context.shape:
        raise CheckpointError(f"{where}: ctx has shape {list(context.shape)}; expected [M, W], or [C, M, W] class-specific")
    sizes = {"1": 1, **dict(zip("WMC", reversed(context.shape), strict=False))}
    if width is not None and sizes["W"] != width:
        raise CheckpointError(
            f"{where} is for text towers of width {sizes['W']}; this model's is {width}. Take the model it was trained with"
        )
    for name, letters in _SHAPES.items():
        if name not in state:
            continue
        shape = state[name].shape
        if len(shape) != len(letters) or any(sizes.setdefault(k, n) != n for k, n in zip(letters, shape, strict=True)):
            wanted = ", ".join(str(sizes.get(k, k)) for k in letters)
            raise CheckpointError(f"{where}: {name} has shape {list(shape)}; beside the others, expected [{wanted}]")
    if image_width is not None and sizes.get("V", image_width) != image_width:
        raise CheckpointError(f"{where} is for image embeddings of width {sizes['V']}; this model's are {image_width} wide")
    if broken := [name for name, value in state.items() if name not in _TOKENS and not value.isfinite().all()]:
        raise CheckpointError(f"{where}: {', '.join(broken)} holds values that are not finite; the training went wrong")


def write_prompts(
    folder: str | Path,
    prompts: LearnedPrompts,
    *,
    token_prefix: Tensor,
    token_suffix: Tensor,
    epoch: int | None = None,
    val_result: float | None = None,
) -> Path:
    """Write learned prompts where the published programs look for them: `<folder>/prompt_learner/model.pth.tar-<epoch>`.

    They can be tested with those programs (`--eval-only --load-epoch`), and not trained on: there is no optimizer's state.

    Args:
        folder: the run's folder, their `--model-dir`.
        prompts: what was learned.
        token_prefix: [C, 1, W], the embedding of the start token, for each class.
        token_suffix: [C, L - 1 - M, W], embeddings of all tokens after the context: class name, full stop, end, padding.
        epoch: how many epochs were trained; None: the one that `prompts` says.
        val_result: the accuracy on the validation pictures, in percent, if it was measured.

    Returns:
        The file.

    Raises:
        CheckpointError: shapes that don't fit each other, or values that are not finite.
        ValueError: no epoch.
    """
    done = prompts.epoch if epoch is None else epoch
    if done is None or done < 0:
        raise ValueError(f"the file is named by the number of epochs trained; got {done}, give epoch=")
    tokens = {"token_prefix": token_prefix, "token_suffix": token_suffix}
    path = Path(folder) / FOLDER / f"model.pth.tar-{done}"
    learned = {"ctx": prompts.context} | {f"meta_net.{name}": value for name, value in (prompts.meta_net or {}).items()}
    state = OrderedDict((name, value.detach().float().cpu().clone()) for name, value in (learned | tokens).items())
    _check_names(path, state)
    _check(str(path), state)
    content = {"state_dict": state, "epoch": done, "optimizer": None, "scheduler": None, "val_result": val_result}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    torch.save(content, temporary)
    os.replace(temporary, path)
    (path.parent / "checkpoint").write_text(f"{path.name}\n", encoding="utf-8")  # as Dassl names the newest
    return path
