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
import json
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from wordsight.sample.emoji import captions_of, clean_words, is_unseen, merge_groups, merge_identical, read_concepts
from wordsight.sample.openclipart import FOREIGN, read_openclipart, unseen_phrases
from wordsight.sample.pictures import SIZE_PX, perceptual_hash, perceptual_matches
from wordsight.sample.writing import train_tokenizer, train_wordpiece, write_licences, write_shard

NPM = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojilib": "emojilib@4.0.3",
}
DEB = ("openclipart-png", "openclipart-svg")
OPENCLIPART_VERSION = "1:0.18+dfsg-19"
SHARD_SAMPLES = 1000
OPENCLIPART_MAX = 1400


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


def build(raw: Path, out: Path) -> dict:
    """Build everything; return the manifest."""
    folders = fetch(raw)
    concepts = merge_identical(read_concepts(folders))
    merge_groups(concepts)
    unseen = [c for c in concepts if is_unseen(c["group"])]
    seen = [c for c in concepts if not is_unseen(c["group"])]
    banned = {name for c in unseen for name in c["names"] + c["aliases"]} - {name for c in seen for name in c["names"]}

    words = {w for c in concepts for t in c["names"] + c["keywords"] for w in clean_words(t).split()}
    clipart, dropped = read_openclipart(folders, words - FOREIGN, unseen_phrases(unseen))

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
