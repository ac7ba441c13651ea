"""The published long-tail studies as requests that are complete to the last hyper-parameter: `wordsight long-tail --recipe NAME`.

The decoder on frozen CLIP of "Exploring Vision-Language Models for Imbalanced Learning" (arXiv 2304.01457) with ViT-L/14 and
ViT-B/16, and LIFT (arXiv 2309.10019) with ViT-B/16, each on ImageNet-LT, Places-LT and iNaturalist 2018, three seeds.

None has been run here at its full size: that takes days of a GPU. What a recipe expects of figures comes from the papers and says
how sure it is; what it expects of time is counted operations over a rate, measured for a processor's core and assumed for a GPU.

Shape legend: N training pictures, V views, T tokens, W width, L blocks, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wordsight.adapt.decoder import COSINE_SCALE
from wordsight.adapt.grid_methods import ALL, GridRequest
from wordsight.adapt.imbalanced import DEFERRED_SHARE, EFFECTIVE_BETA, LDAM_SCALE
from wordsight.adapt.second_stage import TAUS
from wordsight.losses.imbalance import LADE_WEIGHT

SEEDS = (1, 2, 3)
CORE_GFLOPS = 94.0  # measured: ViT-B/16 forward, float32, one core of an AMD EPYC (benchmarks/token_cache.py)
GPU_TFLOPS = 10.0  # assumed, not measured: about half of what an A100 can do in float32
UNMARKED = "from the project's notes on the paper, not marked as read or remembered there: check it before you quote it"
RERUN = "one user's rerun, in the project's notes and not marked there: check it before you quote it"
ENSEMBLE = ("a photo of a {label}.",)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A figure that a run should come near to.

    Attributes:
        what: the method and the metric, in words.
        value: in percent, or points.
        source: where it comes from and how sure it is.
    """

    what: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class PublishedData:
    """A published long-tailed data set as `open_long_tail` reads it.

    Attributes:
        name: in words.
        layout: what lies in the folder that --data names.
        num_train, num_val, num_test: pictures; num_val is 0 where a tenth of train is held out.
        num_classes: C.
    """

    name: str
    layout: str
    num_train: int
    num_val: int
    num_test: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Tower:
    """An image tower as its operations are counted.

    Attributes:
        name: of the catalogue.
        tokens, width, blocks: T, W, L.
    """

    name: str
    tokens: int
    width: int
    blocks: int

    @property
    def look(self) -> float:
        """Operations of a picture's forward pass."""
        return 2.0 * self.blocks * (12 * self.width**2 * self.tokens + 2 * self.tokens**2 * self.width)

    @property
    def decode(self) -> float:
        """Operations of a picture's forward pass through the decoder's 3 blocks, of which the last has one query."""
        return 2.0 * 2 * (5 * self.width**2 * self.tokens + 2 * self.tokens**2 * self.width)

    @property
    def learn(self) -> float:
        """Those of a picture's forward and backward pass through them."""
        return 3 * self.decode - 2.0 * 3 * self.width**2 * self.tokens


