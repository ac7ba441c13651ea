"""The tokenizer beside open_clip's, on real captions: `python -m benchmarks.tokenizer --json OUT`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.peers import import_open_clip, main, row
from wordsight.data import open_source
from wordsight.data.tokenize import ClipTokenizer

MUST = 1.0


def captions() -> dict[str, list[str]]:
    """Real captions by kind: names and keywords of the embedded data, sentences made of them, and the same not in plain ASCII."""
    source = open_source("sample:train")
    short = [caption for index in range(len(source)) for caption in source[index].captions]
    sentences = [
        f"A photo of {', '.join(short[start : start + 6])}, and it's drawn in 3D." for start in range(0, len(short) - 6, 3)
    ]
    accented = [f"{text.replace('e', 'é')} – “{text}” &amp; 🤗" for text in sentences[:1000]]
    return {"names and keywords": short, "sentences": sentences, "not ASCII, with entities": accented}


def run() -> list[dict]:
    """Rows for the table of benchmarks: texts a second of both, cold (fresh caches) and warm, in batches and one by one."""
    import_open_clip()
    from open_clip.tokenizer import SimpleTokenizer

    torch.set_num_threads(1)
    rows = []
    for kind, texts in captions().items():
        for how, call in (("batches of 256", _batches), ("one by one", _singles)):
            used = texts if how.startswith("batches") else texts[:2000]
            for state in ("cold", "warm"):
                ours, peer = _best(lambda: ClipTokenizer.clip(), SimpleTokenizer, call, used, state)
                rows.append(
                    row(
                        f"tokenizer, {kind}, {how}, {state}",
                        len(used) / ours,
                        len(used) / peer,
                        "texts/s",
                        MUST,
                        f"{len(used):,} texts, one thread; cold: word caches empty",
                        higher_is_better=True,
                    )
                )
    return rows


def _best(
    make_ours: Callable[[], Callable],
    make_peer: Callable[[], Callable],
    call: Callable[[Callable, list[str]], None],
    texts: list[str],
    state: str,
) -> tuple[float, float]:
    """Seconds of the quickest of five passes each, taken in turns; both give the same ids."""
    ours, peer = make_ours(), make_peer()
    assert torch.equal(ours(texts), peer(texts)), "the tokenizers differ"
    best = [float("inf"), float("inf")]
    for _ in range(5):
        for place, make in enumerate((make_ours, make_peer)):
            tokenizer = make() if state == "cold" else (ours, peer)[place]
            start = time.perf_counter()
            call(tokenizer, texts)
            best[place] = min(best[place], time.perf_counter() - start)
    return best[0], best[1]


def _batches(tokenizer: Callable, texts: list[str]) -> None:
    for start in range(0, len(texts), 256):
        tokenizer(texts[start : start + 256])


def _singles(tokenizer: Callable, texts: list[str]) -> None:
    for text in texts:
        tokenizer(text)


if __name__ == "__main__":
    main(run, "The tokenizer beside open_clip's.")
