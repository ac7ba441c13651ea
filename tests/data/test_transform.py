"""Preprocessing equals the reference's on odd-sized pictures, and brings every mode of picture to upright RGB."""

import io
from functools import lru_cache

import matplotlib.cbook
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from wordsight.data.transform import CLIP_MEAN, CLIP_STD, Preprocess, TrainTransform, open_rgb


def photo() -> Image.Image:
    """A real photograph of 512 x 600 px that matplotlib carries."""
    return Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")


def drawings(count: int) -> list[Image.Image]:
    from wordsight.data import open_source
    from wordsight.data.decode import decode

    source = open_source("sample:train")
    step = max(1, len(source) // count)
    return [decode(source[i * step].image) for i in range(count)]


@lru_cache(maxsize=1)
def odd_pictures() -> list[Image.Image]:
    """200 real pictures of odd sizes: 100 parts of a photograph, 70 drawings blown up with noise, 30 drawings as they are."""
    rng = np.random.default_rng(0)
    whole = photo()
    pictures = []
    for _ in range(100):
        width, height = int(rng.integers(60, 512)), int(rng.integers(60, 600))
        left, top = int(rng.integers(512 - width)), int(rng.integers(600 - height))
        pictures.append(whole.crop((left, top, left + width, top + height)))
    small = drawings(100)
    for drawing in small[:70]:
        size = int(rng.integers(50, 500)), int(rng.integers(50, 500))
        values = np.asarray(drawing.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
        pictures.append(Image.fromarray(np.clip(values + rng.normal(0, 12, values.shape), 0, 255).astype(np.uint8)))
    return pictures + small[70:]


@pytest.mark.parametrize("size_px", [224, 97])
@pytest.mark.parametrize(("resize", "interpolation"), [("shortest", "bicubic"), ("squash", "bicubic"), ("shortest", "bilinear")])
def test_evaluation_equals_open_clip_bit_for_bit(size_px, resize, interpolation):
    from open_clip.transform import image_transform

    options = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": resize, "interpolation": interpolation}
    reference = image_transform(size_px, is_train=False, **options)
    ours = Preprocess(size_px, resize=resize, interpolation=interpolation)
    pictures = odd_pictures()
    for picture in pictures if (size_px, resize, interpolation) == (224, "shortest", "bicubic") else pictures[::20]:
        assert torch.equal(ours(picture), reference(picture)), picture.size


def test_grey_equals_open_clip():
    from open_clip.transform import image_transform

    reference = image_transform(64, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    assert torch.equal(Preprocess(64)(photo().convert("L")), reference(photo().convert("L")))


@pytest.mark.parametrize("crop", [(3, 10, 480, 555), (0, 0, 512, 600), (100, 200, 200, 150)])
@pytest.mark.parametrize("flip", [False, True])
def test_training_equals_torchvision_for_the_same_crop(monkeypatch, crop, flip):
    from torchvision.transforms import functional

    left, top, width, height = crop
    expected = functional.resized_crop(photo(), top, left, height, width, [64, 64], functional.InterpolationMode.BICUBIC)
    expected = functional.pil_to_tensor(functional.hflip(expected) if flip else expected)
    monkeypatch.setattr(TrainTransform, "draw_crop", lambda *_: crop)
    assert torch.equal(TrainTransform(64, flip=float(flip))(photo(), np.random.default_rng(0)), expected)


def test_crops_are_drawn_as_torchvision_draws_them():
    """Same distribution over the sizes and places of the crops, for a plain, a thin and a tall picture."""
    from torchvision.transforms import RandomResizedCrop

    rng = np.random.default_rng(0)
    for (width, height), scale in [((301, 200), (0.9, 1.0)), ((40, 400), (0.9, 1.0)), ((100, 90), (0.3, 0.8))]:
        transform = TrainTransform(32, scale=scale)
        ours = np.array([transform.draw_crop(width, height, rng) for _ in range(1000)])
        blank = Image.new("RGB", (width, height))
        theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(1000)])[
            :, [1, 0, 3, 2]
        ]
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= width).all()
        assert (ours[:, 1] + ours[:, 3] <= height).all()
        spread = np.maximum(theirs.std(axis=0), 1e-9)
        # 1,000 draws on each side: means within five standard errors, spreads within a tenth
        assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 5 * spread * np.sqrt(2 / 1000) + 1e-9).all()
        assert np.allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1, atol=0.05)


