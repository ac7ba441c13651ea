"""Emoji of the embedded data: names, captions, the groups that the split keeps whole, and which groups are unseen.

What a concept and a group are stands at the top of `build.py`.
"""

import hashlib
import html
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from wordsight.sample.pictures import load_on_white, perceptual_hash, perceptual_matches, store

HOLD_OUT_ONE_IN, SPLIT_SALT = 7, "wordsight10"

_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_PEOPLE = {"1f468", "1f469", "1f9d1"}
_COLOURS = "red|orange|yellow|green|blue|light blue|purple|brown|black|white|grey|gray|pink"
_SAME_GROUP = [  # sets of code points that are one base in several genders, or one thing in several states
    {"1f385", "1f936", "role-1f384"},  # santa, mrs and mx claus
    {"1f934", "1f478", "1fac5"},  # prince, princess, person with crown
    {"1f483", "1f57a", "1f46f"},  # dancers
    {"1f930", "1fac3", "1fac4"},  # pregnant
    {"1f935", "1f470"},  # tuxedo, veil
    {"1f931", "role-1f37c"},  # feeding
    {"1f4eb", "1f4ea", "1f4ec", "1f4ed"},  # mailboxes
    {"1f508", "1f507", "1f509", "1f50a"},  # speakers
    {"1f30d", "1f30e", "1f30f"},  # globes
    {"1f947", "1f948", "1f949"},  # medals
    {"1f4d5", "1f4d7", "1f4d8", "1f4d9"},  # books
    {"1f448", "1f449", "1f446", "1f447"},  # pointing hands
    {"1f91b", "1f91c"},  # fists
    {"1faf1", "1faf2"},
    {"1f512", "1f513"},  # lock
    {"23f3", "231b"},  # hourglass
    {"1f319", "1f31b", "1f31c"},
]
_ALIAS = {member: min(group) for group in _SAME_GROUP for member in group}
_SKIN_TONE_NAMES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium dark skin tone",
    "1f3ff": "dark skin tone",
}


def group_of(codepoint: str, name: str, subcategory: str) -> str:
    """The group of a concept: see the top of `build.py`."""
    if subcategory in ("family", "person", "keycap", "skin-tone", "arrow"):
        return subcategory
    if re.search(r"o clock|thirty", name):
        return "clock-face"
    if "moon" in name and subcategory == "sky & weather":
        return "moon"
    if re.search(r"^sun behind|^cloud", name):
        return "sun-cloud"
    if subcategory == "heart" and re.fullmatch(rf"({_COLOURS}) heart", name):
        return "colour-heart"
    shape = re.search(rf"^(?:small |medium |large |medium small )?(?:{_COLOURS}) .*?(square|circle|diamond)", name)
    if subcategory == "geometric" and shape:
        return f"colour-{shape.group(1)}"
    if re.fullmatch(r"(up|down|left|right|upwards|downwards|fast|reverse).*button", name):
        return "arrow-button"
    parts = [p for p in codepoint.split("-") if p != "fe0f" and p not in _TONES]
    if "200d" in parts:
        parts = [p for p in parts if p not in ("200d", "2640", "2642", "27a1")]
        if parts[0] in _PEOPLE and len(parts) > 1:
            if parts[1].startswith("1f9b") and parts[1] <= "1f9b3":
                return "person"  # hair
            parts = ["role-" + "-".join(parts[1:])]
    if len(parts) == 1:
        base = re.sub(r"^(wo)?m[ae]n |^person ", "", name)
        if base != name and subcategory.startswith("person-"):
            return f"person-{_ALIAS.get(parts[0], parts[0])}"
        if subcategory.startswith("animal-") or subcategory in ("sky & weather", "monkey-face"):
            word = re.sub(r" face$", "", name)
            return f"animal-{word}"
        if subcategory.startswith("person-"):
            return f"person-{_ALIAS.get(parts[0], parts[0])}"
    joined = "-".join(parts)
    return _ALIAS.get(joined, joined)


def clean_words(text: str) -> str:
    """Lower case, ASCII letters, digits and single spaces only."""
    text = re.sub(r"['\u2019]s\b", "s", html.unescape(text).lower())
    text = text.translate(str.maketrans("áàâãäåçéèêëíîïñóôöøúûü", "aaaaaaceeeeiiinoooouuu"))
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9]+", " ", text)).strip()


def _emoji_names(row: dict, keywords: list[str]) -> str:
    codepoint = row["unified"].lower()
    if codepoint in _SKIN_TONE_NAMES:
        return _SKIN_TONE_NAMES[codepoint]
    if row["subcategory"] == "keycap":
        character = chr(int(codepoint.split("-")[0], 16))
        spelled = {"#": "hash", "*": "asterisk"}.get(character, character)
        return "keycap ten" if codepoint == "1f51f" else f"keycap {spelled}"
    name = clean_words(keywords[0] if keywords else row["name"] or row["short_name"])
    name = re.sub(r"^flag (?!in hole)(.*)$", r"\1 flag", name)
    return re.sub(r" (wo?man|man|person|boy|girl) s ", r" \1s ", name)


