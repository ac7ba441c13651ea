"""Llip in the paper's settings for ViT-B/16 with 32 mixture tokens (arXiv 2405.00740 and the published code).

Command: torchrun --nproc-per-node 8 -m wordsight train llip --run-dir runs/llip \\
    --set "data.sources=shards/{00000..41455}.tar"
Hardware: the paper's batch of 32,768 on 128 GPUs; fewer go with smaller micro-batches. Expected: the published model has 69.6% on
average over the paper's zero-shot tasks, from 12.8 billion samples of 2.5 billion pairs that are not public.
"""

from wordsight.train.recipe import OptimConfig, Recipe


def llip() -> Recipe:
    """Batch 32,768, 12.8 billion samples, AdamW 5e-4 with betas .9 and .95 and decay .2, 2,000 steps of warm-up, cosine."""
    return Recipe(
        model="llip-ViT-B/16-k32",
        samples=12_800_000_000,
        batch_size=32_768,
        micro_batch_size=512,
        precision="bf16",
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.2, warmup_steps=2_000),
        checkpoint_every_s=1_800.0,
    )
