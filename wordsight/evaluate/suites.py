"""The suites that have a name on the command line: functions of the folder of data sets, each gives a list of items."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from wordsight.data.geography import geography_needs
from wordsight.data.layouts import LAYOUTS
from wordsight.evaluate.failures import PublishedTest, generated
from wordsight.evaluate.groups import Geography
from wordsight.evaluate.published import Published
from wordsight.evaluate.retrieval import Retrieval
from wordsight.evaluate.robustness import robustness_items
from wordsight.evaluate.suite import SuiteItem
from wordsight.evaluate.zero_shot import ZeroShot

SEEN, UNSEEN = "sample:test-twemoji-seen", "sample:test-twemoji-unseen"


def quick(root: Path) -> list[SuiteItem]:
    """A minute on a CPU, nothing to fetch: the embedded pictures, in a drawing that no model of the house is trained on, and four
    failure modes of 200 items, the first of them the control.

    Names are asked for bare ("red apple"), for all models alike.
    """
    return [
        SuiteItem(name="zero-shot-seen", evaluator=ZeroShot(prompts="name"), data=SEEN),
        SuiteItem(name="retrieval-seen", evaluator=Retrieval(), data=SEEN, metric="text_to_image_R@1"),
        SuiteItem(name="zero-shot-unseen", evaluator=ZeroShot(prompts="name"), data=UNSEEN),
        SuiteItem(name="retrieval-unseen", evaluator=Retrieval(), data=UNSEEN, metric="text_to_image_R@1"),
        *(item for item in _generated(200) if item.name in ("objects", "counting", "spatial", "attribute_binding")),
    ]


def failures(root: Path) -> list[SuiteItem]:
    """What CLIP is known to fail at, made from seeds with exact labels: 400 items of each mode, nothing to fetch; and those
    published tests that lie under ROOT."""
    return [*_generated(400), *_published_tests(root)]


# reader: the file that shows that a test is there, and how many folders above it the reader is given (0: the file)
_TESTS = {
    "winoground": ("winoground/examples.jsonl", 1),
    "aro-relation": ("aro/visual_genome_relation.json", 1),
    "aro-attribution": ("aro/visual_genome_attribution.json", 1),
    "aro-order": ("aro/*_order.json", 0),
    "sugarcrepe": ("sugarcrepe/add_att.json", 1),
    "valse": ("valse/*.json", 0),
    "clevr-counts": ("CLEVR_v1.0/scenes/CLEVR_val_scenes.json", 2),
    "nlvr2": ("nlvr2/*.json", 0),
}


def _published_tests(root: Path) -> list[SuiteItem]:
    return [
        SuiteItem(
            name=name if above else f"{name}-{re.sub('[^A-Za-z0-9._+-]', '-', file.stem)}",
            evaluator=PublishedTest(name=name, path=file.parents[above - 1] if above else file),
            needs=((file, f"the questions of {name}"),),
        )
        for name, (pattern, above) in _TESTS.items()
        for file in sorted(root.glob(pattern))
    ]


def _generated(num: int) -> list[SuiteItem]:
    return [
        SuiteItem(name=mode.name, evaluator=mode, dataset=f"failures:{mode.name}", split=f"seed {mode.seed}")
        for mode in generated(num)
    ]


def robustness(root: Path) -> list[SuiteItem]:
    """Corruptions and unseen drawings of the embedded pictures; under ROOT ImageNet's natural shifts, GeoDE and Dollar Street."""
    shown = {"corruptions-sample": "corrupted_top1", "vendor-shift": "trained_unseen_drawing_top1"}
    return [
        SuiteItem(name=item.name, evaluator=item, needs=item.needs, metric=shown.get(item.name))
        for item in robustness_items(root)
    ]


