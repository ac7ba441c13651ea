"""The tokenizer equals open_clip's and transformers', token by token, and its files survive a round trip."""

import copy
import html
import json
import pickle
import random
import string

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.data import tokenize as tokenize_module
from wordsight.data.tokenize import ClipTokenizer, train_tokenizer

WORDS = """
    a an the of in on with and photo picture drawing cat dog kitten black white running through tall grass near river café naïve
    don't it's we'll they're I'd I'm you've 3D 2024 1,000,000 km/h C++ e-mail U.S.A. rock'n'roll
    antidisestablishmentarianism""".split()
FOREIGN = [
    "一只猫坐在垫子上",
    "東京タワーの写真",
    "고양이 사진",
    "صورة قطة تجلس على الأرض",
    "חתול שחור",
    "Кошка сидит на ковре",
    "ΟΔΥΣΣΕΥΣ ς ΣΑΣ",
    "भारत का झंडा",
    "ภาพถ่ายของแมว",
    "İstanbul ıŞIK",
    "STRASSE straße ẞ",
    "ﬁne ﬂuﬀy ﬆ",
    "ＦＵＬＬ ｗｉｄｔｈ",
    "e\u0301cole e\u0301",
    "𝒜𝓃 𝕠𝕕𝕕 𝔣𝔬𝔫𝔱",
    "½ ¾ Ⅳ ² ①",
]
EMOJI = ["🤗", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "😀😀😀", "#️⃣", "🫠", "\U0001fae8"]
MARKUP = [
    "&amp;",
    "&lt;b&gt;",
    "&amp;amp;lt;",
    "&eacute;",
    "&#128512;",
    "&#x1F600;",
    "&nbsp;",
    "&nosuch;",
    "&",
    "AT&T",
    "<b>bold &amp; </b>",
    "&#0;",
    "&#xD800;",
    "e&#769;",
    "&amp;#x27;s",
    "&gt&lt",
    "&NotEqualTilde;",
]
CONTROL = [
    "\x00",
    "\x07bell",
    "a\tb",
    "line\nline",
    "\r\n",
    "\x1b[31mred\x1b[0m",
    "\x1c",
    "\x1f",
    "\x7f",
    "\x85",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u202e",
    "\u2028",
    "\u3000",
    "\xa0",
]
MOJIBAKE = ["schÃ¶n", "âœ” done", "l’humanitÃ©", "“quoted” ‘text’", "Ã¢Â€Â™", "caf\u00c3\u00a9", "\ufffd"]
SPECIALS = [
    "<start_of_text>",
    "<end_of_text>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<END_OF_TEXT>",
    "<|EndOfText|>",
    "x<end_of_text>",
    "!<end_of_text>",
    "<end_of_text>y",
    "<ſtart_of_text>",
    "'ſ",
    "'S",
    "'LL",
    "a'ſb",
    "'\u212a",
    "<|endoftext|>abc",
    "!<|endoftext|>",
]


