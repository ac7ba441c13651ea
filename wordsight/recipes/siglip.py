"""SigLIP ViT-B/16: the paper's batch and b2 (arXiv 2303.15343), length and warm-up as SigLIP 2 says them (arXiv 2502.14786).

Command: torchrun --nproc-per-node 8 -m wordsight train siglip --run-dir runs/siglip --set tokenizer=spiece.model
--set "data.sources=shards/{00000..41455}.tar"
Hardware: the paper's batch of 32,768 on 8 or more GPUs of 80 GB (micro-batches of 1,024). The tokenizer is a SentencePiece
vocabulary of 32,000 tokens that pads with its end token: the published models', or your own by
`wordsight.data.sentencepiece.train_sentencepiece`. Expected: nothing is promised; the papers' data, WebLI, are not public.
"""

from wordsight.train.recipe import OptimConfig, Recipe


def siglip() -> Recipe:
    """Batch 32,768, 40 billion pairs, AdamW 1e-3 with b2 .95, 20,000 steps of warm-up, cosine, gradients clipped at 1.

    big_vision's decay of 1e-4 is not multiplied by the rate of 1e-3 as AdamW's is, so that it is .1 here.
    """
    return Recipe(
        model="ViT-B/16-SigLIP",
        samples=40_000_000_000,
        batch_size=32_768,
        micro_batch_size=1_024,
        precision="bf16",
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, warmup_steps=20_000, grad_clip=1.0),
        checkpoint_every_s=1_800.0,
    )
