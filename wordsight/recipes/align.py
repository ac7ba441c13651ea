"""ALIGN on the embedded pictures, in the paper's way (arXiv 2102.05918) but small: EfficientNet, BERT, label smoothing .1.

Command: wordsight train align --run runs/align
Hardware: one CPU core, 4 minutes. Expected on Twemoji (seed 0): R@1 .156 [.139, .174], R@5 .388 [.364, .412] of 1,607 trained
names; of 268 names never seen in training R@1 .049 [.029, .081], R@5 .138 [.102, .184].
"""

from wordsight.data.augment import Augment
from wordsight.data.sources import DataSource
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.train.recipe import DataConfig, Evaluation, OptimConfig, Recipe


def align() -> Recipe:
    """align-small at 48 px, a WordPiece vocabulary of the embedded captions, batch 128; judged on Twemoji at the end."""
    return Recipe(
        model="align-small",
        tokenizer="sample:wordpiece",
        data=DataConfig(
            sources=(
                DataSource(path=("sample:train-noto", "sample:train-fluent"), weight=0.9),
                DataSource(path="sample:train-openclipart", weight=0.1),
            ),
            crop_scale=None,
            augment=Augment(hue=0.25, saturation=0.7),
            first_caption_prob=0.9,
            cache_decoded=True,
        ),
        optim=OptimConfig(lr=2e-3, muon_lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup_steps=30),
        steps=600,
        batch_size=128,
        ema_decay=0.99,
        evaluations=(
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-seen"),
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-unseen"),
        ),
        recalibrate_batches=16,
        prompts="name",
        best_metric="step",
        log_every_steps=10,
        checkpoint_every_s=60.0,
    )
