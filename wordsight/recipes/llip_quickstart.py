"""Llip on the embedded pictures, with the quickstart's towers, data and length (arXiv 2405.00740).

Command: wordsight train llip_quickstart --run runs/llip
Hardware: 2 CPU cores, about twice the quickstart's time. Expected: see docs/systems/llip.md.
"""

from dataclasses import replace

from wordsight.recipes.quickstart import quickstart
from wordsight.train.recipe import Recipe


def llip_quickstart() -> Recipe:
    """llip-quickstart: 8 tokens of 4 heads from the quickstart's map, the sigmoid loss; all else as in `quickstart`."""
    return replace(quickstart(), model="llip-quickstart")
