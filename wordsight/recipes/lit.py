"""LiT on the embedded pictures: two published towers stand still, linear heads learn to make them agree (arXiv 2111.07991).

Command: make weights && wordsight train lit --run runs/lit
Hardware: one CPU core, 3 to 5 minutes. Expected on Twemoji: R@1 .27, R@5 .48 of 1,607 trained names; of 268 names never seen in
training R@1 .10, R@5 .30 (chance .004, .019), where the quickstart's CLIP, trained from nothing, has .52, .75 and .04, .11.
"""

from wordsight.data.sources import DataSource
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.train.recipe import DataConfig, Evaluation, OptimConfig, Recipe


def lit() -> Recipe:
    """EfficientNet-Lite0 (ImageNet) at 128 px and MiniLM (sentences), both locked, features computed once a picture and a text.

    Pictures are not augmented, so that their features can be kept.
    """
    return Recipe(
        model="lit-lite0-minilm",
        image_weights="efficientnet-lite0",
        text_weights="all-MiniLM-L6-v2",
        data=DataConfig(
            sources=(
                DataSource(path=("sample:train-noto", "sample:train-fluent"), weight=0.9),
                DataSource(path="sample:train-openclipart", weight=0.1),
            ),
            crop_scale=None,
            first_caption_prob=0.9,
            cache_decoded=True,
        ),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup_steps=50),
        steps=400,
        batch_size=256,
        evaluations=(
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-seen"),
            Evaluation(evaluator=ZeroShot(prompts="name"), data="sample:test-twemoji-unseen"),
        ),
        prompts="name",
        best_metric="step",
        log_every_steps=10,
        checkpoint_every_s=None,
    )
