"""A zero-shot classifier of ImageNet's 1,000 classes in 80 templates, beside open_clip's `build_zero_shot_classifier`.

The text tower of ViT-B/32 (12 layers of width 512) with random weights, the same in both, float32; texts are tokenised by each
side's own tokenizer within its time. Ours is measured whole. open_clip works through its classes ten at a time with 77 tokens a
text, each ten alike, so that its time is linear in them: it is measured on ten classes before ours and on ten after, and scaled
to 1,000. The vectors of those twenty classes must agree, or the benchmark fails.

Processor seconds on one thread, as a quiet machine's clock would show them. It takes about seven minutes.
`python -m benchmarks.classifier_builder --json OUT` writes the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import import_open_clip, main, our_model, peer_model, row
from wordsight.data.tokenize import ClipTokenizer
from wordsight.evaluate.prompt_sets import prompt_set
from wordsight.evaluate.prompts import class_embeddings, fill

NAME = "ViT-B/32"
PEER_BATCH = 10  # classes that open_clip encodes at once, its default
AGREEMENT = 1e-5


def run() -> list[dict]:
    """The row; an AssertionError where the two sides' vectors differ."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    open_clip, peer = import_open_clip(), peer_model(NAME).eval()
    model = our_model(NAME, peer).eval()
    model.tokenizer = ClipTokenizer.clip()
    found = prompt_set("imagenet")
    names = [found.names.get(label, (label,))[0] for label in found.classes]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def theirs(part: Sequence[str]) -> Tensor:
        makers = [partial(fill, template) for template in found.templates]
        return open_clip.build_zero_shot_classifier(peer, tokenizer, part, makers, num_classes_per_batch=PEER_BATCH).T

    parts = names[:PEER_BATCH], names[500 : 500 + PEER_BATCH]
    theirs(names[:1]), class_embeddings(model, names[:1], found.templates)  # warm
    before, first_CD = _timed(lambda: theirs(parts[0]))
    ours, ours_CD = _timed(lambda: class_embeddings(model, found.classes, found.templates, names=found.names))
    after, second_CD = _timed(lambda: theirs(parts[1]))
    for start, peer_CD in ((0, first_CD), (500, second_CD)):
        difference = float((ours_CD[start : start + PEER_BATCH] - peer_CD).abs().max())
        assert difference < AGREEMENT, f"{difference} between Wordsight's and open_clip's classifier"
    scale = len(names) / (2 * PEER_BATCH)
    note = (
        f"{len(names):,} x {len(found.templates)} texts, ours whole; open_clip's is {before + after:.0f} s for {2 * PEER_BATCH} "
        f"classes, times {scale:.0f}, as it works ten classes by ten; one thread"
    )
    title = f"Zero-shot classifier, {len(names):,} classes x {len(found.templates)} templates"
    return [row(title, ours, (before + after) * scale, "processor s", 8.0, note)]


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Processor seconds of a call, and what it gave."""
    start = time.process_time()
    given = work()
    return time.process_time() - start, given


if __name__ == "__main__":
    main(run, __doc__ or "")