def hard_strings(count: int) -> list[str]:
    """Strings that have broken tokenizers: each kind alone, and mixtures of all kinds."""
    rng = random.Random(0)
    kinds = [WORDS, FOREIGN, EMOJI, MARKUP, CONTROL, MOJIBAKE, SPECIALS]
    strings = [
        "",
        " ",
        "\n",
        "a",
        "word " * 10_000,
        "x" * 3000,
        "é" * 3000,
        "!" * 500,
        "1234567890" * 40,
        *(s for kind in kinds for s in kind),
    ]
    while len(strings) < count:
        shape = rng.random()
        if shape < 0.4:  # captions
            words = [rng.choice(WORDS) for _ in range(rng.randint(1, 30))]
            strings.append(rng.choice([str, str.upper, str.title])(" ".join(words)) + rng.choice(["", ".", "!!!", " ...", "?"]))
        elif shape < 0.7:  # mixtures, with and without blanks between
            parts = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 12))]
            strings.append(rng.choice(["", " ", "  ", "-"]).join(parts))
        elif shape < 0.85:  # noise over ASCII
            strings.append("".join(rng.choice(string.printable) for _ in range(rng.randint(1, 60))))
        else:  # noise over Unicode
            ranges = [rng.choice([(0, 0x2FF), (0, 0x2FFFF), (0x1F000, 0x1FAFF)]) for _ in range(rng.randint(1, 25))]
            points = [rng.randint(*bounds) for bounds in ranges]
            strings.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return strings


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer.clip()


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def huggingface(tokenizer, tmp_path_factory):
    """transformers' tokenizer from the vocabulary and merges in open_clip's file, written here: none of our files is used."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    reference = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder = tmp_path_factory.mktemp("huggingface")
    vocab = {names.get(token, token): i for token, i in reference.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in reference.bpe_ranks)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def test_equals_open_clip_on_10000_strings(tokenizer, open_clip_tokenizer):
    strings = hard_strings(10_000)
    ours, theirs = tokenizer(strings), open_clip_tokenizer(strings)
    assert ours.dtype == theirs.dtype
    differing = [strings[i] for i in (ours != theirs).any(dim=1).nonzero().flatten().tolist()]
    assert not differing, differing[:5]
    for text in strings[::40]:
        assert tokenizer.encode(text[:2000]) == open_clip_tokenizer.encode(text[:2000]), text


def test_equals_transformers_on_10000_strings(huggingface):
    tokenizer = ClipTokenizer.clip(clean="huggingface", pad_id=49407)
    strings = hard_strings(10_000)
    theirs = torch.tensor(huggingface(strings, padding="max_length", truncation=True, max_length=77).input_ids)
    ours = tokenizer(strings)
    differing = [strings[i] for i in (ours != theirs).any(dim=1).nonzero().flatten().tolist()]
    assert not differing, differing[:5]


def test_the_two_cleanings_differ_where_they_should(tokenizer, open_clip_tokenizer, huggingface):
    text = "caf\u00c3\u00a9 &amp; bar <end_of_text>"  # mojibake, an entity, open_clip's own special token
    literal = ClipTokenizer.clip(clean="huggingface")
    assert tokenizer.encode(text) == open_clip_tokenizer.encode(text)
    assert literal.encode(text) == huggingface(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text) != literal.encode(text)


def test_every_character_is_split_as_open_clip_splits_it(open_clip_tokenizer):
    """Letters, digits and everything else, over all of Unicode: the classes of the pattern, without the merges."""
    reference = open_clip_tokenizer.pat
    for start in range(0, 0x110000, 0x800):
        if 0xD800 <= start < 0xE000:
            continue
        for point in range(start, start + 0x800, 1 if start < 0x3400 or 0x1E000 <= start < 0x20000 else 37):
            for word in f"a{chr(point)}b1 '{chr(point)}".lower().split():
                assert tokenize_module._pieces(word) == reference.findall(word), hex(point)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_equals_open_clip_on_any_text(text):
    reference = _reference()
    assert ClipTokenizerCache.get().encode(text) == reference.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=9, max_codepoint=126, exclude_characters="&"), max_size=60))
def test_plain_ascii_needs_no_mending(text):
    """The premise of the fast path: ftfy and html leave plain ASCII lines as they are, but for white space."""
    if tokenize_module._is_plain_lines(text):
        assert html.unescape(ftfy.fix_text(text)).split() == text.split()


class ClipTokenizerCache:
    """One tokenizer for hypothesis, which takes no module fixtures well."""

    made = None

    @classmethod
    def get(cls) -> ClipTokenizer:
        cls.made = cls.made or ClipTokenizer.clip()
        return cls.made


def _reference():
    from open_clip.tokenizer import SimpleTokenizer

    if not hasattr(_reference, "made"):
        _reference.made = SimpleTokenizer()
    return _reference.made


def test_rows_start_end_and_pad(tokenizer):
    rows = tokenizer(["a photo of a cat", "", "word " * 10_000])
    assert rows.shape == (3, 77)
    assert rows[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert rows[1].tolist() == [49406, 49407] + [0] * 75
    assert rows[2, 0] == 49406
    assert rows[2, -1] == 49407
    assert (rows.argmax(dim=1) == torch.tensor([6, 1, 76])).all()
    assert tokenizer("a photo of a cat").tolist() == rows[:1].tolist()
    assert tokenizer([]).shape == (0, 77)


@pytest.mark.parametrize("length", [2, 3, 16])
def test_another_context_length(length, open_clip_tokenizer):
    texts = ["a photo of a cat", "", "cat " * 50]
    assert torch.equal(ClipTokenizer.clip(length)(texts), open_clip_tokenizer(texts, context_length=length))


def test_decode_gives_the_words_back(tokenizer):
    text = "a photo of a café 🤗 , 2024"
    assert tokenizer.decode(tokenizer.encode(text)) == "a photo of a café 🤗 , 2 0 2 4"
    assert tokenizer.decode(tokenizer(["two cats"])[0].tolist()) == "two cats"
    with pytest.raises(ValueError, match="49408"):
        tokenizer.decode([70_000])


def test_the_cache_of_words_stays_bounded(tokenizer, monkeypatch):
    small = ClipTokenizer.clip()
    monkeypatch.setattr(tokenize_module, "_MAX_CACHED_WORDS", 10)
    texts = [f"word{i} {'long' * 40}{i} cat" for i in range(50)]
    assert torch.equal(small(texts), tokenizer(texts))
    assert len(small._words) <= 10
    assert max(map(len, small._words)) <= tokenize_module._MAX_CACHED_CHARACTERS


@pytest.mark.parametrize("clean", ["open_clip", "huggingface"])
def test_save_and_load(tmp_path, clean):
    tokenizer = ClipTokenizer.clip(32, clean=clean, pad_id=5)
    path = tokenizer.save(tmp_path)
    strings = hard_strings(500)
    for source in (path, tmp_path):
        again = ClipTokenizer.from_file(source, 32)
        assert again.to_config() == tokenizer.to_config()
        assert torch.equal(again(strings), tokenizer(strings))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_pickle_and_deepcopy(tokenizer):
    texts = ["a photo of a cat", "Кошка 🤗"]
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts), tokenizer(texts))
    assert copy.deepcopy(tokenizer) is tokenizer


def test_transformers_loads_what_is_written_for_it(tmp_path, huggingface):
    from transformers import AutoTokenizer, CLIPTokenizer

    ClipTokenizer.clip(clean="huggingface").save_huggingface(tmp_path)
    strings = hard_strings(500)
    expected = huggingface(strings, padding="max_length", truncation=True, max_length=77).input_ids
    for loader in (CLIPTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.model_max_length == 77
        assert loaded(strings, padding="max_length", truncation=True).input_ids == expected
    # and back, by the files that older versions of transformers write too
    (tmp_path / "tokenizer.json").unlink()
    again = ClipTokenizer.from_file(tmp_path, pad_id=49407)
    assert again.clean == "huggingface"
    assert again(strings).tolist() == expected


def test_our_saved_file_gives_transformers_the_same_ids_on_clean_text(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    texts = ["A photo of a cat.", "Two dogs, it's raining!", "東京タワーの写真", "cat " * 100]
    assert [engine.encode(text).ids for text in texts] == tokenizer(texts).tolist()


def test_train_tokenizer():
    texts = ["a photo of a cat", "a photo of a dog", "the cat's hat", "naïve café 🤗"] * 5
    tokenizer = train_tokenizer(texts, 535, context_length=16)
    assert tokenizer.vocab_size == 535
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (533, 534, 0)
    rows = tokenizer([*texts, "unseen wörds 東京 too", ""])
    assert (rows == 534).any(dim=1).all()
    assert tokenizer.decode(rows[0].tolist()) == "a photo of a cat"
    assert tokenizer.decode(tokenizer.encode("unseen wörds 東京 too")) == "unseen wörds 東京 too"
    assert len(tokenizer.encode("photo")) < 5  # something was merged
    assert torch.equal(train_tokenizer(texts, 535, context_length=16)(texts), tokenizer(texts))  # the same again
    few = train_tokenizer(["ab ab"], 5000)
    assert few.vocab_size == 515  # one pair to merge
    assert few.end_id == 514


def test_a_trained_tokenizer_merges_as_open_clips_code_would(tmp_path):
    """open_clip's own merging loop over our vocabulary gives our ids."""
    from open_clip.tokenizer import SimpleTokenizer

    texts = [text for text in hard_strings(600) if len(text) < 500]
    ours = train_tokenizer(texts, 900)
    model = json.loads(ours.engine().to_str())["model"]
    reference = SimpleTokenizer()
    reference.encoder = {t: i for t, i in model["vocab"].items()} | {
        "<start_of_text>": ours.start_id,
        "<end_of_text>": ours.end_id,
    }
    reference.bpe_ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    for text in texts:
        assert ours.encode(text) == reference.encode(text), text


