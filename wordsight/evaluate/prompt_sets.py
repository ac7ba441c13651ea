"""Class names and templates of the CLIP paper's data sets (arXiv 2103.00020, table 9 and section 3.1.4), as files with sources.

A class is known by one label and stands in the templates by its names: mostly one, the label itself; Facial Emotion Recognition
has several a class, and a gloss ("crane (bird)") is a name of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

ALIASES = {"imagenet80": "imagenet"}
GLOSS_FORM = "{label} ({gloss})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The classes of a data set and how they are asked for.

    Attributes:
        classes: C labels, each once, in the published order.
        templates: with one `{label}` in each; none where only classes are known (a file of class names).
        source: where they were published.
        title: the data set's name.
        names: label -> what stands in the templates instead of it, several names are ensembled; a label without an entry stands
            for itself.
        ids: [C] what the data set itself calls the classes (ImageNet's WordNet ids), or empty.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...] = ()
    source: str = "given"
    title: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ids: tuple[str, ...] = ()


@cache
def set_names() -> tuple[str, ...]:
    """The names that `prompt_set` knows."""
    found = (path.name for path in (files("wordsight.evaluate") / "assets" / "prompts").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def is_set(name: Any) -> bool:
    """Whether `prompt_set` knows that name."""
    return isinstance(name, str) and _plain(name) in {_plain(known) for known in (*set_names(), *ALIASES)}


def prompt_set(name: str) -> PromptSet:
    """Classes and templates of a data set of the CLIP paper.

    Args:
        name: one of `set_names()`, whatever its case, hyphens and underscores: "cifar10", "CIFAR-10".

    Raises:
        ValueError: an unknown name; the error says which are near.
    """
    by_plain = {_plain(known): known for known in set_names()} | {_plain(other): known for other, known in ALIASES.items()}
    if _plain(name) not in by_plain:
        raise ValueError(f"no prompt set {name!r}{nearest(name, set_names())}; there are {', '.join(set_names())}")
    return _read(by_plain[_plain(name)])


@cache
def _read(name: str) -> PromptSet:
    path = files("wordsight.evaluate") / "assets" / "prompts" / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    given = content["classes"]
    if isinstance(given, str):  # other templates for the same classes
        of = _read(given)
        classes, names, ids = of.classes, of.names, of.ids
    else:
        classes, ids = tuple(given), tuple(content.get("ids", ()))
        names = {label: tuple(several) for label, several in content.get("names", {}).items()}
    return PromptSet(
        classes=classes,
        templates=tuple(content["templates"]),
        source=content["source"],
        title=content["title"],
        names=names,
        ids=ids,
    )


def read_classes(classes: str | Path | Sequence[str] | PromptSet) -> PromptSet:
    """What to choose from: a set's name, a file with one class name a line, or the names as given.

    Raises:
        ValueError: neither a set nor a file, no name, or a name twice.
    """
    if isinstance(classes, PromptSet):
        return classes
    if is_set(classes):
        return prompt_set(str(classes))
    if isinstance(classes, str | Path):
        path = Path(classes)
        if not path.is_file():
            raise ValueError(
                f"no classes {str(classes)!r}{nearest(str(classes), set_names())}: give a file with one class name a line, or "
                f"one of {', '.join(set_names())}"
            )
        lines = (line.strip() for line in _text(path).splitlines())
        found = PromptSet(classes=tuple(line for line in lines if line), source=str(path))
        if not found.classes:
            raise ValueError(f"{path} has no class names: write one a line")
    else:
        found = PromptSet(classes=tuple(classes))
    twice = [name for name, count in Counter(found.classes).items() if count > 1]
    if twice:
        raise ValueError(f"class names must be unique; these come twice or more: {', '.join(map(repr, twice[:10]))}")
    return found


def own_classes(source: Any) -> PromptSet | None:
    """The classes that a data set says it has, in its order, with its own templates; None where it says none."""
    classes = tuple(getattr(source, "classes", ()))
    if not classes:
        return None
    names = {label: (name,) for label, name in getattr(source, "names", {}).items()}
    return PromptSet(classes=classes, templates=getattr(source, "templates", ()), source="the data's own", names=names)


def read_glosses(glosses: str | Path | Mapping[str, str]) -> dict[str, str]:
    """Label -> gloss, from a file of `name<TAB>gloss` lines (`#` starts a comment) or as given.

    Raises:
        ValueError: no such file, none in it, a line without a tab or with an empty side, or a name twice.
    """
    if isinstance(glosses, Mapping):
        return dict(glosses)
    path = Path(glosses)
    if not path.is_file():
        raise ValueError(f"no glosses {str(glosses)!r}: give a file with a class name, a tab and its gloss in each line")
    found: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, gloss = (part.strip() for part in line.partition("\t"))
        if not name or not gloss:
            raise ValueError(f"line {number} of {path} is {line!r:.80}: write a class name, a tab and its gloss")
        if name in found:
            raise ValueError(f"{path} has two glosses for {name!r}, the second in line {number}: keep one")
        found[name] = gloss
    if not found:
        raise ValueError(f"{path} has no glosses: write a class name, a tab and its gloss in each line")
    return found


def with_glosses(classes: PromptSet, glosses: Mapping[str, str], form: str = GLOSS_FORM) -> PromptSet:
    """The same classes with glosses in their names: `crane` -> `crane (bird)`.

    Args:
        classes: what to choose from.
        glosses: label -> gloss; classes without one stay as they are. A gloss with `{label}` in it is the whole name itself.
        form: how name and gloss go together, with `{label}` and `{gloss}` in it.

    Raises:
        ValueError: a gloss for a class that is not there, or a form without one of its two places.
    """
    if "{label}" not in form or "{gloss}" not in form:
        raise ValueError(f"the form of a gloss needs {{label}} and {{gloss}}, got {form!r}, e.g. {GLOSS_FORM!r}")
    unknown = [label for label in glosses if label not in set(classes.classes)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} glosses are for no class that there is, e.g. {unknown[0]!r}{nearest(unknown[0], classes.classes)}: "
            "write the labels of the data"
        )

    def glossed(label: str, name: str) -> str:
        gloss = glosses[label]
        whole = gloss if "{label}" in gloss else form.replace("{gloss}", gloss)
        return whole.replace("{label}", name)

    names = {label: tuple(glossed(label, name) for name in classes.names.get(label, (label,))) for label in glosses}
    return PromptSet(
        classes=classes.classes,
        templates=classes.templates,
        source=classes.source,
        title=classes.title,
        names={**classes.names, **names},
        ids=classes.ids,
    )


def places_of(labels: Iterable[str], classes: PromptSet) -> tuple[dict[str, int], str]:
    """Which class each label of the data is, and by what it was known.

    All labels must be known in one way, tried in this order: by the class's label; by its id; by the label but for case, hyphens,
    underscores and spaces (`apple_pie`); by its place in the published order, from 0. The last three are for the sets that are
    known here, whose folders are seldom named as their prompts.

    Returns:
        label -> place in `classes.classes`, and "label", "id", "spelling" or "place".

    Raises:
        ValueError: in no way are all of them known.
    """
    wanted = set(labels)
    place = {label: i for i, label in enumerate(classes.classes)}
    ways: list[tuple[str, dict[str, int]]] = [("label", {label: place[label] for label in wanted if label in place})]
    if classes.templates:
        ids = {one: i for i, one in enumerate(classes.ids)}
        spelling = {_plain(label): i for label, i in place.items()}
        numbers = {str(i): i for i in range(len(classes.classes))}
        ways.append(("id", {label: ids[label] for label in wanted if label in ids}))
        if len(spelling) == len(place):
            ways.append(("spelling", {label: spelling[_plain(label)] for label in wanted if _plain(label) in spelling}))
        bare = {label: label.lstrip("0") or "0" for label in wanted}
        ways.append(("place", {label: numbers[bare[label]] for label in wanted if bare[label] in numbers}))
    for how, found in ways:
        if len(found) == len(wanted) == len(set(found.values())):
            return found, how
    unknown = sorted(wanted - set(place))
    near = nearest(unknown[0], classes.classes) if unknown else ""
    raise ValueError(
        f"{len(unknown)} labels of the data are not among the {len(classes.classes)} given classes, e.g. "
        f"{', '.join(map(repr, unknown[:10]))}{near}: add them, or the accuracy would silently be of another set"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """` (do you mean 'cifar10'?)`, or nothing where no known name is near."""
    by_plain = {_plain(one): one for one in known}
    found = get_close_matches(_plain(name), by_plain, n=1, cutoff=0.7)
    return f" (do you mean {by_plain[found[0]]!r}?)" if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
