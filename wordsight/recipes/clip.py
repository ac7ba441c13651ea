"""CLIP on your own pairs (arXiv 2103.00020), starting small.

Command: wordsight train clip --run runs/mine --set data.sources=pairs.csv
Hardware: any; ViT-B/32 at batch 256 in micro-batches of 32 fits in about 6 GB. Expected: that depends on your pairs; from
scratch, a million of
them are few. Start from published weights instead with --set weights=PATH --set optim.lr=1e-5.
"""

from wordsight.train.recipe import OptimConfig, Recipe


def clip() -> Recipe:
    """ViT-B/32, batch 256, 10 epochs, AdamW with CLIP's constants for its ViTs and a learning rate for the smaller batch."""
    return Recipe(
        model="ViT-B/32",
        epochs=10,
        batch_size=256,
        micro_batch_size=32,
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup_steps=500, grad_clip=1.0),
    )
