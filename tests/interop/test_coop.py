"""CoOp's and CoCoOp's files: read as they are written, written so that their own modules (restated here) load them strictly."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wordsight.interop.coop import LearnedPrompts, read_prompts, write_prompts
from wordsight.interop.safe_read import CheckpointError

C, M, W, L, V = 5, 4, 32, 16, 48


class PromptLearner(nn.Module):
    """The published module's state: learned vectors, and the other tokens' embeddings as buffers. CoCoOp adds the network."""

    def __init__(
        self, embedding: Tensor, num_context: int = M, *, class_specific: bool = False, image_width: int | None = None
    ) -> None:
        super().__init__()
        num_classes, _, width = embedding.shape
        self.ctx = nn.Parameter(
            torch.empty(*((num_classes,) if class_specific else ()), num_context, width, dtype=embedding.dtype)
        )
        nn.init.normal_(self.ctx, std=0.02)
        if image_width is not None:
            layers = [
                ("linear1", nn.Linear(image_width, image_width // 16)),
                ("relu", nn.ReLU(inplace=True)),
                ("linear2", nn.Linear(image_width // 16, width)),
            ]
            self.meta_net = nn.Sequential(OrderedDict(layers))
        self.register_buffer("token_prefix", embedding[:, :1, :])
        self.register_buffer("token_suffix", embedding[:, 1 + num_context :, :])

    def forward(self, image_features: Tensor | None = None) -> Tensor:
        """Prompts [C, L, W], or [B, C, L, W] by image."""
        num_classes = len(self.token_prefix)
        if image_features is None:
            ctx = self.ctx if self.ctx.dim() == 3 else self.ctx.unsqueeze(0).expand(num_classes, -1, -1)
            return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)
        shifted = self.ctx.unsqueeze(0) + self.meta_net(image_features).unsqueeze(1)
        parts = [torch.cat([self.token_prefix, one.expand(num_classes, -1, -1), self.token_suffix], 1) for one in shifted]
        return torch.stack(parts)


class ConstantWarmup(torch.optim.lr_scheduler.LRScheduler):
    """Dassl's: its state has the scheduler that follows in it, and that has the optimizer."""

    def __init__(self, optimizer: Any, successor: Any) -> None:
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [1e-5 for _ in self.base_lrs]


