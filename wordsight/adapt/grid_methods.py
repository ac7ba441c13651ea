"""The cells of `wordsight long-tail`: what their names mean, and what a user may ask of a grid of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wordsight.adapt.imbalanced import LOSSES

STAGES = {  # as cells are called -> second_stage.KINDS
    "crt": "crt",
    "lws": "lws",
    "tau": "tau_normalisation",
    "ncm": "ncm",
    "disalign": "disalign",
    "marc": "marc",
    "logit_adjustment": "logit_adjustment",
}
WISE_FT = "wise_ft"  # the second stage of what starts as zero-shot: weights between the two, chosen on validation
ALL = (  # a second stage mends what cross entropy learns of unequal classes; after another loss it can be asked for by name
    "zero_shot",
    "linear_probe",
    "decoder+cross_entropy",
    "decoder+class_balanced",
    "decoder+class_balanced_sampling",
    "decoder+effective_number",
    "decoder+grw",
    "decoder+focal",
    "decoder+balanced_softmax",
    "decoder+logit_adjustment",
    "decoder+ldam",
    "decoder+lade",
    "decoder+cross_entropy+crt",
    "decoder+cross_entropy+lws",
    "decoder+cross_entropy+tau",
    "decoder+cross_entropy+ncm",
    "decoder+cross_entropy+disalign",
    "decoder+cross_entropy+marc",
    "decoder+cross_entropy+logit_adjustment",
)
PROMPTS = tuple(f"coop+{loss}" for loss in LOSSES)  # not in ALL: each step encodes every class's text, far longer than a head's
PARTS = ("last", "lora", "adaptformer")  # of an image tower, that fine_tune may teach alone
TUNED = (  # nor these: each cell looks at every picture anew in each epoch
    "projection+cross_entropy",
    "projection+balanced_softmax",
    "projection+balanced_softmax+wise_ft",
    "fine_tune+cross_entropy",
    "fine_tune+balanced_softmax",
    "fine_tune+balanced_softmax+wise_ft",
    *(f"fine_tune+balanced_softmax+{part}" for part in PARTS),
    "lift",
)
GROUPS = {"all": ALL, "coop": PROMPTS, "tuned": TUNED}  # what may be asked for by one word
PLAIN = ("zero_shot", "linear_probe", "lift")  # cells that are called as their estimator
WITH_LOSS = ("decoder", "coop", "projection", "fine_tune")  # cells that are called estimator+LOSS
ESTIMATORS = (*PLAIN, *WITH_LOSS)
_IN_NAME, _SHARED = "it is part of a cell's name", "all cells share the run's"
OWN_SETTINGS = {  # that the grid gives an estimator itself
    "decoder": {"loss": _IN_NAME, "stage2": _IN_NAME, "cache": _SHARED},
    "coop": {"loss": _IN_NAME},
    "projection": {"loss": _IN_NAME, "wise_ft": _IN_NAME},
    "fine_tune": {"loss": _IN_NAME, "part": _IN_NAME, "wise_ft": _IN_NAME},
}


@dataclass(frozen=True, kw_only=True)
class CellMethod:
    """What a cell's name means.

    Attributes:
        estimator: one of ESTIMATORS.
        loss: of an estimator WITH_LOSS.
        stage2: of the decoder, a key of STAGES; of projection and fine_tune WISE_FT; or None.
        part: of fine_tune, one of PARTS; None: the whole tower.
        sampling: of the decoder, where its name says it.
    """

    estimator: str
    loss: str | None = None
    stage2: str | None = None
    part: str | None = None
    sampling: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The estimator's parameters that the name says."""
        return {name: value for name in ("loss", "part", "sampling") if (value := getattr(self, name)) is not None}

    @property
    def first(self) -> str | None:
        """The name of the cell that a second stage starts from."""
        return None if self.stage2 is None else "+".join(one for one in (self.estimator, self.loss, self.part) if one is not None)


