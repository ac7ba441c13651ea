"""Second stages: a trained decoder's head made anew or corrected for classes of unequal size; what stands before it stands still.

- crt: a new head from drawn weights, classes drawn equally often, cross entropy (Kang 2020, arXiv 1910.09217).
- lws: s_c z_c with a learned s, classes drawn equally often, cross entropy (the same).
- tau_normalisation: z_c / |w_c|^tau, nothing is learned (the same; the paper drops the bias, which is divided here too, so that
  tau = 0 is the classifier as it is).
- ncm: the cosine with each class's mean feature, nothing is learned (the same).
- disalign: (1 + g s_c) z_c + g b_c with a confidence g of the features, classes weighed by GRW (Zhang 2021, arXiv 2103.16370,
  section 3.2).
- marc: a_c z_c + b_c |w_c|, classes weighed by GRW (arXiv 2112.07225).
- logit_adjustment: z_c - tau log pi_c, nothing is learned (Menon 2021, arXiv 2007.07314, section 4.1).

What is learned starts as the classifier itself (crt apart) and follows the first stage's schedule, as in arXiv 2304.01457.

Shape legend: N pictures, V views, W width of a feature, C classes, B rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from wordsight.adapt.decoder import COSINE_SCALE, Decoder, counting
from wordsight.adapt.estimator import Validation, _labels
from wordsight.adapt.imbalanced import Schedule, class_counts, step_loss, train
from wordsight.losses.imbalance import adjust_logits, class_means, tau_normalise
from wordsight.nn.decoder import DecoderConfig, TokenDecoder

LEARNED = {  # loss and sampling
    "crt": ("cross_entropy", "class_balanced"),
    "lws": ("cross_entropy", "class_balanced"),
    "disalign": ("grw", "instance"),
    "marc": ("grw", "instance"),
}
KINDS = ("crt", "lws", "tau_normalisation", "ncm", "disalign", "marc", "logit_adjustment")
WITH_TAU = ("tau_normalisation", "logit_adjustment")
TAUS = tuple(i / 10 for i in range(11))


def second_stage(
    first: Decoder,
    kind: str,
    X: Any = None,
    y: Any = None,
    *,
    validation: Validation | None = None,
    sample_weight: Any = None,
    tau: float | None = None,
    schedule: Schedule | None = None,
) -> Decoder:
    """A decoder whose head is made anew or corrected; the first one stays as it is, and both share its blocks.

    Args:
        first: fitted, without a second stage.
        kind: one of `KINDS`.
        X, y: what the first stage learned from, as in `Decoder.fit`; not needed by tau_normalisation and logit_adjustment.
        validation: (X, y) of other pictures, by which tau is chosen where it is not given: of 0, 0.1 to 1 the one of the highest
            mean accuracy over classes.
        sample_weight: as in `Decoder.fit`.
        tau: of tau_normalisation and logit_adjustment; None without validation is 1.
        schedule: how long and how fast is learned; None: as the first stage. Its sampling gives way to the kind's.

    Returns:
        A fitted decoder with `second_stage_` and `second_stage_tau_`.

    Raises:
        ValueError: an unknown kind, a second stage on a second stage, no pictures where they are needed, a class without any.
    """
    check_is_fitted(first)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if first.second_stage_ != "none":
        raise ValueError(f"this decoder had its second stage ({first.second_stage_}): start from the first one")
    if tau is not None and kind not in WITH_TAU:
        raise ValueError(f"tau is of {' and '.join(WITH_TAU)}, {kind} has none")
    second = copy.copy(first)
    second.second_stage_, second.second_stage_tau_ = kind, None
    if kind in WITH_TAU:
        return _with_tau(first, second, kind, tau, validation)
    if X is None:
        raise ValueError(f"{kind} learns from pictures: give those of the first stage and their labels")
    features_VNW, targets_N, weights_N = _look(first, X, y, sample_weight)
    if kind == "ncm":
        second.decoder_ = _nearest_mean(first.decoder_, features_VNW, targets_N, weights_N)
        return second
    schedule = first._check_settings() if schedule is None else schedule
    loss, sampling = LEARNED[kind]
    second.decoder_ = _start(first.decoder_, kind, schedule.seed)
    counts_C = class_counts(targets_N, weights_N, len(first.classes_))

    def read(rows_B: np.ndarray, views_B: np.ndarray | None) -> Tensor:
        return features_VNW[0 if views_B is None else torch.from_numpy(views_B), torch.from_numpy(rows_B)]

    train(
        _HeadOnly(second.decoder_),
        read,
        targets_N,
        step_loss(loss, counts_C, steps=schedule.steps),
        replace(schedule, sampling=sampling),
        num_views=len(features_VNW) if len(features_VNW) > 1 else 0,
        weights_N=weights_N,
        progress=first.progress,
    )
    return second


class _HeadOnly(nn.Module):
    """A decoder's head and calibration, without what stands before them."""

    def __init__(self, decoder: TokenDecoder) -> None:
        super().__init__()
        self.head, self.calibration = decoder.head, decoder.calibration

    def forward(self, features_BW: Tensor) -> Tensor:
        logits_BC = self.head(features_BW)
        return logits_BC if self.calibration is None else self.calibration(logits_BC, features_BW)


