"""The data pipeline beside open_clip's (webdataset, PIL, torchvision), on the same shards: images a second on one core at 224 px.

Both read tar shards of JPEGs with captions, shuffle, decode, crop as for training, tokenise, collate and normalise, in this
process on one thread, a whole pass at a time, in turns; the time is the processor's. Once for pictures of 300 to 640 px, once for
those of 500 to 1,500 px, where JPEGs that are far too large are decoded at a half (in evaluation only where it is asked for).
`python -m benchmarks.data_pipeline --json OUT` writes the rows.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import import_open_clip

NUM_IMAGES = 256
NUM_SHARDS = 4
BATCH_SIZE = 64
REPEATS = 5
SIZES = ((500, 375), (375, 500), (480, 480), (400, 300), (640, 427))
WEB_SIZES = ((500, 375), (640, 427), (800, 600), (1024, 683), (683, 1024), (900, 900), (1280, 853), (1500, 1000))
NUM_WEB_IMAGES = 128
MUST = 1.0
MUST_WEB = 2.0


def make_picture(rng: np.random.Generator, size: tuple[int, int], things: list[Image.Image]) -> Image.Image:
    """A picture with the spectrum of photos (amplitude falls with frequency), a few things with edges in it."""
    total_HW3 = np.full((size[1], size[0], 3), 128.0, np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192, 384, 768):
        if cells > max(192, max(size) / 2):
            break
        noise = rng.normal(scale=150 / cells**0.6, size=(cells, cells, 3)).astype(np.float32)
        channels = [Image.fromarray(noise[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
        total_HW3 += np.stack([np.asarray(channel) for channel in channels], axis=-1)
    picture = Image.fromarray(np.clip(total_HW3, 0, 255).astype(np.uint8))
    for _ in range(3):
        thing = things[rng.integers(len(things))].resize((160, 160), Image.Resampling.BICUBIC)
        picture.paste(thing, (int(rng.integers(size[0] - 160)), int(rng.integers(size[1] - 160))))
    return picture


def make_shards(folder: Path, sizes: tuple[tuple[int, int], ...], number: int) -> list[str]:
    """Tar shards of JPEGs with captions, as img2dataset writes them."""
    from wordsight.data import open_source
    from wordsight.data.decode import decode

    source = open_source("sample:train")
    rng = np.random.default_rng(0)
    samples = [source[int(i)] for i in rng.integers(len(source), size=64)]
    things = [decode(sample.image) for sample in samples]
    paths = [folder / f"{i:05d}.tar" for i in range(NUM_SHARDS)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(shard, number, NUM_SHARDS):
                file = io.BytesIO()
                make_picture(rng, sizes[i % len(sizes)], things).save(file, "JPEG", quality=90)
                texts = [sample.captions[0] for sample in samples]
                caption = f"a photo of a {texts[i % 64]} and a {texts[(i + 7) % 64]} in front of a wall"
                meta = {"caption": caption, "key": f"{i:09d}", "status": "success"}
                for suffix, data in (("jpg", file.getvalue()), ("txt", caption.encode()), ("json", json.dumps(meta).encode())):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return [str(path) for path in paths]


def peer_pass(shards: list[str], *, is_train: bool, number: int) -> Callable[[], int]:
    """open_clip's own training data path with its transforms and tokenizer; each call is one pass over the shards."""
    import_open_clip()  # makes torchvision's import work too
    import open_clip
    import open_clip_train.data as open_clip_data
    import webdataset

    # webdataset 1.0 marks the end of each shard with an empty record, on which open_clip 3.3's grouping stops
    open_clip_data.tar_file_expander = partial(webdataset.tariterators.tar_file_expander, eof_value=None)
    braces = str(Path(shards[0]).parent / f"{{00000..{len(shards) - 1:05d}}}.tar")
    args = SimpleNamespace(
        train_data=braces,
        val_data=braces,
        train_num_samples=number,
        val_num_samples=number,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH_SIZE,
        workers=0,
        world_size=1,
    )
    transform = open_clip.image_transform(
        224, is_train=is_train, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    data = open_clip_data.get_wds_dataset(args, transform, is_train=is_train, tokenizer=open_clip.get_tokenizer("ViT-B-32"))

    def one_pass() -> int:
        return sum(images.shape[0] for images, texts in data.dataloader)

    return one_pass


def our_pass(shards: list[str], *, is_train: bool, reduced: bool = False) -> Callable[[], int]:
    """Wordsight's loader (training) or reader (evaluation; `reduced`: at a reduced scale), same texts, same normalisation."""
    from wordsight.data import Loader, iterate, open_source
    from wordsight.data.tokenize import ClipTokenizer
    from wordsight.data.transform import Preprocess, TrainTransform

    tokenizer, preprocess = ClipTokenizer.clip(), Preprocess(224)
    if not is_train:
        source = open_source(shards)

        def read() -> int:
            seen = 0
            for part in iterate(source, preprocess, batch_size=BATCH_SIZE, reduced_decode=reduced):
                tokenizer([sample.captions[0] for sample in part.samples])
                seen += len(part.pixels)
            return seen

        return read
    loader = Loader([shards], batch_size=BATCH_SIZE, transform=TrainTransform(224), tokenizer=tokenizer)

    def one_pass() -> int:
        seen = 0
        for batch, _ in zip(loader.batches(), range(loader.steps_per_epoch), strict=False):
            seen += preprocess.normalize(batch.pixels).shape[0]
        return seen

    return one_pass


def compare(
    name: str, ours: Callable[[], int], peer: Callable[[], int], must: float | None, note: str, *, number: int
) -> dict[str, Any]:
    """Passes in turns; the median of each side, and of the ratios of neighbours."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(REPEATS + 1):
        for side, one_pass in (("ours", ours), ("peer", peer)):
            start = time.process_time()  # of this process alone, so that what else the machine does is no part of it
            seen = one_pass()
            rate = seen / (time.process_time() - start)
            assert seen == number, f"{side} gave {seen} of {number} images"
            if repeat:  # the first pass warms up
                rates[side].append(rate)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True))
    return {
        "name": name,
        "ours": statistics.median(rates["ours"]),
        "peer": statistics.median(rates["peer"]),
        "ratio": ratio,
        "unit": "images/s a core",
        "must": must,
        "note": note,
    }


def run() -> list[dict[str, Any]]:
    """Reading for training and for evaluation, of middling and of web sizes."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as web_folder:
        shards = make_shards(Path(folder), SIZES, NUM_IMAGES)
        what = f"{NUM_IMAGES} JPEGs of 300 to 640 px in {NUM_SHARDS} shards, median of {REPEATS} passes in turns"
        for is_train, name, note in (
            (True, "data pipeline, training, 224 px", "peer: open_clip's loader"),
            (False, "data pipeline, evaluation, 224 px", "both give PIL's pixels"),
        ):
            ours, peer = our_pass(shards, is_train=is_train), peer_pass(shards, is_train=is_train, number=NUM_IMAGES)
            rows.append(compare(name, ours, peer, MUST, f"{what}; {note}", number=NUM_IMAGES))
        shards = make_shards(Path(web_folder), WEB_SIZES, NUM_WEB_IMAGES)
        what = f"{NUM_WEB_IMAGES} JPEGs of 500 to 1,500 px in {NUM_SHARDS} shards, median of {REPEATS} passes in turns"
        for is_train, reduced, name, must, note in (
            (True, False, "data pipeline, training, web sizes, 224 px", MUST_WEB, "peer: open_clip's loader"),
            (False, True, "data pipeline, evaluation, reduced_decode, web sizes, 224 px", MUST_WEB, "within 2 of 255 of PIL's"),
            (False, False, "data pipeline, evaluation, web sizes, 224 px", MUST, "both give PIL's pixels"),
        ):
            ours = our_pass(shards, is_train=is_train, reduced=reduced)
            peer = peer_pass(shards, is_train=is_train, number=NUM_WEB_IMAGES)
            rows.append(compare(name, ours, peer, must, f"{what}; {note}", number=NUM_WEB_IMAGES))
    return rows


def main() -> None:
    """Print the table; write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    out = parser.parse_args().json
    rows = run()
    print(f"{'':62}{'ours':>10}{'peer':>10}{'ratio':>8}  unit")
    for row in rows:
        print(f"{row['name']:62}{row['ours']:10.1f}{row['peer']:10.1f}{row['ratio']:8.2f}  {row['unit']}")
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
