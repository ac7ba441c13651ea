"""Make the embedded sample data from registry packages: three drawings of the emoji, and a cleaned part of Openclipart.

    python -m wordsight.sample.build --raw DIR --out DIR

fetches the packages into `--raw` where they are missing (`npm pack`, `apt-get download`), and writes WebDataset shards,
`manifest.json`, `tokenizer.json`, `wordpiece.json` and `LICENSES/` to `--out`. The same packages give the same bytes.

How the data is split
---------------------
*Concept*: one emoji without skin tone; its plain name is its class. Concepts that a vendor draws pixel for pixel alike are
one concept with several names. *Group*: concepts that must not be separated by the split, because one would leak the
other: skin tones, genders and professions of one base, families and couples, clock faces, keycaps, colours of one shape,
turned arrows, and whatever a vendor draws so alike that the perceptual hashes match. One group in seven (by a hash of its
name) is *unseen*.

    train-noto, train-fluent      seen concepts in two drawings
    train-openclipart             clip art that names no unseen concept
    test-twemoji-seen             seen concepts in a drawing that is never trained on: the main test
    test-twemoji-unseen           unseen concepts in an unseen drawing
    unseen-noto, unseen-fluent    unseen concepts in drawings that were trained on

No picture outside training has a match, by bytes or by perceptual hash, in training: a training picture that matches is
left out, and a concept that loses all its training pictures so is in no test either.
"""

import argparse
import hashlib
import html
import io
import json
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NPM = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojilib": "emojilib@4.0.3",
}
DEB = ("openclipart-png", "openclipart-svg")
OPENCLIPART_VERSION = "1:0.18+dfsg-19"
SIZE_PX = 64
SHARD_SAMPLES = 1000
HOLD_OUT_ONE_IN, SPLIT_SALT = 7, "wordsight10"
VOCABULARY_SIZE = 4096
OPENCLIPART_MAX = 1400

# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(raw: Path) -> dict[str, Path]:
    """Make sure that every package lies unpacked under `raw`; return the folder of each."""
    raw.mkdir(parents=True, exist_ok=True)
    folders = {}
    for key, spec in NPM.items():
        stem = spec.lstrip("@").replace("/", "-").replace("@", "-")
        folder = raw / stem
        if not (folder / "package").is_dir():
            if not (raw / f"{stem}.tgz").exists():
                subprocess.run(["npm", "pack", "--silent", spec], cwd=raw, check=True)
            folder.mkdir(exist_ok=True)
            with tarfile.open(raw / f"{stem}.tgz") as archive:
                archive.extractall(folder, filter="data")
        folders[key] = folder / "package"
    for name in DEB:
        folder = raw / name
        if not folder.is_dir():
            if not list(raw.glob(f"{name}_*.deb")):
                subprocess.run(["apt-get", "download", name], cwd=raw, check=True)
            subprocess.run(["dpkg", "-x", str(sorted(raw.glob(f"{name}_*.deb"))[-1]), str(folder)], check=True)
        folders[name] = folder
    return folders


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def load_on_white(path: Path) -> Image.Image:
    """Read a picture, put it on white, and fit it into a SIZE_PX square without changing its shape."""
    with Image.open(path) as file:
        rgba = file.convert("RGBA")
    # Resized with premultiplied alpha (Pillow's mode RGBa), so that hidden colours do not bleed into the edge.
    scale = SIZE_PX / max(rgba.size)
    if scale != 1:
        size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        rgba = rgba.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE_PX, SIZE_PX), "white")
    canvas.alpha_composite(rgba, ((SIZE_PX - rgba.width) // 2, (SIZE_PX - rgba.height) // 2))
    return canvas.convert("RGB")


class Picture(NamedTuple):
    """A picture as it is stored: its file, and the pixels that the file decodes to."""

    image: Image.Image
    extension: str
    data: bytes


def store(image: Image.Image) -> Picture:
    """Encode as the smaller of lossless WebP and WebP at quality 90, and decode again."""
    choices = []
    for options in ({"lossless": True, "method": 4, "quality": 70}, {"method": 6, "quality": 90}):
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", **options)
        choices.append(buffer.getvalue())
    data = min(choices, key=len)
    return Picture(Image.open(io.BytesIO(data)).convert("RGB"), "webp", data)


def _dct_matrix(size: int, rows: int) -> np.ndarray:
    k, n = np.arange(rows)[:, None], np.arange(size)[None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * size))


def perceptual_hash(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprint of a picture: 63 signs of its DCT, and its colours on a coarse grid.

    Returns:
        signs: bool [63], the low 8 x 8 DCT coefficients of the 32 px luma against their median (the classic pHash).
        colours: float [4, 4, 3] in 0..255, mean colour of each cell. The signs alone cannot tell a red disc from a
            blue one, nor two simple shapes whose small coefficients are noise.
    """
    luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    dct = _dct_matrix(32, 8)
    coefficients = (dct @ luma @ dct.T).ravel()[1:]
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
    return coefficients > np.median(coefficients), colours


MAX_SIGNS, MAX_COLOUR = 8, 20.0


def perceptual_matches(queries: list, references: list) -> np.ndarray:
    """bool [Q, R]: at most MAX_SIGNS of the 63 signs differ, and no cell's colour by more than MAX_COLOUR of 255.

    `queries` and `references` are lists of `perceptual_hash` results.
    """
    if not queries or not references:
        return np.zeros((len(queries), len(references)), dtype=bool)
    q = np.stack([signs for signs, _ in queries]).astype(np.int32)
    r = np.stack([signs for signs, _ in references]).astype(np.int32)
    matches = q @ (1 - r).T + (1 - q) @ r.T <= MAX_SIGNS
    for i, j in np.argwhere(matches):
        matches[i, j] = np.abs(queries[i][1] - references[j][1]).max() <= MAX_COLOUR
    return matches


# ---------------------------------------------------------------------------------------------------------------------
# Emoji: names, captions and groups

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
    """The group of a concept: see the top of the file."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Openclipart

_SETS = re.compile(
    r"gramastar|flat icon|svg theme|etiquette|aiga|gradient|various|collection|iconset|theme|sibmission|clipart by|"
    r"r\d+ |sexy|nude|naked|pantyhose|nazi|cliparts?|road signs|unsorted|pack|sketch|untitled|logo|pattern|http|\.svg",
    re.I,
)
_FOREIGN = set(
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
    vocabulary = vocabulary | {w for w, n in common.items() if n >= 6 and w not in _FOREIGN}
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
        if any(w in _FOREIGN for w in words) or not title.isascii() or known < 0.6 * len(words):
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shard(path: Path, samples: list[dict]) -> None:
    """Write samples {key, picture, meta} as a tar whose bytes depend on nothing else."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in sorted(samples, key=lambda s: s["key"]):
            picture = sample["picture"]
            meta = json.dumps(sample["meta"], ensure_ascii=True, separators=(",", ":")).encode()
            for suffix, content in ((picture.extension, picture.data), ("json", meta)):
                info = tarfile.TarInfo(f"{sample['key']}.{suffix}")
                info.size, info.mode, info.mtime = len(content), 0o644, 0
                archive.addfile(info, io.BytesIO(content))


def train_wordpiece(captions: list[str], path: Path) -> None:
    """A WordPiece vocabulary with BERT's conventions: lower case, `##` before what goes on a word, [CLS] and [SEP]."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(special)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    captions = [tokenizer.normalizer.normalize_str(caption) for caption in captions]
    # Every character comes first, for the reason given in `train_tokenizer`.
    alphabet = sorted({character for caption in captions for character in caption if not character.isspace()})
    base = [*special, *alphabet, *[f"##{character}" for character in alphabet]]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=base, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(captions, trainer)
    model = models.WordPiece(tokenizer.get_vocab(with_added_tokens=True), unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(t, special.index(t)) for t in special[2:4]]
    )
    path.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


def train_tokenizer(captions: list[str], path: Path) -> None:
    """Byte-level BPE with CLIP's conventions: lower case, `</w>` at the end of a word, start and end of text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Every byte, alone and at the end of a word, comes first, so that no text is out of the vocabulary; given as special
    # tokens, because the trainer numbers what it finds by itself in an order that changes, and breaks ties by number.
    base = [*alphabet, *[character + "</w>" for character in alphabet]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        special_tokens=base,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(captions, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    ordered = [token for token, _ in sorted(state["model"]["vocab"].items(), key=lambda item: item[1])]
    assert ordered[: len(base)] == base
    ordered += [start, end]
    state["model"]["vocab"] = {token: index for index, token in enumerate(ordered)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ordered.index(start)), (end, ordered.index(end))]
    )
    path.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


_TWEMOJI_NOTICE = """The pictures of the shards test-twemoji-*.tar are Twemoji graphics, copyright 2019 Twitter, Inc and other
contributors (https://github.com/jdecked/twemoji, version 16.0.1), from the package emoji-datasource-twitter 16.0.0.
They are licensed under Creative Commons Attribution 4.0 International (CC-BY-4.0): https://creativecommons.org/licenses/by/4.0/legalcode
Changes: put on a white background and encoded as WebP. They come without warranty of any kind, as section 5 of the licence says.
"""


def write_licences(folders: dict[str, Path], out: Path) -> None:
    """Copy the licence texts that the packages and Debian's base system carry, with a notice where there is none."""
    out.mkdir(parents=True, exist_ok=True)
    mit = (folders["emojilib"] / "LICENSE").read_text()
    (out / "emojilib-MIT.txt").write_text(mit)
    (out / "emoji-datasource-MIT.txt").write_text((folders["google"] / "LICENSE").read_text())
    fluent = re.sub(r"Copyright \(c\).*", "Copyright (c) Microsoft Corporation", mit)
    (out / "fluent-emoji-MIT.txt").write_text(fluent)
    apache = Path("/usr/share/common-licenses/Apache-2.0").read_text()
    (out / "noto-emoji-Apache-2.0.txt").write_text(apache)
    (out / "twemoji-CC-BY-4.0.txt").write_text(_TWEMOJI_NOTICE)
    public_domain = folders["openclipart-png"] / "usr/share/doc/openclipart-png/copyright"
    (out / "openclipart-public-domain.txt").write_bytes(public_domain.read_bytes())


def build(raw: Path, out: Path) -> dict:
    """Build everything; return the manifest."""
    folders = fetch(raw)
    concepts = merge_identical(read_concepts(folders))
    merge_groups(concepts)
    unseen = [c for c in concepts if is_unseen(c["group"])]
    seen = [c for c in concepts if not is_unseen(c["group"])]
    banned = {name for c in unseen for name in c["names"] + c["aliases"]} - {name for c in seen for name in c["names"]}

    words = {w for c in concepts for t in c["names"] + c["keywords"] for w in clean_words(t).split()}
    clipart, dropped = read_openclipart(folders, words - _FOREIGN, unseen_phrases(unseen))

    # Held-out pictures, and the training pictures that look like one of them.
    held = [c["pictures"][v].image for c in unseen for v in c["pictures"]] + [c["pictures"]["twemoji"].image for c in seen]
    held_hashes, held_bytes = [perceptual_hash(i) for i in held], {i.tobytes() for i in held}

    def leaks(images: list[Image.Image]) -> list[bool]:
        close = np.any(perceptual_matches([perceptual_hash(i) for i in images], held_hashes), axis=1)
        return [bool(c) or i.tobytes() in held_bytes for c, i in zip(np.atleast_1d(close), images, strict=True)]

    removed = []
    for vendor in ("noto", "fluent"):
        have = [c for c in seen if vendor in c["pictures"]]
        for concept, leak in zip(have, leaks([c["pictures"][vendor].image for c in have]), strict=True):
            if leak:
                removed.append(f"{vendor} {concept['name']}")
                del concept["pictures"][vendor]
    alike = leaks([r["picture"].image for r in clipart])
    dropped["looks like a held-out picture"] = sum(alike)
    clipart = [r for r, bad in zip(clipart, alike, strict=True) if not bad]
    if len(clipart) > OPENCLIPART_MAX:  # a fixed pseudo-random part
        clipart.sort(key=lambda r: hashlib.sha256(r["key"].encode()).digest())
        dropped["over the size budget"] = len(clipart) - OPENCLIPART_MAX
        clipart = clipart[:OPENCLIPART_MAX]
    trained = [c for c in seen if "noto" in c["pictures"] or "fluent" in c["pictures"]]

    shards: dict[str, list[dict]] = defaultdict(list)
    for concepts_of, is_seen in ((trained, True), (unseen, False)):
        for concept in concepts_of:
            for vendor, picture in concept["pictures"].items():
                if vendor == "twemoji":
                    split = "test-seen" if is_seen else "test-unseen"
                    stem = f"test-twemoji-{'seen' if is_seen else 'unseen'}"
                else:
                    split = "train" if is_seen else "unseen"
                    stem = f"{split}-{vendor}"
                meta = {
                    "captions": captions_of(concept, banned if is_seen else set()),
                    "label": concept["name"],
                    "group": concept["group"],
                    "source": vendor,
                    "codepoint": concept["codepoint"],
                    "split": split,
                }
                key = f"{vendor}_{concept['codepoint']}"
                shards[stem].append({"key": key, "picture": picture, "meta": meta})
    for record in clipart:
        allowed = [k for k in record["keywords"] if k not in banned]
        captions = [record["name"], *[" ".join(allowed[i : i + 3]) for i in range(0, len(allowed), 3)]]
        meta = {
            "captions": list(dict.fromkeys(captions)),
            "label": record["name"],
            "group": f"openclipart/{record['folder']}",
            "source": "openclipart",
            "codepoint": None,
            "split": "train",
        }
        shards["train-openclipart"].append({"key": record["key"], "picture": record["picture"], "meta": meta})

    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.tar"):
        old.unlink()
    files = {}
    for stem in sorted(shards):
        samples = sorted(shards[stem], key=lambda s: s["key"])
        for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
            part = samples[start : start + SHARD_SAMPLES]
            path = out / f"{stem}-{number:02d}.tar"
            write_shard(path, part)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[path.name] = {"split": part[0]["meta"]["split"], "samples": len(part), "sha256": digest}
    groups: dict[str, list[str]] = defaultdict(list)
    for concept in unseen:
        groups[concept["group"]].append(concept["name"])
    manifest = {
        "size_px": SIZE_PX,
        "packages": [*NPM.values(), *[f"{name} {OPENCLIPART_VERSION}" for name in DEB]],
        "files": files,
        "classes": {"seen": sorted(c["name"] for c in trained), "unseen": sorted(c["name"] for c in unseen)},
        "unseen_groups": {group: sorted(names) for group, names in sorted(groups.items())},
        "unseen_phrases": [p.strip() for p in unseen_phrases(unseen)],
        "left_out_of_train_as_too_like_a_held_out_picture": sorted(removed),
        "openclipart_left_out": dict(sorted(dropped.items())),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    train = [s["meta"]["captions"] for stem in sorted(shards) if stem.startswith("train") for s in shards[stem]]
    train_tokenizer([caption for captions in train for caption in captions], out / "tokenizer.json")
    train_wordpiece([caption for captions in train for caption in captions], out / "wordpiece.json")
    write_licences(folders, out / "LICENSES")
    return manifest


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description="Make the embedded sample data from registry packages.")
    parser.add_argument("--raw", type=Path, required=True, help="folder for the fetched packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the shards")
    arguments = parser.parse_args()
    manifest = build(arguments.raw, arguments.out)
    for name, entry in manifest["files"].items():
        print(f"{entry['samples']:6d}  {name}")
    print({kind: len(names) for kind, names in manifest["classes"].items()})
    print(manifest["openclipart_left_out"])


if __name__ == "__main__":
    main()