# key: (title, published figure, prompt set, CoOp's layout, folders beside `key` and CLIP_benchmark's `wds_key`)
# fmt: off
_SETS: dict[str, tuple[str, str, str | None, str | None, tuple[str, ...]]] = {
    "food101": ("Food-101", "top1", "food101", "food101", ()),
    "cifar10": ("CIFAR-10", "top1", "cifar10", None, ("wds_vtab-cifar10",)),
    "cifar100": ("CIFAR-100", "top1", "cifar100", None, ("wds_vtab-cifar100",)),
    "birdsnap": ("Birdsnap", "top1", "birdsnap", None, ()),
    "sun397": ("SUN397", "top1", "sun397", "sun397", ()),
    "cars": ("Stanford Cars", "top1", "stanford_cars", "stanford_cars", ()),
    "fgvc_aircraft": ("FGVC Aircraft", "mean_per_class", "fgvc_aircraft", "fgvc_aircraft", ()),
    "voc2007_multilabel": ("Pascal VOC 2007, all labels of a picture", "map_11_point", "voc2007", None, ()),
    "voc2007": ("Pascal VOC 2007, one object a picture", "top1", "voc2007", None, ()),
    "dtd": ("Describable Textures", "top1", "dtd", "dtd", ("wds_vtab-dtd",)),
    "pets": ("Oxford-IIIT Pets", "mean_per_class", "oxford_pets", "oxford_pets", ("wds_vtab-pets",)),
    "caltech101": ("Caltech-101", "mean_per_class", "caltech101", None, ("wds_vtab-caltech101",)),
    "flowers": ("Oxford Flowers 102", "mean_per_class", "flowers102", "oxford_flowers", ("wds_vtab-flowers",)),
    "mnist": ("MNIST", "top1", "mnist", None, ()),
    "fer2013": ("Facial Emotion Recognition 2013", "top1", "fer2013", None, ()),
    "stl10": ("STL-10", "top1", "stl10", None, ()),
    "eurosat": ("EuroSAT", "top1", "eurosat", "eurosat", ("wds_vtab-eurosat",)),
    "resisc45": ("RESISC45", "top1", "resisc45", None, ("wds_vtab-resisc45",)),
    "gtsrb": ("GTSRB", "top1", "gtsrb", None, ()),
    "kitti_distance": ("KITTI vehicle distance", "top1", "kitti_distance", None, ("wds_vtab-kitti_closest_vehicle_distance",)),
    "country211": ("Country211", "top1", "country211", None, ()),
    "pcam": ("PatchCamelyon", "top1", "pcam", None, ("wds_vtab-pcam",)),
    "ucf101": ("UCF101, middle frames", "top1", "ucf101", "ucf101", ()),
    "kinetics700": ("Kinetics700, middle frames", "mean_top1_top5", "kinetics700", None, ()),
    "clevr_counts": ("CLEVR counts", "top1", "clevr_counts", None, ("wds_vtab-clevr_count_all",)),
    "hateful_memes": ("Hateful Memes", "roc_auc", "hateful_memes", None, ()),
    "renderedsst2": ("Rendered SST2", "top1", "rendered_sst2", None, ()),
    "imagenet1k": ("ImageNet", "top1", "imagenet", "imagenet", ()),
    "clevr_distance": ("CLEVR distance", "top1", None, None, ("wds_vtab-clevr_closest_object_distance",)),
    "svhn": ("SVHN", "top1", None, None, ("wds_vtab-svhn",)),
    "imagenet_sketch": ("ImageNet Sketch", "top1", "imagenet", "imagenet_sketch", ()),
    "imagenetv2": ("ImageNet V2", "top1", "imagenet", "imagenetv2", ()),
    "imagenet-a": ("ImageNet-A", "top1", "imagenet", "imagenet_a", ()),
    "imagenet-o": ("ImageNet-O", "top1", None, None, ()),
    "imagenet-r": ("ImageNet-R", "top1", "imagenet", "imagenet_r", ()),
    "objectnet": ("ObjectNet", "top1", None, None, ()),
    "iwildcam": ("iWildCam", "macro_f1", None, None, ("wds_wilds-iwildcam",)),
    "camelyon17": ("Camelyon17", "top1", None, None, ("wds_wilds-camelyon17",)),
    "flickr30k": ("Flickr30k, 1k test", "mean_recall@1", None, None, ()),
    "mscoco_captions": ("MS COCO captions, 5k test", "mean_recall@1", None, None, ()),
}
CLIP27 = (
    "food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars", "fgvc_aircraft", "voc2007_multilabel", "dtd", "pets",
    "caltech101", "flowers", "mnist", "fer2013", "stl10", "eurosat", "resisc45", "gtsrb", "kitti_distance", "country211", "pcam",
    "ucf101", "kinetics700", "clevr_counts", "hateful_memes", "renderedsst2", "imagenet1k",
)
DATACOMP = (
    "caltech101", "cifar10", "cifar100", "clevr_counts", "clevr_distance", "country211", "dtd", "eurosat", "fgvc_aircraft",
    "food101", "gtsrb", "imagenet1k", "imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "kitti_distance",
    "mnist", "objectnet", "flowers", "pets", "voc2007", "pcam", "renderedsst2", "resisc45", "cars", "stl10", "sun397", "svhn",
    "flickr30k", "mscoco_captions", "iwildcam", "camelyon17",
)
# fmt: on