def read_concepts(folders: dict[str, Path]) -> list[dict]:
    """One record an emoji: codepoint, name, captions, group, category, and the path of each drawing that exists."""
    table = json.loads((folders["google"] / "emoji.json").read_text())
    library = json.loads((folders["emojilib"] / "dist" / "emoji-en-US.json").read_text())
    library = {key.replace("\ufe0f", ""): value for key, value in library.items()}
    fluent = {p.stem.replace("-fe0f", ""): p for p in (folders["fluent"] / "assets").glob("*.webp")}
    rows = sorted(table, key=lambda row: row["sort_order"])
    keywords_of = {
        row["unified"]: library.get("".join(chr(int(part, 16)) for part in row["unified"].split("-")).replace("\ufe0f", ""), [])
        for row in rows
    }
    first_names = {row["unified"]: _emoji_names(row, keywords_of[row["unified"]]) for row in rows}
    clashes = {name for name, count in Counter(first_names.values()).items() if count > 1}
    concepts, used = [], set()
    for row in rows:
        codepoint, keywords = row["unified"].lower(), keywords_of[row["unified"]]
        name = first_names[row["unified"]]
        if name in clashes and ("200d" not in codepoint or name in used):  # "man: beard" for the bearded person too
            others = [clean_words(t) for t in (*row["short_names"], row["name"] or "")]
            name = next(t for t in others if t not in used and t not in clashes)
        assert name not in used, f"two emoji named {name}"
        used.add(name)
        words = [clean_words(k) for k in keywords[1:]]
        words = [w for w in dict.fromkeys(words) if len(w) > 1 and w != name and w not in ("flag", "nation", "country", "banner")]
        aliases = [clean_words(s) for s in row["short_names"]]
        aliases = [a for a in aliases if len(a) > 2 and a != name and not a.startswith("flag ")][:2]
        paths = {
            "noto": folders["google"] / "img" / "google" / "64" / row["image"],
            "twemoji": folders["twitter"] / "img" / "twitter" / "64" / row["image"],
        }
        if codepoint.replace("-fe0f", "") in fluent:
            paths["fluent"] = fluent[codepoint.replace("-fe0f", "")]
        concepts.append(
            {
                "codepoint": codepoint,
                "name": name,
                "names": [name],
                "aliases": aliases,
                "keywords": words,
                "group": group_of(codepoint, name, row["subcategory"]),
                "category": clean_words(row["subcategory"]),
                "pictures": {vendor: store(load_on_white(path)) for vendor, path in paths.items() if path.exists()},
            }
        )
    return concepts


def merge_identical(concepts: list[dict]) -> list[dict]:
    """Concepts that one vendor draws with the same pixels become one concept; its other names become captions."""
    kept: list[dict] = []
    owner: dict[tuple[str, bytes], dict] = {}
    for concept in sorted(concepts, key=lambda c: -len(c["pictures"])):  # stable: the best-drawn keeps its name
        keys = [(v, picture.image.tobytes()) for v, picture in concept["pictures"].items()]
        first = next((owner[key] for key in keys if key in owner), None)
        if first is None:
            kept.append(concept)
            first = concept
        else:
            first["names"].append(concept["name"])
            first["keywords"] += [w for w in concept["keywords"] if w not in first["keywords"]]
        for key in keys:
            owner.setdefault(key, first)
    return kept


def merge_groups(concepts: list[dict]) -> None:
    """Join the groups of concepts that one vendor draws so alike that the perceptual hashes match (in place)."""
    parent = {c["group"]: c["group"] for c in concepts}

    def find(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for vendor in ("noto", "fluent", "twemoji"):
        have = [c for c in concepts if vendor in c["pictures"]]
        hashes = [perceptual_hash(c["pictures"][vendor].image) for c in have]
        for i, j in np.argwhere(np.triu(perceptual_matches(hashes, hashes), 1)):
            a, b = sorted((find(have[i]["group"]), find(have[j]["group"])))
            parent[b] = a
    for concept in concepts:
        concept["group"] = find(concept["group"])


def is_unseen(group: str) -> bool:
    """One group in HOLD_OUT_ONE_IN, by a hash of its name."""
    return int.from_bytes(hashlib.sha256(f"{SPLIT_SALT} {group}".encode()).digest()[:8], "big") % HOLD_OUT_ONE_IN == 0


def captions_of(concept: dict, banned: set[str]) -> list[str]:
    """The plain name first, then other names, then keywords in threes; none that is the name of an unseen concept."""
    words = [w for w in concept["keywords"] if w not in banned]
    lines = [*concept["names"], *[a for a in concept["aliases"] if a not in banned]]
    lines += [" ".join(words[i : i + 3]) for i in range(0, min(len(words), 9), 3)]
    return list(dict.fromkeys(line for line in lines if line))
