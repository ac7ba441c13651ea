"""Embedding keeps order, names what can't be read, leaves the model as it was, and its result does not depend on batches."""

import re
import threading
from pathlib import Path

import matplotlib.cbook
import pytest
import torch
from PIL import Image

import wordsight
from wordsight.data.decode import reduced_uint8
from wordsight.data.tokenize import ClipTokenizer


@pytest.fixture(scope="module")
def model():
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """13 different pictures as paths."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    paths = [folder / f"{i:02}.png" for i in range(13)]
    for i, path in enumerate(paths):
        whole.crop((10 * i, 20 * i, 10 * i + 150 + i, 20 * i + 90)).save(path)
    return paths


def expected_images(model, paths):
    with torch.no_grad():
        return torch.cat([model.encode_image(model.preprocess(Image.open(path))[None]) for path in paths])


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64])
def test_images_keep_their_order(model, pictures, batch_size):
    vectors = model.embed_images(pictures, batch_size=batch_size, num_threads=3)
    assert vectors.dtype == torch.float32
    assert vectors.device.type == "cpu"
    assert (vectors - expected_images(model, pictures)).abs().max() < 1e-5
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5


def test_images_from_paths_strings_pictures_and_iterators(model, pictures):
    expected = expected_images(model, pictures)
    mixed = [str(path) if i % 3 == 0 else path if i % 3 == 1 else Image.open(path) for i, path in enumerate(pictures)]
    for given in (mixed, iter(mixed), tuple(mixed)):
        assert (model.embed_images(given, batch_size=5) - expected).abs().max() < 1e-5
    for one in (pictures[3], str(pictures[3]), Image.open(pictures[3])):
        assert (model.embed_images(one) - expected[3:4]).abs().max() < 1e-5


def test_large_jpegs_are_decoded_at_a_reduced_scale_where_asked(model, tmp_path):
    path = Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    with torch.no_grad():
        expected = model.encode_image(model.preprocessor.normalize(reduced_uint8(path.read_bytes(), model.preprocessor)[None]))
    assert (model.embed_images(path, reduced_decode=True) - expected).abs().max() < 1e-5
    assert (model.embed_images(path) - expected).abs().max() > 1e-4
    (tmp_path / "half.jpg").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"half\.jpg can't be decoded"):
        model.embed_images([path, tmp_path / "half.jpg"], reduced_decode=True)


def test_texts_keep_their_order_and_equal_ones_are_encoded_once(model, monkeypatch):
    texts = [
        "a cat",
        "a very long caption about a dog that runs through tall grass near a river",
        "",
        "a cat",
        "狗",
        "dog " * 100,
        "a cat",
    ]
    with torch.no_grad():
        expected = torch.cat([model.encode_text(model.tokenize([text])) for text in texts])
    seen = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: seen.append(len(tokens)) or encode(tokens))
    for batch_size in (1, 2, 256):
        seen.clear()
        vectors = model.embed_texts(texts, batch_size=batch_size)
        assert (vectors - expected).abs().max() < 1e-5
        assert sum(seen) == 5
        assert max(seen) <= batch_size
    assert (model.embed_texts("a cat") - expected[:1]).abs().max() < 1e-5


def test_nothing_gives_no_rows(model):
    dim = model.config.embed_dim
    assert model.embed_images([]).shape == (0, dim)
    assert model.embed_texts([]).shape == (0, dim)


def test_modes_are_put_back_part_by_part(model, pictures):
    model.train()
    model.text_tower.eval()
    before = [module.training for module in model.modules()]
    seen = []
    hook = model.image_tower.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    try:
        model.embed_images(pictures[:2])
        model.embed_texts(["a cat"])
        with pytest.raises(OSError, match="nowhere"):
            model.embed_images(["nowhere.png"])
        assert [module.training for module in model.modules()] == before
        assert seen == [(False, True)]
    finally:
        hook.remove()
        model.eval()


def test_vectors_may_be_trained_with_and_the_model_after(model, pictures):
    """Inference mode must not leak: neither through the result nor through something that the model keeps."""
    images, texts = model.embed_images(pictures[:2]), model.embed_texts(["a", "b"])
    pixels = model.embed_pixels(torch.stack([model.preprocess(Image.open(path)) for path in pictures[:2]]))
    assert (pixels - images).abs().max() < 1e-6
    for vectors in (images, texts, pixels):
        head = torch.nn.Linear(vectors.shape[1], 2)
        head(vectors).sum().backward()
        assert head.weight.grad is not None
    model.encode_text(model.tokenize(["a cat"])).sum().backward()
    model.zero_grad(set_to_none=True)


def test_a_model_in_half_precision(pictures):
    model = wordsight.create("clip-tiny").to(torch.bfloat16)
    for vectors in (model.embed_images(pictures[:2]), model.embed_texts(["a cat"])):
        assert vectors.dtype == torch.float32
        assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"no picture at all", "no picture"), ("truncated", "decoded|truncated"), (None, "No such file")],
)
def test_a_file_that_can_not_be_read_is_named(model, pictures, tmp_path, content, words):
    bad = tmp_path / "broken one.png"
    if content is not None:
        data = pictures[0].read_bytes()
        bad.write_bytes(data[: len(data) // 2] if content == "truncated" else content)
    with pytest.raises(OSError, match=r"broken one\.png") as caught:
        model.embed_images([*pictures, bad, *pictures], batch_size=4)
    assert re.search(words, str(caught.value))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wordsight-decode")]


def test_wrong_arguments_are_named(model, pictures):
    with pytest.raises(ValueError, match="paths and PIL images, got int at position 1"):
        model.embed_images([pictures[0], 7])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.embed_images(pictures, batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        model.embed_texts(["a"], batch_size=-1)
    with pytest.raises(ValueError, match="takes strings, got NoneType"):
        model.embed_texts(["a", None])
    bare = wordsight.create("clip-tiny")
    bare.tokenizer = bare.preprocessor = None
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.tokenize(["a"])
    with pytest.raises(ValueError, match="no preprocessor"):
        bare.preprocess(Image.new("RGB", (3, 3)))


def test_progress_goes_to_stderr(model, pictures, capsys):
    model.embed_images(pictures, batch_size=4, progress=True)
    model.embed_texts(["a", "b"], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "13/13" in captured.err
    assert "2/2" in captured.err
    model.embed_images(pictures[:1])
    assert capsys.readouterr().err == ""


def test_decoding_runs_only_so_far_ahead(model, pictures):
    """A million paths must not be decoded before the first batch is through the model."""
    taken = []
    progress = []
    hook = model.image_tower.register_forward_hook(lambda *_: progress.append(len(taken)))

    def endless():
        for _ in range(60):
            taken.append(1)
            yield pictures[0]

    try:
        model.embed_images(endless(), batch_size=4)
    finally:
        hook.remove()
    assert progress[0] <= 4 + 2 * 4 + 1


def test_the_tokenizer_of_the_model_is_used(model):
    assert isinstance(model.tokenizer, ClipTokenizer)
    assert torch.equal(model.tokenize(["a cat"]), model.tokenizer(["a cat"]))