@dataclass(frozen=True, kw_only=True)
class TailRecipe:
    """A study, ready to run.

    Attributes:
        name: what --recipe takes.
        data, tower: what it is of.
        paper: where the settings come from.
        request: methods, seeds, all settings.
        fixed: what no setting changes, in words.
        expected: figures to compare with.
        differs: where it is not the published program, and why.
    """

    name: str
    data: PublishedData
    tower: Tower
    paper: str
    request: GridRequest
    fixed: tuple[str, ...]
    expected: tuple[Expected, ...]
    differs: tuple[str, ...]

    @property
    def views(self) -> int:
        """Passes of a picture through the tower that are kept: the fixed view, and each seed's random ones."""
        return 1 + len(self.request.seeds) * self.request.parameters.get("decoder", {}).get("num_views", 0)

    @property
    def disk_gb(self) -> float:
        """Of the kept tokens, one byte a number."""
        if "decoder" not in self.request.parameters:
            return 0.0
        held = self.data.num_train * self.views + self.data.num_val + self.data.num_test
        return held * self.tower.tokens * (self.tower.width + 4) / 1e9

    @property
    def operations(self) -> float:
        """Floating-point operations of the whole, without the linear probe."""
        asked = self.data.num_val + self.data.num_test
        if "lift" in self.request.parameters:
            own = self.request.parameters["lift"]
            # adapters learn in every block: forward, and backward through what stands still
            passes = own["epochs"] * self.data.num_train * 2 + asked * own["test_crops"]
            return self.tower.look * (passes * len(self.request.seeds) + self.data.num_train + asked)
        own = self.request.parameters["decoder"]
        cells = [name for name in self.request.methods if name.startswith("decoder")]
        first = [name for name in cells if name.count("+") == 1]
        learn = len(first) * own["steps"] * own["batch_size"] * self.tower.learn
        again = (len(cells) - len(first)) * max(1, own["num_views"]) * self.data.num_train * self.tower.decode
        judged = len(cells) * asked * self.tower.decode
        looked = (self.data.num_train * self.views + asked) * self.tower.look
        return looked + len(self.request.seeds) * (learn + again + judged)

    @property
    def command(self) -> str:
        """What runs it."""
        file = self.tower.name.replace("/", "-")
        return f"wordsight long-tail --recipe {self.name} --model {file}.pt --data FOLDER --run runs/{self.name}"

    def describe(self) -> str:
        """All of this in words, for the terminal."""
        seeds = ", ".join(map(str, self.request.seeds))
        hours, core_hours = self.operations / GPU_TFLOPS / 3.6e15, self.operations / CORE_GFLOPS / 3.6e12
        data = f"{self.data.num_train:,} training pictures of {self.data.num_classes:,} classes"
        disk = f", {self.disk_gb:,.0f} GB of disk for kept tokens" if self.disk_gb else ""
        lines = [
            f"{self.name}: {self.tower.name} on {self.data.name}, {data} ({self.paper})",
            f"  Data      {self.data.layout}",
            f"  Methods   {', '.join(self.request.methods)}; seeds {seeds}",
            *(
                f"  Settings  {estimator}: {', '.join(f'{key}={_plain(value)}' for key, value in own.items())}"
                for estimator, own in self.request.parameters.items()
            ),
            *(f"  Fixed     {one}" for one in self.fixed),
            f"  Hardware  one GPU of 24 GB (not tried){disk}; --device cpu works too",
            f"  Time      estimated, not measured: {self.operations / 1e15:,.0f} PFLOP, so {hours:,.0f} hours at {GPU_TFLOPS:g} "
            f"TFLOP/s (assumed for a GPU in float32), {core_hours:,.0f} hours of a core at {CORE_GFLOPS:g} GFLOP/s (measured on "
            "ViT-B/16); beside it the linear probe and decoding pictures",
            *(f"  Expected  {one.what}: {one.value} ({one.source})" for one in self.expected),
            *(f"  Differs   {one}" for one in self.differs),
            f"  Command   {self.command}",
        ]
        return "\n".join(lines)


def find_recipe(name: str) -> TailRecipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none, with those that there are.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


_LISTS = (
    "a folder with {0}_LT_train.txt, {0}_LT_val.txt and {0}_LT_test.txt (lines `path label`); pictures below it, or below --root"
)
IMAGENET_LT = PublishedData(
    name="ImageNet-LT",
    layout=_LISTS.format("ImageNet") + "; classnames.txt beside the lists (lines `n01440764 tench`) names the classes",
    num_train=115_846,
    num_val=20_000,
    num_test=50_000,
    num_classes=1000,
)
PLACES_LT = PublishedData(
    name="Places-LT",
    layout=_LISTS.format("Places"),
    num_train=62_500,
    num_val=7_300,
    num_test=36_500,
    num_classes=365,
)
INATURALIST = PublishedData(
    name="iNaturalist 2018",
    layout="a folder with train2018.json and val2018.json; pictures below it, or below --root",
    num_train=437_513,
    num_val=0,
    num_test=24_426,
    num_classes=8142,
)
L14 = Tower(name="ViT-L/14", tokens=257, width=1024, blocks=24)
B16 = Tower(name="ViT-B/16", tokens=197, width=768, blocks=12)
TOWERS = {"l14": L14, "b16": B16}
DATA = {"imagenet-lt": IMAGENET_LT, "places-lt": PLACES_LT, "inaturalist18": INATURALIST}

