"""Where published weights lie on this machine: our own folders, and the caches that other programs fill. Nothing is fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

FOLDER_VARIABLE = "WORDSIGHT_CHECKPOINTS"
SUFFIXES = ("", ".safetensors", ".pt", ".bin")  # "": a folder

# catalogue name -> (OpenAI's file, repositories of the Hugging Face hub that hold the same weights)
PUBLISHED: dict[str, tuple[str, tuple[str, ...]]] = {
    "RN50": ("RN50.pt", ("timm/resnet50_clip.openai",)),
    "RN101": ("RN101.pt", ("timm/resnet101_clip.openai",)),
    "RN50x4": ("RN50x4.pt", ("timm/resnet50x4_clip.openai",)),
    "RN50x16": ("RN50x16.pt", ("timm/resnet50x16_clip.openai",)),
    "RN50x64": ("RN50x64.pt", ("timm/resnet50x64_clip.openai",)),
    "ViT-B/32": ("ViT-B-32.pt", ("openai/clip-vit-base-patch32", "timm/vit_base_patch32_clip_224.openai")),
    "ViT-B/16": ("ViT-B-16.pt", ("openai/clip-vit-base-patch16", "timm/vit_base_patch16_clip_224.openai")),
    "ViT-L/14": ("ViT-L-14.pt", ("openai/clip-vit-large-patch14", "timm/vit_large_patch14_clip_224.openai")),
    "ViT-L/14@336": ("ViT-L-14-336px.pt", ("openai/clip-vit-large-patch14-336", "timm/vit_large_patch14_clip_336.openai")),
}
# likewise those that the hub alone has
ON_THE_HUB: dict[str, tuple[str, ...]] = {
    "ViT-B/16-SigLIP": ("google/siglip-base-patch16-224", "timm/ViT-B-16-SigLIP"),
    "ViT-B/16-SigLIP-256": ("google/siglip-base-patch16-256", "timm/ViT-B-16-SigLIP-256"),
    "ViT-B/16-SigLIP-384": ("google/siglip-base-patch16-384", "timm/ViT-B-16-SigLIP-384"),
    "ViT-B/16-SigLIP-512": ("google/siglip-base-patch16-512", "timm/ViT-B-16-SigLIP-512"),
    "ViT-L/16-SigLIP-256": ("google/siglip-large-patch16-256", "timm/ViT-L-16-SigLIP-256"),
    "ViT-L/16-SigLIP-384": ("google/siglip-large-patch16-384", "timm/ViT-L-16-SigLIP-384"),
    "SO400M/14-SigLIP": ("google/siglip-so400m-patch14-224", "timm/ViT-SO400M-14-SigLIP"),
    "SO400M/14-SigLIP-384": ("google/siglip-so400m-patch14-384", "timm/ViT-SO400M-14-SigLIP-384"),
}


def file_stem(name: str) -> str:
    """A catalogue name as a file name: ViT-L/14@336 -> ViT-L-14-336."""
    return name.replace("/", "-").replace("@", "-")


def own_folders() -> list[Path]:
    """$WORDSIGHT_CHECKPOINTS, where it is set, and ~/.cache/wordsight."""
    named = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(named).expanduser()] if named else []), _cache() / "wordsight"]


def places(name: str) -> Iterator[Path]:
    """Every file or folder that may hold the weights of a catalogue name, best first; they need not exist."""
    openai_file, repositories = PUBLISHED.get(name, ("", ON_THE_HUB.get(name, ())))
    for folder in own_folders():
        yield from (folder / f"{file_stem(name)}{suffix}" for suffix in SUFFIXES)
        if openai_file:
            yield folder / openai_file
    if openai_file:
        yield Path("~/.cache/clip").expanduser() / openai_file  # where OpenAI's program keeps it
    for repository in repositories:
        snapshots = _hub() / f"models--{repository.replace('/', '--')}" / "snapshots"
        newest = sorted(snapshots.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True) if snapshots.is_dir() else []
        yield from newest or [snapshots]


def find(name: str) -> Path:
    """The local file or folder with the weights of a catalogue name.

    Raises:
        FileNotFoundError: none of the places has it; says where it looked and how to get it.
    """
    looked = list(dict.fromkeys(places(name)))
    for place in looked:
        if place.is_file() or (place.is_dir() and place.name != "snapshots" and any(place.iterdir())):
            return place
    openai_file, repositories = PUBLISHED.get(name, ("", ON_THE_HUB.get(name, ())))
    where = "\n  ".join(str(p) for p in looked)
    stem = file_stem(name)
    how = (
        f"put a checkpoint of it at {own_folders()[0] / stem} (a folder) or {own_folders()[0] / stem}.safetensors (or .pt, .bin)"
    )
    if repositories:
        how += f", or run `hf download {repositories[0]}`"
    if openai_file:
        how += f", or put OpenAI's {openai_file} there"
    raise FileNotFoundError(
        f"no weights of {name} on this machine, and load never downloads. Looked at\n  {where}\nTo get them, {how}.\n"
        f"For a fresh model with random weights there is wordsight.create({name!r})"
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _hub() -> Path:
    """The Hugging Face hub's cache, as its own variables place it."""
    if hub := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(hub).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else _cache() / "huggingface") / "hub"