def _look(first: Decoder, X: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features of the frozen first stage, [V, N, W] of its views or [1, N, W] of the fixed one, targets [N] and weights [N]."""
    with first._training_tokens(X, reset=False) as tokens:
        tokens, labels, weights_N = counting(tokens, _labels(X, y), sample_weight)
        if len(labels) != len(tokens):
            raise ValueError(f"X has {len(tokens)} pictures and y {len(labels)} labels")
        views: Sequence[int | None] = range(tokens.num_views) or [None]
        features_VNW = torch.stack([first.token_features(tokens, view) for view in views])
    targets_N = first._targets(labels)
    empty = sorted(set(range(len(first.classes_))) - set(targets_N.tolist()))
    if empty:
        names = ", ".join(repr(str(first.classes_[i])) for i in empty[:10])
        raise ValueError(f"{len(empty)} classes have no picture: {names}: give what the first stage learned from")
    return features_VNW, targets_N, weights_N


def _start(first: TokenDecoder, kind: str, seed: int) -> TokenDecoder:
    """The second stage before its first step; what does not learn needs no gradient."""
    if kind == "crt":
        return _rebuild(first, first.config, None, seed)
    config = replace(first.config, calibration="confident" if kind == "disalign" else "plain")
    second = _rebuild(first, config, _still(first.head), seed)
    assert second.calibration is not None
    if kind == "lws":
        second.calibration.shift.requires_grad_(False)
    elif kind == "marc":
        second.calibration.lengths.copy_(first.classifier_rows().detach().norm(dim=1))
    return second


def _rebuild(first: TokenDecoder, config: DecoderConfig, head: nn.Module | None, seed: int = 0) -> TokenDecoder:
    """A decoder with the first one's blocks and this head, or a drawn one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        second = TokenDecoder(replace(config, num_layers=0))
    second.config, second.blocks, second.norm = config, first.blocks, first.norm
    if head is not None:
        second.head = head  # type: ignore[assignment]  # of the kind that config says
    return second.to(next(first.parameters()).device).eval()


def _still(head: nn.Module) -> nn.Module:
    """A copy that does not learn."""
    return copy.deepcopy(head).requires_grad_(False)


def _nearest_mean(first: TokenDecoder, features_VNW: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> TokenDecoder:
    num_views = len(features_VNW)
    repeated_N = None if weights_N is None else weights_N.repeat(num_views)
    means_CW = class_means(features_VNW.flatten(0, 1), targets_N.repeat(num_views), first.config.num_classes, weights=repeated_N)
    second = _rebuild(first, replace(first.config, head="cosine", head_scale=COSINE_SCALE), None)
    second.head.load_state_dict({"weight": means_CW})
    return second


def _with_tau(first: Decoder, second: Decoder, kind: str, tau: float | None, validation: Validation | None) -> Decoder:
    """What only rescales or shifts logits, with the tau that is given or chosen."""
    if tau is None and validation is not None:
        targets_N = first._targets(_labels(*validation))
        features_NW = first.token_features(validation[0])
        if len(features_NW) != len(targets_N):
            raise ValueError(f"validation has {len(features_NW)} pictures and {len(targets_N)} labels")
        scores = [_mean_accuracy(_rescaled(first, kind, one), features_NW, targets_N) for one in TAUS]
        tau = TAUS[int(np.argmax(scores))]  # the first of equals: the least correction
    tau = 1.0 if tau is None else float(tau)
    second.second_stage_tau_ = tau
    second.decoder_ = _rescaled(first, kind, tau)
    return second


@torch.no_grad()
def _rescaled(first: Decoder, kind: str, tau: float) -> TokenDecoder:
    decoder = _rebuild(first.decoder_, replace(first.decoder_.config, calibration="plain"), _still(first.decoder_.head))
    assert decoder.calibration is not None
    if kind == "logit_adjustment":
        decoder.calibration.shift.copy_(adjust_logits(torch.zeros(len(first.counts_)), first.counts_, tau))
    else:
        rows_CW = first.decoder_.classifier_rows()
        lengths_C = rows_CW.norm(dim=1)
        kept_C = tau_normalise(rows_CW, tau).norm(dim=1) / torch.where(lengths_C > 0, lengths_C, 1.0)
        decoder.calibration.scale.copy_(torch.where(lengths_C > 0, kept_C, 1.0))
    return decoder


@torch.no_grad()
def _mean_accuracy(decoder: TokenDecoder, features_NW: Tensor, targets_N: Tensor) -> float:
    """Accuracy of each class that has pictures, in the mean."""
    device = next(decoder.parameters()).device
    right_N = decoder.classify(features_NW.to(device)).argmax(1).cpu() == targets_N
    return float(torch.stack([right_N[targets_N == c].double().mean() for c in targets_N.unique()]).mean())
