"""The quickstart's CLIP: from random weights to naming emoji in a drawing that it never saw (arXiv 2103.00020).

Command: wordsight quickstart (or: wordsight train quickstart --run runs/quickstart)
Hardware: 2 CPU cores, under 4 minutes. Expected: see docs/LOG.md.
"""

from wordsight.data.augment import Augment
from wordsight.data.sources import DataSource
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig
from wordsight.train.recipe import DataConfig, Evaluation, OptimConfig, Recipe


def quickstart() -> Recipe:
    """A thin CLIP at 32 px on Noto and Fluent emoji, with clip art as a tenth of each batch; judged on Twemoji at the end."""
    return Recipe(
        model=CLIPConfig(
            embed_dim=128,
            image=ViTConfig(image_size_px=32, patch_size_px=4, width=128, num_layers=4, num_heads=4),
            text=TextConfig(vocab_size=4096, context_length=16, width=128, num_layers=2, num_heads=4),
            activation="gelu",
            duplicates="multi_positive",
        ),
        tokenizer="sample:tokenizer",
        data=DataConfig(
            sources=(
                DataSource(path=("sample:train-noto", "sample:train-fluent"), weight=0.9),
                DataSource(path="sample:train-openclipart", weight=0.1),
            ),
            crop_scale=None,
            augment=Augment(),
            first_caption_prob=0.8,
            cache_decoded=True,
        ),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup_steps=50, grad_clip=1.0),
        steps=1_000,
        batch_size=256,
        ema_decay=0.99,
        evaluations=(Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-seen"),),
        best_metric="zero_shot/test-twemoji-seen/top1",
        log_every_steps=10,
        checkpoint_every_s=60.0,
    )
