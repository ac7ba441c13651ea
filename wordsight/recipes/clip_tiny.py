"""The smallest CLIP on the embedded pictures, to see the loop at work (arXiv 2103.00020).

Command: wordsight train clip_tiny --run runs/tiny
Hardware: one CPU core, under a minute. Expected: the loss falls from log 64 = 4.2 to about 3.5; the model is too small to be of
use.
"""

from wordsight.train.recipe import DataConfig, OptimConfig, Recipe


def clip_tiny() -> Recipe:
    """clip-tiny, batch 64, 200 steps."""
    return Recipe(
        model="clip-tiny",
        steps=200,
        batch_size=64,
        data=DataConfig(sources=("sample:train",), crop_scale=None),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1, warmup_steps=20, grad_clip=1.0),
    )
