"""ALIGN in the paper's settings (arXiv 2102.05918, section 4 and 5.1).

Command: torchrun --nproc-per-node 8 -m wordsight train align_l2 --run-dir runs/align \\
    --set "data.sources=shards/{00000..99999}.tar"
Hardware: the paper's batch of 16,384 on 1,024 TPU cores; here in micro-batches. Expected: 76.4% top-1 on ImageNet zero-shot
from the paper's 1.8 billion pairs, which are not public.
"""

from wordsight.train.recipe import OptimConfig, Recipe


def align_l2() -> Recipe:
    """EfficientNet-L2 at 289 px, BERT-Large, batch 16,384, LAMB 1e-3, decay 1e-5, 10,000 warm-up steps, linear to 0."""
    return Recipe(
        model="align",
        steps=1_200_000,
        batch_size=16_384,
        micro_batch_size=64,
        precision="bf16",
        activation_checkpointing=True,
        optim=OptimConfig(
            name="lamb", lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-5, warmup_steps=10_000, schedule="linear"
        ),
        checkpoint_every_s=1_800.0,
    )
