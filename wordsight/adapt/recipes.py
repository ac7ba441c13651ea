"""The studies of CoOp's and CoCoOp's papers as requests for `adapt`: context length, robustness, base-to-new.

    for name, request in coop_context_length().items():
        adapt(model, open_data("photos/"), f"runs/context/{name}", request)

Each request is a run folder; a run that was stopped goes on. On the command line it is `wordsight adapt` with the same settings.
"""

from __future__ import annotations

from wordsight.adapt.run import Request

SEEDS = (1, 2, 3)


def coop_context_length(shots: int = 16) -> dict[str, Request]:
    """CoOp with 4, 8 and 16 context tokens on one data set (arXiv 2109.01134, section 4.2).

    Command: wordsight adapt --model M --data D --method coop --shots 16 --set num_context_tokens=4 --run DIR
    """
    return {f"M{length}": _coop(shots, length) for length in (4, 8, 16)}


def coop_robustness(shots: int = 16) -> dict[str, Request]:
    """Zero-shot and CoOp with 16 and 4 context tokens, judged by other data sets that show the same classes in another way.

    The paper (arXiv 2109.01134, section 4.3) learns from ImageNet and judges by V2, Sketch, A and R: `others` of `adapt`.
    Command: wordsight adapt --model M --data imagenet --root R --protocol domain --test imagenetv2 --test imagenet_sketch --test
    imagenet_a --test imagenet_r --method coop --set num_context_tokens=4 --run DIR
    """
    found = {"zero_shot": Request(method="zero_shot", shots=0, seeds=SEEDS[:1], protocol="domain")}
    return found | {f"M{length}": _coop(shots, length, "domain") for length in (16, 4)}


def base_to_new(shots: int = 16) -> dict[str, Request]:
    """Zero-shot, CoOp (4 tokens, "a photo of a") and CoCoOp: base and new classes, harmonic mean (arXiv 2203.05557, section 4.1).

    Command: wordsight adapt --model M --data D --protocol base_to_new --method cocoop --run DIR
    """
    words = {"num_context_tokens": 4, "init": "a photo of a"}
    return {
        "zero_shot": Request(method="zero_shot", shots=0, seeds=SEEDS[:1], protocol="base_to_new"),
        "coop": Request(method="coop", shots=shots, seeds=SEEDS, protocol="base_to_new", parameters=words),
        "cocoop": Request(method="cocoop", shots=shots, seeds=SEEDS, protocol="base_to_new"),
    }


def _coop(shots: int, length: int, protocol: str = "few_shot") -> Request:
    return Request(method="coop", shots=shots, seeds=SEEDS, protocol=protocol, parameters={"num_context_tokens": length})
