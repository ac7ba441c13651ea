"""Openclipart in the embedded data: plain English titles, no icon sets, and nothing that names an unseen concept."""

import html
import re
from collections import Counter
from pathlib import Path

import numpy as np

from wordsight.sample.emoji import clean_words
from wordsight.sample.pictures import load_on_white, store

_SETS = re.compile(
    r"gramastar|flat icon|svg theme|etiquette|aiga|gradient|various|collection|iconset|theme|sibmission|clipart by|"
    r"r\d+ |sexy|nude|naked|pantyhose|nazi|cliparts?|road signs|unsorted|pack|sketch|untitled|logo|pattern|http|\.svg",
    re.I,
)
FOREIGN = set(
    "di del della dei delle degli con il lo gli una un uno per nel sul ed e la le les des du et un une au aux avec sur "
    "de los las el para por y en da do dos das com o os um uma em no na der die das und mit von ein eine den".split()
)
_FILLER = {"hash", "unsorted", "special", "icon", "icons", "theme", "simple", "bordered", "symbol", "sign", "shape", "mapsym"}
_FILLER |= {"sexy", "signs and symbols"}


def _singular(word: str) -> str:
    for plural, single in (("ies", "y"), ("oes", "o"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ss", "ss"), ("s", "")):
        if len(word) > 3 and word.endswith(plural):
            return word.removesuffix(plural) + single
    return word


def phrase_of(text: str) -> str:
    """A normalised phrase with spaces at both ends, for looking up whole words in whole words."""
    return " " + " ".join(_singular(word) for word in clean_words(text).split()) + " "


def unseen_phrases(unseen: list[dict]) -> list[str]:
    """What names an unseen concept: its names, and those without gender, "face", "button", "flag" and the like."""
    phrases = set()
    for concept in unseen:
        for name in concept["names"] + concept["aliases"]:
            name = clean_words(name)
            core = re.sub(r"\b(wo)?m[ae]n\b|\bperson\b|\bface\b|\bbutton\b|\bflag\b|\bsymbol\b", " ", name)
            for text in (name, core):
                text = phrase_of(text)
                if len(text.strip()) > 2 or text.strip() == phrase_of(name).strip():
                    phrases.add(text)
    return sorted(phrases)


def read_openclipart(folders: dict[str, Path], vocabulary: set[str], phrases: list[str]) -> tuple[list[dict], Counter]:
    """Cleaned records {name, keywords, picture, key, folder}, and how many were left out for which reason."""
    svg_root = folders["openclipart-svg"] / "usr/share/openclipart/svg"
    png_root = folders["openclipart-png"] / "usr/share/openclipart/png"
    rows = []
    for path in sorted(svg_root.rglob("*.svg")):
        png = png_root / path.relative_to(svg_root).with_suffix(".png")
        block = re.search(rb"<metadata.*?</metadata>", path.read_bytes(), re.S)
        if block is None or not png.exists():
            continue
        text = block.group(0).decode("utf-8", "replace")
        found = re.search(r"<dc:title>(.*?)</dc:title>", text, re.S)
        keywords = [html.unescape(k).strip() for k in re.findall(r"<rdf:li>(.*?)</rdf:li>", text, re.S)]
        rows.append((png, html.unescape(found.group(1)).strip() if found else "", keywords))
    dropped: Counter[str] = Counter()
    repeats = Counter(clean_words(title) for _, title, _ in rows)
    common = Counter(w for _, _, keywords in rows for k in keywords for w in clean_words(k).split())
    vocabulary = vocabulary | {w for w, n in common.items() if n >= 6 and w not in FOREIGN}
    records, seen_bytes = [], set()
    per_name: Counter[str] = Counter()
    for png, title, keywords in rows:
        folder = png.relative_to(png_root).parent.as_posix()
        name = re.sub(r"\b\d+[a-z]?\b", " ", clean_words(re.sub(r"(?<=[a-zA-Z])\d+\b", " ", title)))
        name = re.sub(r"\s+", " ", name).strip()
        words = name.split()
        if folder.startswith(("special", "computer/icons", "shapes", "unsorted")) or _SETS.search(title):
            dropped["icon sets, shapes and unnamed collections"] += 1
            continue
        if not words or len(name) < 3 or len(words) > 7 or repeats[clean_words(title)] > 15:
            dropped["no title of its own"] += 1
            continue
        known = sum(w in vocabulary or _singular(w) in vocabulary for w in words)
        if any(w in FOREIGN for w in words) or not title.isascii() or known < 0.6 * len(words):
            dropped["not plain English"] += 1
            continue
        keywords = [clean_words(k) for k in keywords if "hash" not in k.lower()]
        keywords = [k for k in dict.fromkeys(keywords) if 2 < len(k) < 30 and k not in _FILLER and k != name]
        keywords = [k for k in keywords if all(w in vocabulary or _singular(w) in vocabulary for w in k.split())]
        text = "|".join(phrase_of(t) for t in [title, name, *keywords])
        if any(phrase in text for phrase in phrases):
            dropped["names an unseen concept"] += 1
            continue
        with png.open("rb") as file:  # width and height stand in the header; some are of hundreds of megapixels
            header = file.read(24)
        if int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big") > 4_000_000:
            dropped["over 4 megapixels"] += 1
            continue
        picture = store(load_on_white(png))
        image = picture.image
        if image.tobytes() in seen_bytes:
            dropped["the same picture again"] += 1
            continue
        pixels = np.asarray(image, dtype=np.float32)
        if pixels.std() < 18 or (pixels.min(-1) < 245).mean() < 0.04:
            dropped["almost blank"] += 1
            continue
        if per_name[name] >= 4:
            dropped["more than four of one title"] += 1
            continue
        seen_bytes.add(image.tobytes())
        per_name[name] += 1
        key = clean_words(png.relative_to(png_root).with_suffix("").as_posix()).replace(" ", "_")
        records.append(
            {"name": name, "keywords": keywords[:6], "picture": picture, "key": f"openclipart_{key}", "folder": folder}
        )
    return records, dropped