def test_training_crops_follow_the_generator():
    transform = TrainTransform(32, flip=0.5)
    first, again, other = (transform(photo(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.sampled_from(["shortest", "squash"]))
def test_any_size_gives_the_size_asked_for(width, height, size_px, resize):
    picture = Image.new("RGB", (width, height), (10, 200, 30))
    expected = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, size_px, size_px)
    assert torch.equal(Preprocess(size_px, resize=resize).to_uint8(picture), expected)
    assert torch.equal(TrainTransform(size_px)(picture, np.random.default_rng(0)), expected)


def test_a_long_strip_takes_its_middle_without_much_memory():
    """1 x 300,000 px: resized whole it would need 60 GB."""
    column = np.zeros((300_000, 1, 3), np.uint8)
    column[149_990:150_010] = 255
    pixels = Preprocess(224).to_uint8(Image.fromarray(column))
    assert pixels.shape == (3, 224, 224)
    assert pixels.min() == 255


def test_transparency_is_laid_on_white():
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.putpixel((1, 0), (0, 0, 0, 128))
    for mode in ("RGBA", "La", "LA", "RGBa"):
        converted = red if mode == "RGBA" else (red.convert("LA").convert("La") if mode == "La" else red.convert(mode))
        rgb = open_rgb(converted)
        assert rgb.mode == "RGB"
        assert rgb.getpixel((3, 3)) == (255, 255, 255), mode
        assert rgb.getpixel((1, 0)) == (127, 127, 127), mode
    assert open_rgb(red).getpixel((0, 0)) == (255, 0, 0)


def test_palettes_and_transparent_colours():
    picture = Image.new("RGB", (8, 8), (0, 128, 0))
    picture.paste((250, 0, 0), (0, 0, 4, 8))
    palette = picture.quantize(4)
    assert open_rgb(palette).getpixel((1, 1)) == (250, 0, 0)
    palette.info["transparency"] = palette.getpixel((1, 1))  # one entry of the palette is transparent
    assert open_rgb(_reopened(palette, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    assert open_rgb(_reopened(palette, "PNG")).getpixel((6, 6)) == (0, 128, 0)
    picture.info["transparency"] = (250, 0, 0)  # a colour that stands for "transparent" (PNG's tRNS)
    assert open_rgb(_reopened(picture, "PNG", transparency=(250, 0, 0))).getpixel((1, 1)) == (255, 255, 255)
    half = palette.convert("PA")
    half.putpixel((6, 6), (half.getpixel((6, 6))[0], 0))
    assert half.mode == "PA"
    assert open_rgb(half).getpixel((6, 6)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_deep_grey_pictures_are_scaled(mode):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    if mode == "F":
        picture = Image.fromarray(values.astype(np.float32) / 65535)
    elif mode == "I":
        picture = Image.fromarray(values.astype(np.int32))
    else:
        data = values.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
        picture = Image.frombytes(mode, (4, 1), data)
    assert picture.mode == mode
    assert np.asarray(open_rgb(picture))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_16_bit_png_as_it_is_read():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    rgb = np.asarray(open_rgb(_reopened(Image.fromarray(ramp), "PNG")))
    assert abs(rgb[..., 0].astype(float) - ramp / 257).max() <= 0.5


def test_wide_integers_that_fit_8_bits_stay():
    picture = Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32))
    assert np.asarray(open_rgb(picture))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_other_modes_become_rgb_near_the_original(mode):
    if mode == "LAB":
        from PIL import ImageCms

        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(photo().resize((32, 32)), to_lab)
    else:
        picture = photo().resize((32, 32)).convert(mode)
    rgb = open_rgb(picture)
    assert rgb.mode == "RGB"
    assert rgb.size == (32, 32)
    if mode in ("CMYK", "YCbCr", "HSV", "LAB"):
        assert abs(np.asarray(rgb).astype(int) - np.asarray(photo().resize((32, 32)))).mean() < 4


def test_a_cmyk_jpeg_keeps_its_colours():
    picture = photo().resize((64, 64))
    rgb = open_rgb(_reopened(picture.convert("CMYK"), "JPEG", quality=95))
    assert abs(np.asarray(rgb).astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = photo().resize((40, 30))
    turned_back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if turned_back is None else upright.transpose(Image.Transpose(turned_back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = _reopened(stored, "PNG", exif=exif)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(read)), np.asarray(upright))  # the test's own table
    assert np.array_equal(np.asarray(open_rgb(read)), np.asarray(upright))


def test_open_rgb_leaves_its_argument_alone():
    for mode in ("RGB", "RGBA", "P", "L"):
        picture = photo().resize((8, 8)).convert(mode)
        before = picture.copy()
        open_rgb(picture)
        assert picture == before


def test_normalize_takes_bytes_and_fractions():
    preprocess = Preprocess(8)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    assert (preprocess.normalize(pixels) - expected).abs().max() < 1e-6
    assert torch.equal(preprocess.normalize(pixels.float() / 255), preprocess.normalize(pixels))
    assert preprocess.normalize(pixels).dtype == torch.float32
    with pytest.raises(ValueError, match="uint8"):
        preprocess.normalize(pixels.int())


def test_config_round_trip():
    preprocess = Preprocess(336, resize="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = preprocess.to_config()
    assert config == {
        "image_size_px": 336, "resize": "squash", "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "resize_px": None,
    }  # fmt: skip
    assert Preprocess.from_config(config) == preprocess
    assert Preprocess.from_config({}) == Preprocess()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Preprocess(0), "image_size_px"),
        (lambda: Preprocess(resize="longest"), "resize must be one of shortest, squash, got 'longest'"),
        (lambda: Preprocess(interpolation="nearest"), "interpolation must be one of"),
        (lambda: Preprocess(std=(1, 0, 1)), "std must be over 0"),
        (lambda: Preprocess(mean=(1, 2)), "mean must be three numbers"),
        (lambda: Preprocess.from_config({"image_size": 3}), "did you mean 'image_size_px'"),
        (lambda: TrainTransform(224, scale=(0.9, 1.1)), "scale"),
        (lambda: TrainTransform(224, ratio=(2, 1)), "ratio"),
        (lambda: TrainTransform(224, flip=2), "flip"),
        (lambda: TrainTransform(-1), "image_size_px"),
    ],
)
def test_wrong_options_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def _reopened(image: Image.Image, file_format: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return Image.open(buffer)
