"""UniCL on the embedded pictures: emoji with the label of their concept beside captioned clip art (arXiv 2204.03610).

Command: wordsight train unicl --run runs/unicl
Your own data: --set "data.sources=photos/by_class,pairs.csv" mixes class folders with captions (docs/systems/unicl.md).
Hardware: 2 CPU cores, as long as the quickstart. Expected: see docs/systems/unicl.md.
"""

from dataclasses import replace

from wordsight.recipes.quickstart import quickstart
from wordsight.train.recipe import Recipe


def unicl() -> Recipe:
    """unicl-quickstart: both drawings of an emoji, and all of its names, are right for each other; else as in `quickstart`."""
    return replace(quickstart(), model="unicl-quickstart")
