"""`wordsight data stats|check|build`: figures that are right, damage that is named, shards that are the same again."""

import io
import json
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from wordsight.cli.main import cli
from wordsight.data import open_source
from wordsight.data.decode import decode


def data(*arguments, code=0):
    result = CliRunner().invoke(cli, ["data", *map(str, arguments)], standalone_mode=False)
    found = result.return_value if result.exception is None else getattr(result.exception, "exit_code", 1)
    assert (found or 0) == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures of 50 x (30 + i) px with a table of captions; 03 is no picture, 05 is cut off, 08 is the same file as 07."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["path\tcaption\ttitle\tlabel\tplace"]
    for i in range(20):
        path = folder / f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path.name}\tone two three {i}\t{'word ' * 90 if i == 0 else 'same title'}\t{'ab'[i % 2]}\there")
    (folder / "03.png").write_bytes(b"nothing at all")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:2000])
    (folder / "08.png").write_bytes((folder / "07.png").read_bytes())
    (folder / "table.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_stats_counts_rightly(folder, tmp_path):
    result = data("stats", folder / "table.tsv", "--json", "--sheet", tmp_path / "deep" / "sheet.png")
    found = json.loads(result.stdout)
    assert (found["size"], found["samples"], found["readable"]) == (20, 20, 19)
    assert found["formats"] == {"PNG": 19}
    assert found["width_px"] == dict.fromkeys(["min", "p5", "p25", "p50", "p75", "p95", "max"], 50.0)
    heights = [30 + i for i in range(20) if i not in (3, 8)] + [37]
    assert found["height_px"]["min"] == 30
    assert found["height_px"]["p50"] == np.median(heights)
    assert found["aspect"]["max"] == pytest.approx(50 / 30, abs=1e-4)
    assert found["bytes"] == sum((folder / f"{i:02}.png").stat().st_size for i in range(20) if i != 3)
    assert found["captions"] == 38
    assert found["captions_per_sample"]["min"] == 2
    assert found["caption_words"]["max"] == 90
    assert found["cut_captions"] == 1
    assert found["repeated_captions"] == 17  # "same title" 18 times
    histogram = found["caption_tokens_histogram"]
    assert sum(histogram.values()) == 38
    assert histogram["more"] == 1
    assert histogram["5"] == 37  # "one two three 12" has five tokens: digits stand alone
    assert found["labels"] == {"a": 10, "b": 9}
    assert found["duplicates"] == [{"name": "08.png", "first": "07.png"}]
    assert [one["name"] for one in found["bad"]] == ["03.png"]
    assert "no picture" in found["bad"][0]["reason"]
    sheet = Image.open(tmp_path / "deep" / "sheet.png")
    assert sheet.size[0] > 8 * 128
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=2)
    assert red.any()  # the bad ones are crossed out


def test_stats_for_people_and_a_part(folder):
    shown = data("stats", folder / "table.tsv", "--caption-column", "caption").stdout
    for words in (
        "20 samples: 19 PNG",
        "height, px",
        "2 labels: a (10), b (9)",
        "08.png = 07.png",
        "03.png: is no picture",
        "Bad samples: 1",
    ):
        assert words in shown, shown
    part = json.loads(data("stats", folder / "table.tsv", "--limit", "5", "--json").stdout)
    assert (part["size"], part["samples"]) == (20, 5)
    assert "20 samples, 5 of them looked at" in data("stats", folder / "table.tsv", "--limit", "5").stdout


def test_check_finds_what_a_header_does_not_tell(folder):
    result = data("check", folder, "--json", code=1)  # 2 of 20 is more than 5%
    found = json.loads(result.stdout)
    assert [one["name"] for one in found["bad"]] == ["03.png", "05.png"]
    assert found["bad_share"] == 0.1
    assert found["ok"] is False
    shown = data("check", folder, "--max-bad-share", "0.1", "--workers", "1").stdout
    assert "05.png: " in shown
    assert "20 samples, 2 bad (10.00%, 10.0% allowed)" in shown


def test_check_counts_what_indexing_found(folder, tmp_path):
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.png", "b.png"):
            content = (folder / "00.png").read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard.write_bytes(shard.read_bytes()[: -(len(shard.read_bytes()) - 512 - len(content) - 2000)])
    result = data("check", shard, "--json", code=1)
    assert any("b.png" in one["name"] for one in json.loads(result.stdout)["bad"])


def test_build_round_trip_keeps_everything(folder, tmp_path):
    result = data(
        "build", folder / "table.tsv", "--out", tmp_path / "shards", "--shard-size", "7", "--max-bad-share", "0.2", "--json"
    )
    found = json.loads(result.stdout)
    assert found["samples"] == 18
    assert found["shards"] == [f"shard-{i:05d}.tar" for i in range(3)]
    assert sorted(one["name"] for one in found["bad"]) == ["03.png", "05.png"]
    before, after = open_source(folder / "table.tsv"), open_source(tmp_path / "shards")
    kept = [before[i] for i in range(20) if i not in (3, 5)]
    assert len(after) == 18
    for old, new in zip(kept, (after[i] for i in range(18)), strict=True):
        assert new.image == old.image
        assert new.captions == old.captions
        assert new.label == old.label
        assert new.meta["source"] == old.key
        assert {key: new.meta[key] for key in old.meta} == dict(old.meta)


@pytest.mark.parametrize(("file_format", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_build_resizes_and_is_the_same_again(folder, tmp_path, file_format, kind):
    for name, workers in (("one", 0), ("two", 1)):
        arguments = ["build", folder, "--out", tmp_path / name, "--size", "16", "--format", file_format, "--max-bad-share", "0.2"]
        data(*arguments, "--workers", workers)
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert one == two
    source = open_source(tmp_path / "one")
    picture = Image.open(io.BytesIO(source[0].image))
    assert picture.format == kind
    assert min(picture.size) == 16
    assert picture.size == (27, 16)  # 50 x 30
    expected = Image.open(folder / "00.png").convert("RGB").resize((27, 16), Image.Resampling.BICUBIC)
    difference = abs(np.asarray(decode(source[0].image)).astype(float) - np.asarray(expected)).mean()
    assert difference == 0 if file_format == "png" else difference < 40  # noise is hard to compress


def test_build_never_enlarges(folder, tmp_path):
    data("build", folder, "--out", tmp_path / "big", "--size", "4000", "--max-bad-share", "0.2")
    assert Image.open(io.BytesIO(open_source(tmp_path / "big")[0].image)).size == (50, 30)


def test_build_leaves_nothing_half_done(folder, tmp_path):
    for arguments, words in [
        (["--max-bad-share", "0"], "max_bad_share"),
        (["--size", "16", "--format", "keep"], "--format must be webp, jpg or png"),
    ]:
        code = 2 if "--size" in arguments else 1
        result = data("build", folder, "--out", tmp_path / "shards", *arguments, code=code)
        assert words in str(result.exception)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = data("build", folder, "--out", tmp_path / "full", code=1)
    assert "not empty" in str(result.exception)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_wrong_paths_are_named(tmp_path):
    for command in (["stats"], ["check"], ["build", "--out", tmp_path / "out"]):
        result = data(*command, tmp_path / "nowhere.tar", code=1)
        assert "nowhere.tar" in str(result.exception)
        assert data(*command, code=2).exception is not None


def test_stats_of_the_embedded_data():
    found = json.loads(data("stats", "sample:test-unseen", "--json").stdout)
    assert found["bad"] == found["duplicates"] == []
    assert found["without_caption"] == 0
    assert found["width_px"]["max"] == 64