def test_errors_say_what_to_do(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="clean must be one of open_clip, huggingface, got 'lower'"):
        ClipTokenizer.clip(clean="lower")
    with pytest.raises(ValueError, match="at least 2"):
        ClipTokenizer.clip(1)
    with pytest.raises(ValueError, match="pad_id"):
        ClipTokenizer.clip(pad_id=49408)
    with pytest.raises(ValueError, match="at least 514"):
        train_tokenizer(["a"], 513)
    with pytest.raises(ValueError, match="takes strings, got int: 3"):
        tokenizer(["a", 3])
    with pytest.raises(ValueError, match=r"has no <\|startoftext\|> and no <\|endoftext\|>"):
        ClipTokenizer({"a": 0}, [])
    with pytest.raises(ValueError, match="must be the highest"):
        ClipTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}, [])
    with pytest.raises(FileNotFoundError):
        ClipTokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    with pytest.raises(ValueError, match="not a CLIP tokenizer"):
        ClipTokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(ValueError, match="not a JSON file"):
        ClipTokenizer.from_file(tmp_path / "tokenizer.json")


def test_reads_what_transformers_saves(tmp_path, huggingface):
    huggingface.save_pretrained(tmp_path)
    ours = ClipTokenizer.from_file(tmp_path)
    assert ours.clean == "huggingface"
    text = "caf\u00c3\u00a9 <|endoftext|> Two dogs &amp; 🤗"
    assert ours.encode(text) == huggingface(text, add_special_tokens=False).input_ids