_ZERO_SHOT = {"prompts": ENSEMBLE}
_LINEAR_PROBE = {"layer": "penultimate", "C": "search", "search": "clip", "max_iterations": 1000}
_DECODER = {
    "gamma": 2.0,
    "tau": 1.0,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_ratio": 0.5,
    "head": None,
    "init": "random",
    "steps": 8192,
    "batch_size": 256,
    "learning_rate": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "warmup_steps": 512,
    "sampling": "instance",
    "precision": "float32",
    "num_views": 2,
    "token_kind": "int8",
}
_LIFT = {
    "prompts": ENSEMBLE,
    "scale": 25.0,
    "tau": 1.0,
    "epochs": 10,
    "batch_size": 128,
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "precision": "float32",
    "num_views": None,
    "min_crop": 0.08,
    "test_crops": 5,
    "expand_px": 24,
    "keep_mb": 2000,
}
_FIXED = (
    "decoder: SGD with Nesterov's momentum, vectors not decayed; the rate grows over the warm-up, then falls as "
    "cos(7 pi t / 16); crops of 8 to 100%, flipped half of the time; the last step's weights",
    f"losses: LDAM with margin 0.5, scale {LDAM_SCALE:g} on a cosine head, classes weighed by their effective number from "
    f"{DEFERRED_SHARE:.0%} of the steps on; its and effective_number's beta {EFFECTIVE_BETA:g}; LADE with {LADE_WEIGHT:g} of its "
    "estimator and 0.1 of its square; GRW's exponent 1.2",
    "second stages: the first one's schedule; crt and lws by cross entropy on classes drawn equally often, disalign and marc by "
    f"GRW; tau of tau and logit_adjustment of {TAUS[0]:g}, {TAUS[1]:g} to {TAUS[-1]:g}, by the mean per class on validation; "
    f"ncm's cosines times {COSINE_SCALE:g}",
    "linear probe: C by the CLIP paper's search on validation",
)
_FIXED_LIFT = (
    "lift: SGD with plain momentum, no warm-up, the rate falls as (1 + cos(pi t)) / 2; logit adjustment; AdaptFormer beside each "
    "MLP; a cosine head from the classes' texts, taken back through the projection; crops flipped half of the time",
)
_GAINS = {"imagenet-lt": "+6.58", "places-lt": "+6.17", "inaturalist18": "+69.82"}  # points over zero-shot, the methods' mean
_ADAPTERS = {"imagenet-lt": 32, "places-lt": 8, "inaturalist18": 256}  # 2^floor(log2(C / 2 L)), L = 12
_LIFTED = {"imagenet-lt": "77.0", "places-lt": "51.5", "inaturalist18": "79.1"}
_HELD_OUT = "there is no validation split: a tenth of each class of train is held out to choose by; the paper learns from all"


def _decoder(data: str, tower: str) -> TailRecipe:
    expected = [
        Expected(what="the decoder's methods in the mean, top-1 over zero-shot", value=f"{_GAINS[data]} points", source=UNMARKED)
    ]
    if data == "imagenet-lt":
        for method, figures in (("zero_shot", "73.57, 74.56, 73.15, 72.26"), ("linear_probe", "61.55, 84.57, 56.93, 12.68")):
            expected.append(Expected(what=f"{method}, top-1 of all, many, medium and few", value=f"{figures} %", source=RERUN))
    if data == "inaturalist18":
        expected.append(Expected(what="zero_shot, top-1", value="about 5 %", source=UNMARKED))
    if tower == "b16":
        expected = [Expected(what="figures", value="none", source="the project's notes have none of the decoder on ViT-B/16")]
    differs = [
        "the paper draws a new view of a picture each time; here each seed draws 2 beforehand, and the tower runs once a view",
        "tokens are kept as int8, with the error that each file states",
        "pictures are judged at the model's own view, 224 px of the shorter side, and not at 224 px cut from 256",
        "losses and second stages are as their papers say; the published program departs from them in LDAM, LADE and cRT",
    ]
    return TailRecipe(
        name=f"{data}-{tower}",
        data=DATA[data],
        tower=TOWERS[tower],
        paper="arXiv 2304.01457",
        request=GridRequest(
            methods=ALL,
            seeds=SEEDS,
            parameters={"zero_shot": _ZERO_SHOT, "linear_probe": _LINEAR_PROBE, "decoder": _DECODER},
        ),
        fixed=_FIXED,
        expected=tuple(expected),
        differs=(*differs, *((_HELD_OUT,) if data == "inaturalist18" else ())),
    )


def _lift(data: str) -> TailRecipe:
    return TailRecipe(
        name=f"{data}-lift",
        data=DATA[data],
        tower=B16,
        paper="arXiv 2309.10019",
        request=GridRequest(
            methods=("zero_shot", "lift"),
            seeds=SEEDS,
            parameters={"zero_shot": _ZERO_SHOT, "lift": {"adapter_dim": _ADAPTERS[data], **_LIFT}},
        ),
        fixed=_FIXED_LIFT,
        expected=(Expected(what="lift, top-1", value=f"{_LIFTED[data]} %", source=UNMARKED),),
        differs=(
            "vectors are not decayed, and the rate falls at each step and not at each epoch",
            *((_HELD_OUT,) if data == "inaturalist18" else ()),
        ),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (*(_decoder(data, tower) for tower in TOWERS for data in DATA), *(_lift(data) for data in DATA))
}