def read_method(name: str) -> CellMethod:
    """A plain estimator's name, one with its LOSS, decoder+LOSS+STAGE or fine_tune+LOSS+PART; projection and fine_tune with
    WISE_FT behind it.

    Raises:
        ValueError: another name, with what there is.
    """
    match name.split("+"):
        case [estimator] if estimator in PLAIN:
            return CellMethod(estimator=estimator)
        case ["decoder", "class_balanced_sampling"]:
            return CellMethod(estimator="decoder", loss="cross_entropy", sampling="class_balanced")
        case [estimator, loss] if estimator in WITH_LOSS and loss in LOSSES:
            return CellMethod(estimator=estimator, loss=loss)
        case ["decoder", loss, stage] if loss in LOSSES and stage in STAGES:
            return CellMethod(estimator="decoder", loss=loss, stage2=stage)
        case [("projection" | "fine_tune") as estimator, loss, "wise_ft"] if loss in LOSSES:
            return CellMethod(estimator=estimator, loss=loss, stage2=WISE_FT)
        case ["fine_tune", loss, part] if loss in LOSSES and part in PARTS:
            return CellMethod(estimator="fine_tune", loss=loss, part=part)
        case ["fine_tune", loss, part, "wise_ft"] if loss in LOSSES and part in PARTS:
            return CellMethod(estimator="fine_tune", loss=loss, part=part, stage2=WISE_FT)
    with_loss = ", ".join(f"{one}+LOSS" for one in WITH_LOSS)
    raise ValueError(
        f"no method {name!r}: write {', '.join(PLAIN)}, {with_loss}, decoder+LOSS+STAGE, fine_tune+LOSS+PART, "
        f"decoder+class_balanced_sampling, or {WISE_FT} behind projection's and fine_tune's, with LOSS one of "
        f"{', '.join(LOSSES)}, STAGE one of {', '.join(STAGES)}, and PART one of {', '.join(PARTS)}; or "
        f"{' or '.join(GROUPS)} for many of them"
    )


def read_methods(text: str) -> tuple[str, ...]:
    """Names of cells from what a user types, commas between; a word of GROUPS stands for its cells that are not named yet."""
    found: list[str] = []
    for word in (one.strip() for one in text.split(",")):
        found += [name for name in GROUPS[word] if name not in found] if word in GROUPS else [word]
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """What to learn.

    Attributes:
        methods: names of cells, see `read_method`; the first stage of a second stage is added where it is missing.
        seeds: of rows, weights and views.
        parameters: of estimators, by name.
        many_above, few_below: which classes are many and few, see `evaluate.long_tail.judge`.
        words: what the user typed for model and data, for settings.json and the report.
    """

    methods: tuple[str, ...] = ALL
    seeds: tuple[int, ...] = (1, 2, 3)
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    many_above: float = 100
    few_below: float = 20
    words: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different names, at least one, got {', '.join(self.methods) or 'none'}")
        for name in self.methods:
            read_method(name)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers of 0 or more, at least one, got {list(self.seeds)}")
        if not 0 <= self.few_below <= self.many_above + 1:
            raise ValueError(f"few_below must be 0 to many_above + 1, got {self.few_below:g} and {self.many_above:g}")
        for estimator, own in self.parameters.items():
            if estimator not in ESTIMATORS:
                raise ValueError(f"the grid's methods are {', '.join(ESTIMATORS)}; it has no {estimator} to set anything of")
            for key in own:
                if why := OWN_SETTINGS.get(estimator, {}).get(key):
                    raise ValueError(f"{estimator}.{key} can't be set in a grid: {why}")

    @property
    def cells(self) -> tuple[tuple[str, int], ...]:
        """(method, seed) in the order in which they are done: seed by seed, a first stage before its second one."""
        ordered: dict[str, None] = {}
        for name in self.methods:
            ordered |= {one: None for one in (read_method(name).first, name) if one is not None}
        return tuple((name, seed) for seed in self.seeds for name in ordered)
