"""`wordsight classify` as a user types it, and what the command line may import before it is asked for work."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import wordsight
from wordsight.cli.classify import command
from wordsight.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and two pictures."""
    folder = tmp_path_factory.mktemp("classify")
    wordsight.save(wordsight.create("clip-tiny"), folder / "model")
    Image.new("RGB", (40, 30), "red").save(folder / "red one.png")
    Image.new("RGB", (30, 50), "blue").save(folder / "blue.jpg")
    return folder


@pytest.fixture
def loaded(folder, monkeypatch):
    """The model, read once: the command gets it instead of reading it again."""
    model = wordsight.load(folder / "model")
    monkeypatch.setattr("wordsight.cli.classify.load_model", lambda *_: model)
    return model


def run(folder, *arguments):
    pictures = [str(folder / "red one.png"), str(folder / "blue.jpg")]
    return CliRunner().invoke(command, [*pictures, "--model", str(folder / "model"), *arguments])


def test_probabilities_are_the_softmax_of_the_scaled_similarities(folder):
    result = run(folder, "--labels", "a cat, dog,traffic light", "--prompts", "name", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    model = wordsight.load(folder / "model")
    images = model.embed_images([folder / "red one.png", folder / "blue.jpg"])
    names = ["a cat", "dog", "traffic light"]
    similarities = images @ model.embed_texts(names).T
    expected = (model.log_scale.exp() * similarities).softmax(dim=1)
    assert [row["image"] for row in rows] == [str(folder / "red one.png"), str(folder / "blue.jpg")]
    for row, similarity, probability in zip(rows, similarities, expected, strict=True):
        found = {entry["label"]: entry for entry in row["labels"]}
        assert list(found) == [names[i] for i in similarity.argsort(descending=True)]
        for i, name in enumerate(names):
            assert found[name]["probability"] == pytest.approx(probability[i].item(), abs=1e-5)
            assert found[name]["similarity"] == pytest.approx(similarity[i].item(), abs=1e-5)
        assert sum(entry["probability"] for entry in row["labels"]) == pytest.approx(1)


def test_a_model_with_a_bias_gives_each_label_its_own_probability():
    from wordsight.cli.classify import probabilities

    model = torch.nn.Module()
    model.log_scale, model.logit_bias = torch.nn.Parameter(torch.tensor(10.0).log()), torch.nn.Parameter(torch.tensor(-10.0))
    found = probabilities(model, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(found, torch.sigmoid(torch.tensor([[0.0, -10.0]])))


def test_the_default_prompt_and_the_models_own(folder, loaded):
    def top(*arguments):
        found = CliRunner().invoke(
            command, [str(folder / "blue.jpg"), "--labels", "cat,dog", "--model", "given", "--json", *arguments]
        )
        return json.loads(found.stdout)[0]["labels"][0]["similarity"]

    assert top() == top("--prompts", "simple") != top("--prompts", "name")
    loaded.provenance = {**loaded.provenance, "prompts": "name"}  # as a model trained on plain names says of itself
    assert top() == top("--prompts", "name")


def test_labels_from_a_file_and_top(folder, loaded, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("# mine\ncat\n\nnaïve café, with a comma\ndog\n", encoding="utf-8")
    result = run(folder, "--labels", str(labels), "--top", "2")
    assert result.exit_code == 0, result.output
    assert "Probability" in result.stdout
    assert result.stdout.count("%") == 4
    shown = [entry["label"] for entry in json.loads(run(folder, "--labels", str(labels), "--json").stdout)[0]["labels"]]
    assert sorted(shown) == ["cat", "dog", "naïve café, with a comma"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", " , "], "no label"),
        (["--labels", "cat,dog,cat"], "more than once: cat"),
        (["--labels", "nowhere.txt"], "no such file: nowhere.txt"),
        (["missing.png", "--labels", "cat"], "no such picture: missing.png"),
        ([], "Missing option '--labels'"),
        (["--labels", "cat", "--top", "0"], "--top"),
    ],
)
def test_wrong_usage_is_exit_code_2(folder, arguments, words):
    result = run(folder, *arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_a_missing_model_and_a_broken_picture_are_exit_code_1(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for model, words in [(["--model", str(folder / "model")], "broken.png"), ([], "wordsight quickstart")]:
        monkeypatch.setattr(sys, "argv", ["wordsight", "classify", "broken.png", "--labels", "cat", *model])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 1
        assert captured.out == ""
        assert words in captured.err


CHEAP = """
import sys
from click.testing import CliRunner
from wordsight.cli.main import cli
result = CliRunner().invoke(cli, {arguments})
assert result.exit_code == 0, result.output
lines = result.output.splitlines()
assert len(lines) <= 50, len(lines)
assert all(len(line) <= 100 for line in lines)
print(",".join(name for name in {heavy} if name in sys.modules))
print(result.output)
"""
HEAVY = ["torch", "numpy", "PIL", "pyarrow", "matplotlib", "tokenizers", "ftfy", "rich", "jinja2", "transformers", "torchvision"]


@pytest.mark.parametrize("name", [None, "classify", "embed", "data", "data stats", "data check", "data build"])
def test_help_is_cheap_and_fits(name):
    arguments = [*(name or "").split(), "--help"]
    code = CHEAP.format(arguments=arguments, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, _, shown = result.stdout.partition("\n")
    assert imported == ""
    if name is None:
        assert all(command in shown for command in COMMANDS)
    else:
        assert shown.count(f"wordsight {name.split()[0]}") >= 2  # its examples


def test_importing_wordsight_brings_nothing_heavy():
    code = f"import sys, wordsight; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_sigmoid_models_table_says_that_its_probabilities_are_independent(folder, loaded):
    words = "need not sum to 100%"
    assert words not in run(folder, "--labels", "cat,dog").output
    loaded.logit_bias = torch.tensor(-10.0)
    result = run(folder, "--labels", "cat,dog")
    assert result.exit_code == 0, result.output
    assert words in result.output
    assert words not in run(folder, "--labels", "cat,dog", "--json").output