def embedding(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(C, L, W, generator=torch.Generator().manual_seed(0)).to(dtype)


def save_published(path: Path, learner: PromptLearner, *, legacy: bool = False, followed_by: str = "CosineAnnealingLR") -> Path:
    """As Dassl's trainer saves after a step: with the whole state of optimizer and scheduler."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)
    arguments = {"CosineAnnealingLR": (50.0,), "StepLR": (3,), "MultiStepLR": ([3, 5],)}[followed_by]
    scheduler = ConstantWarmup(optimizer, getattr(torch.optim.lr_scheduler, followed_by)(optimizer, *arguments))
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    content = {
        "state_dict": learner.state_dict(),
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("followed_by", ["CosineAnnealingLR", "StepLR", "MultiStepLR"])
@pytest.mark.parametrize("kind", ["unified", "class-specific", "cocoop"])
def test_published_files(tmp_path: Path, kind: str, followed_by: str, legacy: bool) -> None:
    learner = PromptLearner(embedding(), class_specific=kind == "class-specific", image_width=V if kind == "cocoop" else None)
    path = save_published(tmp_path / "prompt_learner" / "model.pth.tar-50", learner, legacy=legacy, followed_by=followed_by)
    read = read_prompts(path, width=W, image_width=V, num_classes=C)
    assert torch.equal(read.context, learner.ctx)
    assert not read.context.requires_grad
    assert (read.epoch, read.num_classes, read.notes) == (50, C, ())
    if kind == "cocoop":
        assert read.meta_net is not None
        assert read.meta_net.keys() == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
        assert all(torch.equal(value, learner.meta_net.state_dict()[name]) for name, value in read.meta_net.items())
    else:
        assert read.meta_net is None


def test_a_published_file_is_more_than_tensors(tmp_path: Path) -> None:
    """Why stand-ins are needed: by PyTorch's own restricted reader the file is refused."""
    path = save_published(tmp_path / "model.pth.tar-50", PromptLearner(embedding()))
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    assert read_prompts(path).epoch == 50


@pytest.mark.parametrize("kind", ["unified", "class-specific", "cocoop"])
def test_out_and_into_the_published_module(tmp_path: Path, kind: str) -> None:
    theirs = PromptLearner(embedding(), class_specific=kind == "class-specific", image_width=V if kind == "cocoop" else None)
    meta_net = {n: v.detach() for n, v in theirs.meta_net.state_dict().items()} if kind == "cocoop" else None
    ours = LearnedPrompts(context=theirs.ctx.detach(), meta_net=meta_net, epoch=10)
    path = write_prompts(tmp_path, ours, token_prefix=theirs.token_prefix, token_suffix=theirs.token_suffix, val_result=71.5)
    assert path == tmp_path / "prompt_learner" / "model.pth.tar-10"
    assert (path.parent / "checkpoint").read_text() == "model.pth.tar-10\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint", "model.pth.tar-10"]
    content = torch.load(path, weights_only=True)
    assert list(content) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    assert (content["epoch"], content["val_result"]) == (10, 71.5)
    fresh = PromptLearner(
        torch.zeros(C, L, W), class_specific=kind == "class-specific", image_width=V if kind == "cocoop" else None
    )
    fresh.load_state_dict(content["state_dict"], strict=True)
    features = torch.randn(3, V) if kind == "cocoop" else None
    assert torch.equal(fresh(features), theirs(features))
    # as their load_model does for other classes: without the tokens, not strictly
    kept = {name: value for name, value in content["state_dict"].items() if not name.startswith("token_")}
    assert (
        PromptLearner(torch.ones(C, L, W), class_specific=kind == "class-specific", image_width=V)
        .load_state_dict(kept, strict=False)
        .unexpected_keys
        == []
    )
    again = read_prompts(tmp_path)
    assert torch.equal(again.context, ours.context)
    assert (again.epoch, again.num_classes) == (10, C)
    if meta_net is not None:
        assert again.meta_net is not None
        assert all(torch.equal(again.meta_net[name], value) for name, value in meta_net.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    learner = PromptLearner(embedding(dtype))
    torch.save({"state_dict": learner.state_dict(), "epoch": 3}, tmp_path / "model.pth.tar-3")
    read = read_prompts(tmp_path / "model.pth.tar-3")
    assert read.context.dtype == torch.float32
    assert torch.equal(read.context, learner.ctx.detach().float())
    assert str(dtype).removeprefix("torch.") in read.notes[0]
    path = write_prompts(
        tmp_path / "out", replace(read, epoch=4), token_prefix=learner.token_prefix, token_suffix=learner.token_suffix
    )
    assert {value.dtype for value in torch.load(path)["state_dict"].values()} == {torch.float32}


def test_a_run_s_folder(tmp_path: Path) -> None:
    tokens = {"token_prefix": embedding()[:, :1], "token_suffix": embedding()[:, 1 + M :]}
    for epoch in (5, 10, 50, 9):
        write_prompts(tmp_path, LearnedPrompts(context=torch.full((M, W), float(epoch))), epoch=epoch, **tokens)
    assert read_prompts(tmp_path).epoch == 50  # by number, not by name
    assert read_prompts(tmp_path / "prompt_learner").epoch == 50
    assert read_prompts(tmp_path, epoch=9).context[0, 0] == 9
    with pytest.raises(FileNotFoundError, match=r"no epoch 7 in .*; there are 5, 9, 10, 50"):
        read_prompts(tmp_path, epoch=7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no prompt_learner/model.pth.tar-<epoch>"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_prompts(tmp_path / "none")


def test_other_classes(tmp_path: Path) -> None:
    unified = save_published(tmp_path / "a", PromptLearner(embedding()))
    assert read_prompts(unified, num_classes=C).notes == ()
    assert "trained on 5 classes and is to be used for 9; the context is unified" in read_prompts(unified, num_classes=9).notes[0]
    own = save_published(tmp_path / "b", PromptLearner(embedding(), class_specific=True))
    with pytest.raises(CheckpointError, match=r"trained on 5 classes and is to be used for 9, but its context is class-specific"):
        read_prompts(own, num_classes=9)


def test_other_models(tmp_path: Path) -> None:
    path = save_published(tmp_path / "a", PromptLearner(embedding(), image_width=V))
    with pytest.raises(CheckpointError, match="text towers of width 32; this model's is 512"):
        read_prompts(path, width=512)
    with pytest.raises(CheckpointError, match="image embeddings of width 48; this model's are 64 wide"):
        read_prompts(path, image_width=64)


def state(**changes: Tensor | None) -> dict[str, Tensor]:
    whole = PromptLearner(embedding(), image_width=V).state_dict() | {name.replace("__", "."): v for name, v in changes.items()}
    return {name: value for name, value in whole.items() if value is not None}


BROKEN = torch.zeros(M, W)
BROKEN[1, 2] = torch.nan


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "expected a dictionary with tensors by name under 'state_dict'"),
        ({"epoch": 3}, "under 'state_dict'"),
        ({"state_dict": {"ctx": 3}}, "under 'state_dict'"),
        ({"state_dict": {}}, "it lacks ctx. Expected ctx, token_prefix"),
        ({"state_dict": state(ctx=None)}, "it lacks ctx. Expected"),
        ({"state_dict": state(meta_net__linear2__bias=None)}, "it lacks meta_net.linear2.bias"),
        ({"state_dict": state(compound_prompts_text=torch.zeros(2))}, "it has compound_prompts_text. Expected"),
        ({"state_dict": state(ctx=torch.zeros(W))}, r"ctx has shape \[32\]"),
        ({"state_dict": state(ctx=torch.zeros(0, W))}, r"ctx has shape \[0, 32\]"),
        ({"state_dict": state(ctx=torch.zeros(M, W, dtype=torch.int64))}, "ctx is no plain tensor"),
        ({"state_dict": state(ctx=torch.zeros(M, W).to_sparse())}, "ctx is no plain tensor"),
        ({"state_dict": state(ctx=torch.zeros(1).expand(1 << 40, 1))}, "ctx is no plain tensor"),
        ({"state_dict": state(ctx=BROKEN)}, "ctx holds values that are not finite"),
        ({"state_dict": state(meta_net__linear1__bias=torch.full((3,), torch.inf))}, "meta_net.linear1.bias holds values that"),
        ({"state_dict": state(ctx=torch.zeros(M, W + 1))}, r"meta_net.linear2.weight has shape \[32, 3\].*expected \[33, 3\]"),
        ({"state_dict": state(meta_net__linear1__weight=torch.zeros(3))}, r"linear1.weight has shape \[3\]"),
        ({"state_dict": state(meta_net__linear1__bias=torch.zeros(4))}, r"linear1.bias has shape \[4\].*expected \[3\]"),
        (
            {"state_dict": state(meta_net__linear2__weight=torch.zeros(W, 4))},
            r"linear2.weight has shape \[32, 4\].*expected \[32, 3\]",
        ),
        ({"state_dict": state(token_prefix=torch.zeros(C, W))}, r"token_prefix has shape \[5, 32\]"),
        ({"state_dict": state(token_prefix=torch.tensor(1.0))}, r"token_prefix has shape \[\]"),
        (
            {"state_dict": state(token_suffix=torch.zeros(C + 1, 3, W))},
            r"token_suffix has shape \[6, 3, 32\].*expected \[5, S, 32\]",
        ),
        ({"state_dict": state(ctx=torch.zeros(C + 1, M, W))}, r"token_prefix has shape \[5, 1, 32\].*expected \[6, 1, 32\]"),
    ],
)
def test_files_that_can_t_be_used(tmp_path: Path, content: object, problem: str) -> None:
    torch.save(content, tmp_path / "model.pth.tar-1")
    with pytest.raises(CheckpointError, match=problem):
        read_prompts(tmp_path / "model.pth.tar-1", width=None)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"echo pwned > {self.mark}",)


