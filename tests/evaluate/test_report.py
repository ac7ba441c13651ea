"""The report: whole in itself, complete, honest about what is missing, and safe with whatever a caption says."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import Retrieval, ZeroShot, embed_source, write_examples, write_report, write_results
from wordsight.evaluate.charts import Line, line_chart, short, smooth, ticks
from wordsight.evaluate.report import metric_name, percent

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'>{{ 7*7 }}{% raw %}</style>red"


class Page(HTMLParser):
    """Collects elements and attributes, and checks that what opens closes."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text: str) -> Page:
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            if attributes.get(name):
                assert str(attributes[name]).startswith(("data:image/webp;base64,", "#")), (tag, name, attributes[name])
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    return page


@pytest.fixture
def run_dir(tmp_path: Path, model: ColourModel) -> Path:
    """A run folder with everything in it, whose words are as hostile as words can be."""
    run = tmp_path / "my <b>run"
    run.mkdir()
    for split in ("toy-seen", "toy-unseen"):
        rows = []
        for i, colour in enumerate(list(COLOURS) * 3):
            (tmp_path / f"{split}-{i}.png").write_bytes(picture(COLOURS["blue" if i == 0 else colour], (20 + i, 40)))
            captions = [f"{colour} number {i}", HOSTILE if i == 0 else f"a {colour}"]
            rows.append(
                json.dumps({"path": f"{split}-{i}.png", "caption": captions, "label": HOSTILE if colour == "red" else colour})
            )
        (tmp_path / f"{split}-wild.png").write_bytes(picture(COLOURS["grey"]))
        rows.append(json.dumps({"path": f"{split}-wild.png", "caption": ["no label"]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        embedded = embed_source(model, tmp_path / f"{split}.jsonl")
        for evaluator in (ZeroShot(prompts="name"), Retrieval()):
            judgement = evaluator.judge(model, embedded)
            write_results(run, judgement.records("toys " + HOSTILE, split))
            write_examples(run, judgement, "toys " + HOSTILE, split, command=f"wordsight evaluate '{HOSTILE}' --data toys")
    lines = [{"step": s, "loss": 5 / s, "lr": 1e-3, "samples_per_s": 90.0} for s in range(1, 60)]
    lines += [{"step": 30, "loss": None, "skipped": True}, {"step": 59, f"zero_shot/{HOSTILE}/top1": 0.5, "a/b/median_rank": 3.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 60, "lo', encoding="utf-8")
    machine = {"processor": HOSTILE, "cores": 2, "gpu": None}
    start = {"step": 0, "command": ["wordsight", "train", "x"], "machine": machine, "versions": {"torch": "2.13"}, "git": None}
    (run / "environment.json").write_text(json.dumps({"starts": [start]}), encoding="utf-8")
    recipe = {"recipe": "quickstart", "set": ["seed=3", HOSTILE], "resolved": {"model": HOSTILE}}
    (run / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return run


def test_a_full_report_shows_everything_and_escapes_it(run_dir: Path) -> None:
    path = write_report(run_dir)
    text = path.read_text(encoding="utf-8")
    page = check_page(text)
    assert path == run_dir / "report.html"
    assert "{{ 7*7 }}" in text, "words are shown, not run as templates"
    assert text.count("<polyline") >= 5
    assert len([tag for tag, _ in page.tags if tag == "img"]) > 40
    for said in (
        "top-1 accuracy",
        "picture → text, R@5",
        "text → picture, median rank",
        "toy-unseen",
        "Seen against unseen",
        "Hits",
        "Misses",
        "Most confused classes",
        "wordsight train quickstart --run NEW_FOLDER --set seed=3",
        "torch",
        "1 pictures have no label",
    ):
        assert said in text, said
    assert 'class="card missing"' not in text
    assert re.search(r"default-src &#39;none&#39;|default-src 'none'", text)
    fingerprints = {record["fingerprint"] for record in json.loads((run_dir / "results.json").read_text())}
    assert all(one in text for one in fingerprints)
    assert write_report(run_dir).read_text(encoding="utf-8") == text, "the same folder gives the same bytes"


def test_a_report_says_what_is_missing(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text(encoding="utf-8")
    check_page(text)
    assert text.count('class="card missing"') == 5
    for name in ("results.json", "metrics.jsonl", "gallery.json", "environment.json", "recipe.json"):
        assert name in text
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("left_out", ["results.json", "metrics.jsonl", "gallery.json", "environment.json", "recipe.json"])
def test_each_part_can_be_missing(run_dir: Path, left_out: str) -> None:
    (run_dir / left_out).unlink()
    check_page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_gallery_shows_only_its_own_thumbnails(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.webp").write_bytes(b"secret")
    gallery = json.loads((run_dir / "gallery.json").read_text())
    gallery["sections"][0]["hits"][0]["file"] = "../../secret.webp"
    gallery["sections"][0]["hits"][1]["file"] = str(tmp_path / "secret.webp")
    gallery["sections"][0]["hits"][2]["file"] = "gone.webp"
    (run_dir / "gallery.json").write_text(json.dumps(gallery), encoding="utf-8")
    assert "c2VjcmV0" not in write_report(run_dir).read_text(encoding="utf-8")  # base64 of "secret"


def test_examples_are_even_deterministic_and_right(
    colour_folder: Callable[..., Path], model: ColourModel, tmp_path: Path
) -> None:
    root = colour_folder({"red": 30, "green": 2}, wrong=5)
    judgement = ZeroShot(classes=["blue", *sorted(["red", "green"])]).judge(model, root)
    path = write_examples(tmp_path / "run", judgement, "colours", "all", command="again")
    (section,) = json.loads(path.read_text())["sections"]
    assert (section["num_hits"], section["num_misses"]) == (27, 5)
    assert [one["answers"][0]["text"] for one in section["misses"]] == ["blue"] * 5
    assert all(one["is"] == ["red"] and not one["answers"][0]["right"] for one in section["misses"])
    assert all(one["answers"][0]["right"] for one in section["hits"])
    greens = next(word for word in section["words"] if word["text"] == "green")
    assert [one["right"] for one in greens["pictures"]][:2] == [True, True]
    assert [word["text"] for word in section["words"]] == ["green", "red"], "a class without pictures is not asked for"
    keys = [one["key"] for one in section["hits"]]
    assert keys == sorted(keys)
    before = path.read_bytes()
    (tmp_path / "run" / "gallery" / "0123.webp").write_bytes(b"left over")
    write_examples(tmp_path / "run", judgement, "colours", "all", command="again")
    assert path.read_bytes() == before
    assert not (tmp_path / "run" / "gallery" / "0123.webp").exists()
    names = {one["file"] for one in section["hits"] + section["misses"] + section["pictures"]}
    assert names <= {one.name for one in (tmp_path / "run" / "gallery").iterdir()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("top1", "top-1 accuracy"),
        ("text_to_image_R@5", "text → picture, R@5"),
        ("top1_1_shot", "top-1, 1 shot a class"),
        ("top1_16_shot", "top-1, 16 shots a class"),
        ("map_11_point", "mAP, 11-point"),
        ("trained_unseen_drawing_top1", "trained concepts, unseen drawing top-1"),
        ("imagenet_a_in_top1", "ImageNet-A, top-1 on ImageNet's pictures of its classes"),
        ("gaussian_noise_top1", "gaussian noise top-1"),
    ],
)
def test_metrics_have_names_for_people(name: str, said: str) -> None:
    assert metric_name(name) == said


def test_charts_survive_odd_curves() -> None:
    assert line_chart([], x_name="step", label="x") == ""
    assert line_chart([Line("a", [], [])], x_name="step", label="x") == ""
    flat = line_chart([Line("a <b>", [5], [3.0]), Line("c", [1, 2], [3.0, 3.0])], x_name="step", label='"quoted"')
    assert "nan" not in flat
    assert "<b>" not in flat
    long = line_chart([Line("a", range(100_000), [i**0.5 for i in range(100_000)])], x_name="step", label="x")
    assert len(long) < 20_000
    assert smooth([1.0] * 9, 4) == [1.0] * 9
    assert smooth([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [short(x) for x in (0, 12_000, 0.0005, 2_500_000, 0.25)] == ["0", "12k", "5e-4", "2.5M", "0.25"]
    assert [percent(x) for x in (0, 1, 0.5217, 0.0441, 0.0063, 0.0006)] == ["0.0%", "100.0%", "52.2%", "4.4%", "0.63%", "0.06%"]
