"""Files of the embedded data: shards, tokenizers and licence texts whose bytes depend on nothing but what goes in."""

import io
import json
import re
import tarfile
from pathlib import Path

VOCABULARY_SIZE = 4096


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
