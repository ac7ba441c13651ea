"""The quickstart's CLIP: from random weights to naming emoji in a drawing that it never saw (arXiv 2103.00020).

Command: wordsight quickstart (or: wordsight train quickstart --run runs/quickstart)
Hardware: 2 CPU cores, 3.5 to 4 minutes. Expected on Twemoji: R@1 0.52, R@5 0.75 of 1,607 trained names (docs/LOG.md).
"""

from wordsight.data.augment import Augment
from wordsight.data.sources import DataSource
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.train.recipe import DataConfig, Evaluation, OptimConfig, Recipe


def quickstart() -> Recipe:
    """clip-quickstart at 32 px on Noto and Fluent emoji, with clip art as a tenth of each batch; judged on Twemoji on the way.

    Twemoji is the test set, so it chooses nothing: the model that is kept is the last one.
    """
    return Recipe(
        model="clip-quickstart",
        tokenizer="sample:tokenizer",
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
        optim=OptimConfig(lr=2e-3, muon_lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup_steps=50),
        steps=950,
        batch_size=256,
        ema_decay=0.99,
        evaluations=(
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-seen"),
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-unseen"),
        ),
        recalibrate_batches=16,
        prompts="name",
        evaluate_every_steps=475,
        evaluate_max_share=0.1,
        best_metric="step",
        log_every_steps=10,
        checkpoint_every_s=60.0,
    )
