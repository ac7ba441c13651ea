"""Files of weights are read without running code: every container, every way of being broken, every way of being hostile."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wordsight.interop.safe_read import CheckpointError, read_weights


class Evil:
    """On an unguarded unpickling this writes a file: the tests look whether it is there."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"echo pwned > {self.mark}",)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.act = torch.nn.GELU()
        self.sizes = [1, 2, 3]
        self.scale = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.fc(x))) * self.scale + self.sizes[0]


def script(path: Path, *, half: bool = False) -> dict[str, torch.Tensor]:
    model = Small().eval()
    model.register_buffer("view", torch.arange(12.0).reshape(3, 4).t()[1:])  # strided, with an offset
    if half:
        model.fc.half()
    torch.jit.script(model).save(str(path))
    return model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rewrite(src: Path, dst: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Copy a zip archive with some of its members (named by the end of their path) replaced."""
    with zipfile.ZipFile(src) as old, zipfile.ZipFile(dst, "w") as new:
        for record in old.infolist():
            found = [data for end, data in change.items() if record.filename.endswith(end)]
            new.writestr(record.filename, found[0] if found else old.read(record), compress_type=compression if found else None)


@pytest.mark.parametrize("half", [False, True])
def test_torchscript_tensors_equal_the_runtime_s(tmp_path: Path, half: bool) -> None:
    state = script(tmp_path / "m.pt", half=half)
    read = read_weights(tmp_path / "m.pt")
    assert read.layout == "torchscript"
    assert equal(read.tensors, state)
    assert any(name.endswith(".GELU") for name in read.class_names)


def test_torchscript_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "m.pt")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the TorchScript runtime was called")

    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch._C, "import_ir_module", never)
    assert read_weights(tmp_path / "m.pt").tensors


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_pytorch_files(tmp_path: Path, legacy: bool, prefix: str) -> None:
    state = Small().state_dict()
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    assert equal(read_weights(tmp_path / "m.bin").tensors, state)


def test_training_checkpoint_with_arguments_and_numpy_scalars(tmp_path: Path) -> None:
    state = Small().state_dict()
    whole = {
        "epoch": 3,
        "name": "run",
        "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items()),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.98)),
        "best": np.float32(0.5),
    }
    torch.save(whole, tmp_path / "epoch_3.pt")
    assert equal(read_weights(tmp_path / "epoch_3.pt").tensors, state)
    averaged = {k: v + 1 for k, v in state.items()}
    torch.save({"epoch": 3, "state_dict_ema": averaged}, tmp_path / "ema.pt")
    assert equal(read_weights(tmp_path / "ema.pt").tensors, averaged)
    torch.save({**whole, "state_dict_ema": averaged}, tmp_path / "both.pt")
    both = read_weights(tmp_path / "both.pt")
    assert equal(both.tensors, state)
    assert "state_dict_ema" in both.notes[0]


def test_kind_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    state = Small().state_dict()
    save_file(state, tmp_path / "m.bin")
    assert read_weights(tmp_path / "m.bin").layout == "safetensors"
    torch.save(state, tmp_path / "m.safetensors")
    assert equal(read_weights(tmp_path / "m.safetensors").tensors, state)


# ------------------------------------------------------------------------------------------------------------ hostile files


def hostile(kind: str, path: Path, mark: Path) -> None:
    if kind == "torch zip":
        torch.save({"a": torch.ones(2), "b": Evil(mark)}, path)
    elif kind == "torch legacy":
        torch.save({"a": torch.ones(2), "b": Evil(mark)}, path, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(mark), protocol=4))
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps({"a": Evil(mark)}, protocol=2))
    elif kind == "whole module":
        torch.save(Small(), path)
    elif kind == "builtins":
        torch.save({"a": torch.ones(2), "b": eval}, path)
    else:
        script(path.with_suffix(".good"))
        payload = {
            "torchscript": pickle.dumps(Evil(mark), protocol=2),
            "torchscript state": pickled(b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R"),
            "torchscript getattr": b"\x80\x02cbuiltins\ngetattr\nctorch\nFloatStorage\nX\x08\x00\x00\x00__init__\x86R.",
            "torchscript dotted": b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.",
        }[kind]
        rewrite(path.with_suffix(".good"), path, {"/data.pkl": payload})


KINDS = ["torch zip", "torch legacy", "bare pickle", "old pickle", "whole module", "builtins"]
SCRIPT_KINDS = ["torchscript", "torchscript state", "torchscript getattr", "torchscript dotted"]


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("kind", KINDS + SCRIPT_KINDS)
def test_hostile_pickles_are_refused_with_one_clear_error(tmp_path: Path, kind: str, suffix: str) -> None:
    path, mark = tmp_path / f"weights{suffix}", tmp_path / "pwned"
    hostile(kind, path, mark)
    with pytest.raises(CheckpointError, match=r"refused to read .*weights.*tensors only; nothing of it was run") as caught:
        read_weights(path)
    assert not mark.exists()
    if kind in ("torch zip", "torch legacy", "old pickle", "torchscript", "torchscript state"):
        assert "posix.system" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_setting_attributes_from_a_pickle_changes_nothing_of_ours(tmp_path: Path) -> None:
    script(tmp_path / "good.pt")
    from wordsight.interop import safe_read

    before = dict(vars(safe_read._Inert))
    # BUILD with a slot state on the class, on the tensor builder and on OrderedDict: setattr(target, "x", 1)
    for target in (b"c__torch__.A\nB\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        rewrite(
            tmp_path / "good.pt", tmp_path / "bad.pt", {"/data.pkl": b"\x80\x02" + target + b"N}X\x01\x00\x00\x00xK\x01s\x86b."}
        )
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / "bad.pt")
    assert dict(vars(safe_read._Inert)) == before


def pickled(build: bytes) -> bytes:
    """A data.pkl: one inert module with one attribute `a`, made by `build`."""
    return b"\x80\x02c__torch__.A\nB\n)\x81}X\x01\x00\x00\x00a" + build + b"sb."


def tensor_bytes(numel: int, offset: int, shape: int, stride: int, key: bytes = b"0") -> bytes:
    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key + b"X\x03\x00\x00\x00cpu"
    storage += number(numel) + b"tQ"
    size = number(shape) + b"\x85" + number(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + size + b"\x89ccollections\nOrderedDict\n)RtR"


@pytest.mark.parametrize(
    "bad",
    [
        tensor_bytes(2**30, 0, 2, 1),  # a storage that says it is larger than its record
        tensor_bytes(1, 0, 1000, 1),  # sizes beyond the storage
        tensor_bytes(1, 0, 1000, 2**30),
        tensor_bytes(1, 2**30, 1, 1),
        tensor_bytes(1, -4, 1, 1),
        tensor_bytes(1, 0, -1, 1),
        tensor_bytes(1, 0, 2, -1),
        tensor_bytes(1, 0, 1, 1, key=b"../../etc/passwd"),
        tensor_bytes(1, 0, 1, 1, key=b"999"),
    ],
)
def test_tensors_that_reach_out_of_their_storage_are_errors(tmp_path: Path, bad: bytes) -> None:
    script(tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "ok.pt", {"/data.pkl": pickled(tensor_bytes(1, 0, 1, 1))})
    assert read_weights(tmp_path / "ok.pt").tensors["a"].shape == (1,)
    rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", {"/data.pkl": pickled(bad)})
    with pytest.raises(CheckpointError, match="damaged TorchScript archive"):
        read_weights(tmp_path / "bad.pt")


def test_modules_that_refer_to_themselves_or_nest_without_end_finish(tmp_path: Path) -> None:
    script(tmp_path / "good.pt")
    itself = b"\x80\x02c__torch__.A\nB\n)\x81q\x01}X\x01\x00\x00\x00ah\x01sb."
    rewrite(tmp_path / "good.pt", tmp_path / "loop.pt", {"/data.pkl": itself})
    with pytest.raises(CheckpointError, match="no tensors"):
        read_weights(tmp_path / "loop.pt")
    # every level twice the one below: 2^40 paths to the leaf
    twice = b"\x80\x02c__torch__.A\nB\nq\x00)\x81}X\x01\x00\x00\x00t" + tensor_bytes(1, 0, 1, 1) + b"sbq\x01"
    for _ in range(40):
        twice += b"0h\x00)\x81}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01ubq\x01"
    rewrite(tmp_path / "good.pt", tmp_path / "twice.pt", {"/data.pkl": twice + b"."})
    assert len(read_weights(tmp_path / "twice.pt").tensors) == 1


def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    script(tmp_path / "good.pt")
    zeros = b"\0" * (70 << 20)
    rewrite(tmp_path / "good.pt", tmp_path / "code.pt", {"/constants.pkl": zeros}, zipfile.ZIP_DEFLATED)
    rewrite(tmp_path / "good.pt", tmp_path / "data.pt", {"/data/0": b"\0" * 4096}, zipfile.ZIP_DEFLATED)
    torch.save(Small().state_dict(), tmp_path / "torch.pt")
    rewrite(tmp_path / "torch.pt", tmp_path / "state.pt", {"/data/0": b"\0" * 4096}, zipfile.ZIP_DEFLATED)
    for name in ("code.pt", "data.pt", "state.pt"):
        with pytest.raises(CheckpointError, match=r"refused to read .* unpack"):
            read_weights(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "torchscript"])
def test_truncation_anywhere_is_a_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.bin"
    if kind == "safetensors":
        save_file(Small().state_dict(), path)
    elif kind == "torchscript":
        script(path)
    else:
        torch.save(Small().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in [1, 7, 8, 9, 100, *range(150, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"weights\.bin"):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "no file of weights"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged"),
        (b"PK\x05\x06" + b"\0" * 18, "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{not json at all", "damaged"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{"epoch": 1}, [torch.ones(1)], {}, torch.ones(2), {"a": torch.ones(1), "b": 3}])
def test_files_without_a_state_dict_are_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        read_weights(tmp_path / "x.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(OSError):
        read_weights(tmp_path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    script(tmp_path / "script.pt")
    torch.save(Small().state_dict(), tmp_path / "zip.pt")
    torch.save(Small().state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    rng = np.random.default_rng(0)
    for name in ("script.pt", "zip.pt", "legacy.pt"):
        whole = (tmp_path / name).read_bytes()
        refused = 0
        for _ in range(60):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                damaged[at] = rng.integers(256)
            path = tmp_path / "damaged.pt"
            path.write_bytes(damaged)
            try:
                read_weights(path)
            except CheckpointError:  # any other exception fails the test
                refused += 1
        assert refused > 0


def test_pickled_bytes_never_reach_the_plain_unpickler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pickle.load(s)` with free globals is called by no reader."""
    torch.save(Small().state_dict(), tmp_path / "a.pt")
    torch.save(Small().state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("pickle was called")

    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    for name in ("a.pt", "b.pt"):
        assert read_weights(tmp_path / name).tensors
