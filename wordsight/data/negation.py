"""Captions that deny what a picture shows, made by a few rules of English grammar: hard negatives that need no model.

    "a photo of a cat on a mat"  ->  "a photo of something that is not a cat on a mat", "no cat in the picture"
    "a man is riding a horse"    ->  "a man is not riding a horse"
    "a red car"                  ->  "something that is not a red car", "no red car in the picture"
    "golden retriever"           ->  "no golden retriever in the picture"

Limits, by design: English only. Captions that deny already, questions, and captions of more than `MAX_WORDS` words give nothing;
nor do sentences whose verb is another than is, are, was and were ("a dog runs"): a rule that can't tell the verb makes nonsense.
What is denied is the picture's main thing: "no cat in the picture" is said of the words up to the first preposition or
conjunction. The rules don't look at the picture; they take the caption to be right.
"""

from __future__ import annotations

import re

MAX_WORDS = 40
_DENIES = re.compile(r"\b(?:no|not|never|none|nothing|nobody|without|neither|nor|cannot)\b|n['’]t\b|\?\s*$", re.IGNORECASE)
_FRAME = re.compile(
    r"^(?P<frame>(?:(?:an?|the|this|one)\s+)?(?:[\w-]+\s+){0,3}?"
    r"(?:photo|photograph|picture|image|drawing|painting|sketch|rendering|illustration|close-up|closeup|view|shot|icon|emoji|"
    r"logo|cartoon|print|portrait)\s+(?:of|showing|depicting))\s+(?P<thing>\S.*)$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"^(?P<subject>.+?\s)(?P<verb>is|are|was|were)\s(?P<rest>\S.*)$", re.IGNORECASE)
_ARTICLE = re.compile(
    r"^(?:an?|the|one|some|this|these|that|those|his|her|its|their|my|your|our|several|many|two|three|four|five)\s+",
    re.IGNORECASE,
)
_WEAK_ARTICLE = re.compile(r"^(?:an?|one|some)\s", re.IGNORECASE)
_HEAD_END = re.compile(
    r"\s*(?:[,;:.()]|\s(?:in|on|at|with|by|near|next|under|over|above|below|behind|beside|between|from|for|to|into|onto|and|or|"
    r"but|that|which|who|while|as|against|around|through|during|inside|outside|along|across|up|down|off|wearing|holding)\s).*$",
    re.IGNORECASE,
)
_FINITE = re.compile(r"\b(?:is|are|was|were|has|have|had|does|do|did|can|will|would|could|should|may|might)\b", re.IGNORECASE)
_BARE_WORDS = 3  # a caption without an article is taken as a name up to this length


def negations(caption: str) -> tuple[str, ...]:
    """Captions that are wrong where `caption` is right.

    Args:
        caption: an English caption or class name.

    Returns:
        None, one or two texts, the same ones each time; none where no rule is sure to apply.
    """
    text = " ".join(caption.split()).rstrip(" .!")
    if not text or len(text.split()) > MAX_WORDS or _DENIES.search(text):
        return ()
    frame = _FRAME.match(text)
    if frame is not None:
        thing = frame["thing"]
        if _FINITE.search(thing):
            return ()
        return f"{frame['frame']} something that is not {thing}", *_absence(thing)
    clause = _CLAUSE.match(text)
    if clause is not None:
        return (f"{clause['subject']}{clause['verb']} not {clause['rest']}",)
    if _FINITE.search(text):
        return ()
    if _WEAK_ARTICLE.match(text) and not _maybe_verb(text):
        return f"something that is not {text}", *_absence(text)
    if len(text.split()) <= _BARE_WORDS and not _ARTICLE.match(text) and not _maybe_verb(text):
        return _absence(text)
    return ()


def _absence(thing: str) -> tuple[str, ...]:
    """("no X in the picture",) for the main words of a thing."""
    head = _HEAD_END.sub("", f"{_ARTICLE.sub('', thing)} ").strip()
    return (f"no {head} in the picture",) if head else ()


def _maybe_verb(text: str) -> bool:
    """Whether there may be a verb before the first preposition: "a dog runs", "a girl smiles at a cat", "dogs run"."""
    head = _HEAD_END.sub("", f"{_ARTICLE.sub('', text)} ").split()
    return len(head) > 1 and any(word.endswith("s") and not word.endswith(("ss", "us", "is")) for word in head)
