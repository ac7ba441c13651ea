"""The quickstart with SigLIP's loss: the same towers, data, order and updates, a sigmoid for each pair (arXiv 2303.15343).

Command: wordsight train siglip_quickstart --run runs/siglip
Hardware: 2 CPU cores, about 4 minutes. Expected on Twemoji (seed 0): R@1 .504 [.480, .528], R@5 .750 [.728, .770] of 1,607
trained names. The loss starts at 10 nats an image, which is what a bias of -10 costs the right pairs.
"""

from dataclasses import replace

from wordsight.recipes.quickstart import quickstart
from wordsight.train.recipe import Recipe


def siglip_quickstart() -> Recipe:
    """siglip-quickstart in everything else that `quickstart` says."""
    return replace(quickstart(), model="siglip-quickstart")
