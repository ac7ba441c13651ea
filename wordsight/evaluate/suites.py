"""The suites that have a name on the command line: functions of the folder of data sets, each gives a list of items."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from wordsight.evaluate.failures import generated
from wordsight.evaluate.retrieval import Retrieval
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
    """What CLIP is known to fail at, made from seeds with exact labels: 400 items of each mode, nothing to fetch."""
    return _generated(400)


def _generated(num: int) -> list[SuiteItem]:
    return [
        SuiteItem(name=mode.name, evaluator=mode, dataset=f"failures:{mode.name}", split=f"seed {mode.seed}")
        for mode in generated(num)
    ]


SUITES: dict[str, Callable[[Path], list[SuiteItem]]] = {"quick": quick, "failures": failures}


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