@pytest.mark.parametrize("place", ["state_dict", "optimizer", "scheduler", "val_result"])
@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_files_are_never_run(tmp_path: Path, place: str, legacy: bool) -> None:
    content = {"state_dict": state(), "epoch": 1, "optimizer": None, "scheduler": None, "val_result": None}
    content[place] = {"x": Evil(tmp_path / "mark")}
    torch.save(content, tmp_path / "model.pth.tar-1", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"refused to read .*it asks for posix.system"):
        read_prompts(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_damaged_files(tmp_path: Path) -> None:
    path = save_published(tmp_path / "model.pth.tar-1", PromptLearner(embedding()))
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            read_prompts(path)


def test_what_can_t_be_written(tmp_path: Path) -> None:
    prompts = LearnedPrompts(context=torch.zeros(M, W), epoch=1)
    prefix, suffix = embedding()[:, :1], embedding()[:, 1 + M :]
    for changed, tokens, problem in (
        (prompts, (prefix[..., 1:], suffix), "token_prefix has shape"),
        (prompts, (prefix, suffix[1:]), "token_suffix has shape"),
        (replace(prompts, context=BROKEN), (prefix, suffix), "not finite"),
        (replace(prompts, context=torch.zeros(C - 1, M, W)), (prefix, suffix), "token_prefix has shape"),
        (replace(prompts, epoch=None), (prefix, suffix), "give epoch="),
        (replace(prompts, meta_net={"linear1.weight": torch.zeros(3, V)}), (prefix, suffix), "it lacks meta_net.linear1.bias"),
    ):
        with pytest.raises(ValueError, match=problem):
            write_prompts(tmp_path / "out", changed, token_prefix=tokens[0], token_suffix=tokens[1])
    assert not (tmp_path / "out").exists()
