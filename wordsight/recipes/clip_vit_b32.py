"""CLIP ViT-B/32 in the paper's settings (arXiv 2103.00020, section 2.5 and tables 18 to 20).

Command: torchrun --nproc-per-node 8 -m wordsight train clip_vit_b32 --run-dir runs/b32 \\
    --set "data.sources=shards/{00000..41455}.tar"
Hardware: the paper's batch of 32,768 on 8 or more GPUs of 80 GB (micro-batches of 1,024). Expected: 63.3% top-1 on ImageNet
zero-shot from the
paper's 400 million pairs, which are not public.
"""

from wordsight.train.recipe import OptimConfig, Recipe


def clip_vit_b32() -> Recipe:
    """Batch 32,768, 32 epochs, AdamW 5e-4 with decay .2, 2,000 steps of warm-up, cosine."""
    return Recipe(
        model="ViT-B/32",
        epochs=32,
        batch_size=32_768,
        micro_batch_size=1_024,
        precision="bf16",
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup_steps=2_000),
        checkpoint_every_s=1_800.0,
    )
