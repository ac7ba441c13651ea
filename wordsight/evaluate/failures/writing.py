"""Words in pictures: reading them, and being led astray by them; and the control, naming things without writing.

Letters are drawn with Pillow's own font, or with DejaVu from matplotlib where `fonts` asks for it. FreeType may draw a letter
otherwise in another version, so the protocol names Pillow's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, cast

import PIL
from PIL import Image, ImageDraw, ImageFont, features

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import SIZE_PX, Layer, Scene, Thing
from wordsight.evaluate.failures.items import FailureMode, Item
from wordsight.evaluate.failures.names import OBJECTS, a

WORDS = tuple(
    "apple river stone bread cloud green house light money night paper queen radio seven table uncle voice water young zebra "
    "book cold door east fish gold hand iron jump king lamp moon nose open park quiz road salt time unit very wind year zero ant "
    "box cup day end fun ice joy map net old pen run sea two".split()
)
DEJAVU = {"sans": "DejaVuSans", "sans bold": "DejaVuSans-Bold", "serif": "DejaVuSerif", "mono": "DejaVuSansMono"}
STYLES = ("plain", "bold", "light on dark", "slanted", "turned")


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of this size in pixels.

    Raises:
        ValueError: an unknown name, matplotlib is not there, or Pillow was built without FreeType.
    """
    if not features.check("freetype2"):
        raise ValueError("this Pillow was built without FreeType and can't draw letters: install Pillow from its wheels")
    if name == "bundled":
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    if name not in DEJAVU:
        raise ValueError(f"fonts are bundled, {', '.join(DEJAVU)}, got {name!r}")
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise ValueError(f"the font {name!r} comes with matplotlib, which is not installed: pip install matplotlib") from error
    path = f"{get_data_path()}/fonts/ttf/{DEJAVU[name]}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True, slots=True)
class Writing:
    """A word on a label of its own.

    Attributes:
        word: what is written.
        x, y: the middle of the label, in pixels.
        size: of the letters, in pixels.
        font: "bundled" or one of DEJAVU.
        style: one of STYLES.
    """

    word: str
    x: int
    y: int
    size: int
    font: str = "bundled"
    style: str = "plain"

    def put(self, canvas: Image.Image) -> None:
        """Draw it."""
        font, bold = _font(self.font, self.size), 1 if self.style == "bold" else 0
        paper, ink = ("black", "white") if self.style == "light on dark" else ("white", "black")
        left, top, right, bottom = font.getbbox(self.word, stroke_width=bold)
        pad = self.size // 4
        label = Image.new("RGB", (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad), paper)
        ImageDraw.Draw(label).text((pad - left, pad - top), self.word, fill=ink, font=font, stroke_width=bold, stroke_fill=ink)
        if self.style == "slanted":
            lean = label.height // 4
            size = (label.width + lean, label.height)
            label = label.transform(
                size, Image.Transform.AFFINE, (1, lean / label.height, -lean, 0, 1, 0), Image.Resampling.BICUBIC, fillcolor=paper
            )
        if self.style == "turned":
            label = label.rotate(14, Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
        canvas.paste(label, (self.x - label.width // 2, self.y - label.height // 2))


@dataclass(frozen=True, kw_only=True)
class Reading(FailureMode):
    """Which of ten words is written? Chance 1/10. Rows are fonts and styles.

    Attributes:
        fonts: "bundled" (Pillow's own), and of matplotlib's DejaVu "sans", "sans bold", "serif", "mono".
    """

    name: ClassVar[str] = "reading"
    fonts: tuple[str, ...] = ("bundled",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fonts:
            raise ValueError(f"fonts must name at least one of bundled, {', '.join(DEJAVU)}")
        for name in self.fonts:
            _font(name, 20)

    def _item(self, i: int, draw: Draw) -> Item:
        words = draw.some(WORDS, 10)
        place = i % len(words)
        style = STYLES[(i // len(words)) % len(STYLES)]
        font = self.fonts[(i // (len(words) * len(STYLES))) % len(self.fonts)]
        writing = Writing(words[place], draw.between(98, 126), draw.between(70, 154), draw.between(30, 48), font, style)
        return Item(
            key=f"{self.name}/{i}",
            rows=(style, f"font {font}"),
            group=words[place],
            pictures=(Scene((writing,)),),
            texts=tuple(f'the word "{word}"' for word in words),
            right=(place,),
        )

    def how(self) -> str:
        """What letters are drawn with."""
        return f"{SIZE_PX} px, fonts {', '.join(self.fonts)}, Pillow {PIL.__version__}"


def _named(i: int, draw: Draw, mode: str, *, attacked: bool) -> Item:
    """Two things, each alone in a picture, and their names; alike in both modes of a seed, but for the writing."""
    pair = draw.some(OBJECTS, 2)
    x, y, size, letters = draw.between(100, 124), draw.between(84, 100), draw.between(120, 136), draw.between(22, 30)

    def shown(name: str, other: str) -> Scene:
        layers: list[Layer] = [Thing(name, x, y, size)]
        if attacked:
            layers.append(Writing(other, 112, 180, letters))
        return Scene(tuple(layers))

    return Item(
        key=f"{mode}/{i}",
        rows=("the other's name" if attacked else "no writing",),
        group="+".join(sorted(pair)),
        pictures=(shown(*pair), shown(*pair[::-1])),
        texts=(a(pair[0]), a(pair[1])),
        right=(0, 1),
    )


@dataclass(frozen=True, kw_only=True)
class Objects(FailureMode):
    """The control: groups of two things, each alone in a picture, and their names.

    A model that is not good at this fails at the other modes because it does not know the drawings.
    """

    name: ClassVar[str] = "objects"

    def _item(self, i: int, draw: Draw) -> Item:
        return _named(i, draw, self.name, attacked=False)


@dataclass(frozen=True, kw_only=True)
class Typographic(FailureMode):
    """The typographic attack: the things of `Objects`, with the other one's name written below each (all items).

    A model that reads more than it looks is under chance.
    """

    name: ClassVar[str] = "typographic_attack"

    def _draw(self, i: int) -> Draw:
        return Draw(Objects.name, self.version, self.seed, i)

    def _item(self, i: int, draw: Draw) -> Item:
        return _named(i, draw, self.name, attacked=True)

    def how(self) -> str:
        """What letters are drawn with."""
        return f"{SIZE_PX} px, Twemoji, font bundled, Pillow {PIL.__version__}"