def clip27(root: Path) -> list[SuiteItem]:
    """Zero-shot on the 27 data sets of the CLIP paper (arXiv 2103.00020, table 9), by the figure published for each.

    A set lies under ROOT as CLIP_benchmark's shards (`wds_food101/`), in class folders (`food101/test/CLASS/`), as a folder of
    Hugging Face `datasets`, or, where CoOp has it, as CoOp lays it out.
    """
    return [_published(key, root) for key in CLIP27]


def datacomp38(root: Path) -> list[SuiteItem]:
    """Zero-shot on DataComp's evaluation sets, in the same layouts, GeoDE and Dollar Street in their own.

    36 of the 38: WinoGAViL (choosing pictures for a word) and FMoW (its regions are in no layout that is read) are not judged.
    DataComp's mean of 38 is thus not what the mean of this suite is.
    """
    groups = [
        SuiteItem(
            name=name,
            evaluator=Geography(name=name, root=root, prompts="simple"),
            metric=metric,
            needs=geography_needs(name, root),
        )
        for name, metric in (("geode", "region_worst"), ("dollar_street", "income_worst"))
    ]
    return [*(_published(key, root) for key in DATACOMP), *groups]


def _published(key: str, root: Path) -> SuiteItem:
    title, metric, prompts, layout, others = _SETS[key]
    names = [f"wds_{key}", *others]
    places = (*(root / name for one in names for name in (one, f"{one}_test")), root / key)
    if layout is not None and LAYOUTS[layout].folder == key:  # CoOp's folder of that name is no folder of classes
        complete = all((root / key / need).exists() for need in LAYOUTS[layout].needs)
        places = places[:-1] if complete else places
    judged = Published(title=title, metric=metric, prompts=prompts, places=places, layout=layout, root=root)
    return SuiteItem(name=key, evaluator=judged, dataset=key, split="test", metric=metric, needs=judged.needs)


SUITES: dict[str, Callable[[Path], list[SuiteItem]]] = {
    "quick": quick,
    "clip27": clip27,
    "datacomp38": datacomp38,
    "robustness": robustness,
    "failures": failures,
}


def open_suite(name: str, root: Path) -> list[SuiteItem]:
    """A suite by its name, or from a Python file that has a function `suite(root) -> list[SuiteItem]`; the file is executed.

    Raises:
        FileNotFoundError: neither a suite's name nor a file.
        ValueError: the file can't be run, has no such function, or it gives something else.
    """
    if name in SUITES:
        return SUITES[name](root)
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"no suite {name!r}: there are {', '.join(SUITES)}; or give a Python file with suite(root)")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"wordsight_suite_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
        items = module.suite(root)
    except Exception as error:  # a user's own code: any error there is theirs to mend
        raise ValueError(
            f"{path} gives no suite ({type(error).__name__}: {error}): it needs suite(root) -> list[SuiteItem]"
        ) from error
    if not isinstance(items, list) or not all(isinstance(item, SuiteItem) for item in items):
        raise ValueError(
            f"suite(root) of {path} must give a list of wordsight.evaluate.suite.SuiteItem, got {type(items).__name__}"
        )
    return items
