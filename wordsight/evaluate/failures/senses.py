"""Words of two meanings, both of which the embedded pictures show.

Searched for and not found with two pictures: crane, seal, bank, ring, fan, star, scale, watch, jam, pitcher, trunk, ruler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wordsight.evaluate.failures.chance import Draw
from wordsight.evaluate.failures.drawing import Scene, Thing
from wordsight.evaluate.failures.items import FailureMode, Item


@dataclass(frozen=True, slots=True)
class Sense:
    """One meaning of a word.

    Attributes:
        picture: the label of an embedded picture that shows it.
        gloss: the word with what it means here.
    """

    picture: str
    gloss: str


# word -> its two meanings. In the first column the one that comes to mind first with a picture dictionary in hand: nature, body
# and everyday things before games, countries and tools.
SENSES: dict[str, tuple[Sense, Sense]] = {
    "bat": (Sense("bat", "a bat, an animal that flies"), Sense("cricket game", "a bat to hit a ball with")),
    "bolt": (Sense("high voltage", "a bolt of lightning"), Sense("nut and bolt", "a bolt for a nut")),
    "bow": (Sense("ribbon", "a bow of ribbon"), Sense("bow and arrow", "a bow that shoots arrows")),
    "cricket": (Sense("cricket", "a cricket, an insect"), Sense("cricket game", "cricket, a game")),
    "diamond": (Sense("gem stone", "a diamond, a jewel"), Sense("diamond suit", "a diamond on a playing card")),
    "drum": (Sense("drum", "a drum to make music on"), Sense("oil drum", "a drum full of oil")),
    "glasses": (Sense("glasses", "glasses to see with"), Sense("clinking glasses", "glasses to drink from")),
    "heart": (Sense("red heart", "a heart, the sign of love"), Sense("anatomical heart", "a heart, the organ that pumps blood")),
    "letter": (Sense("envelope", "a letter in an envelope"), Sense("input latin letters", "letters of the alphabet")),
    "mouse": (Sense("mouse", "a mouse, an animal"), Sense("computer mouse", "a mouse of a computer")),
    "note": (Sense("musical note", "a note of music"), Sense("dollar banknote", "a note of money")),
    "nut": (Sense("chestnut", "a nut to eat"), Sense("nut and bolt", "a nut on a bolt")),
    "orange": (Sense("tangerine", "an orange, a fruit"), Sense("orange circle", "orange, a colour")),
    "palm": (Sense("palm tree", "a palm, a tree"), Sense("palm up hand", "the palm of a hand")),
    "pick": (Sense("pick", "a pick to break rocks with"), Sense("hair pick", "a pick for the hair")),
    "plant": (Sense("potted plant", "a plant in a pot"), Sense("factory", "a plant, a factory")),
    "spade": (Sense("shovel", "a spade to dig with"), Sense("spade suit", "a spade on a playing card")),
    "turkey": (Sense("turkey", "a turkey, a bird"), Sense("turkey flag", "turkey, a country")),
    "wave": (Sense("water wave", "a wave of the sea"), Sense("waving hand", "a wave of the hand")),
}
_ROWS = ("told by a gloss", "bare word, first sense", "bare word, second sense")


@dataclass(frozen=True, kw_only=True)
class Polysemy(FailureMode):
    """Groups about words of two senses.

    Rows: *told by a gloss*, both senses of one word and a text for each ("a bat, an animal that flies", "a bat to hit a ball
    with"); *bare word*, two words by pictures of their first, or of their second sense ("bat", "mouse"). A model that knows
    one sense of a word only is good at the one bare row and poor at the other.
    """

    name: ClassVar[str] = "polysemy"

    def _item(self, i: int, draw: Draw) -> Item:
        row = i % len(_ROWS)
        words = list(SENSES)
        word = words[(i // len(_ROWS)) % len(words)]
        x, y, size = draw.between(92, 132), draw.between(92, 132), draw.between(110, 150)
        if row == 0:
            senses = SENSES[word]
            texts = senses[0].gloss, senses[1].gloss
        else:
            taken = SENSES[word][row - 1].picture
            other = draw.one([one for one in words if one != word and SENSES[one][row - 1].picture != taken])
            senses = SENSES[word][row - 1], SENSES[other][row - 1]
            texts = word, other
        return Item(
            key=f"{self.name}/{i}",
            rows=(_ROWS[row],),
            group=word,
            pictures=tuple(Scene((Thing(sense.picture, x, y, size),)) for sense in senses),
            texts=texts,
            right=(0, 1),
        )

    def notes(self) -> tuple[str, ...]:
        """How few words there are."""
        return (f"{len(SENSES)} words; intervals are over words, not over places of a picture",)
