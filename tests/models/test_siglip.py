"""SigLIP: the conformance suite on its small catalogue configs, then what is its own."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from tests.models.conformance import CHECKS, make_batch, total
from wordsight import catalog
from wordsight.data.transform import Preprocess
from wordsight.models.contrastive.siglip import SigLIP, SigLIPConfig
from wordsight.nn.towers import config_from_dict, config_to_dict

TINY, QUICKSTART = (catalog.find(name).config for name in ("siglip-tiny", "siglip-quickstart"))
CONFIGS = {"siglip-tiny": TINY, "siglip-quickstart": QUICKSTART, "multi-positive": replace(TINY, duplicates="multi_positive")}
REGULARISED = replace(
    TINY, image=replace(TINY.image, patch_dropout=0.5, stochastic_depth=0.3), text=replace(TINY.text, stochastic_depth=0.3)
)
RANDOM_CHECKS = [
    check for check in CHECKS if any(word in check.__name__ for word in ("seeds", "checkpointing_changes", "finite"))
]


def seeded(config: SigLIPConfig) -> SigLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SigLIP(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conforms(name: str, check: object) -> None:
    check(lambda: seeded(CONFIGS[name]))


@pytest.mark.parametrize("check", RANDOM_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conforms_with_regularisation(check: object) -> None:
    check(lambda: seeded(REGULARISED))


def test_scale_and_bias_start_as_in_the_paper_and_have_no_bound() -> None:
    model = seeded(TINY)
    assert model.log_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10.0
    assert [id(p) for p in model.loss_parameters()] == [id(model.log_scale), id(model.logit_bias)]
    with torch.no_grad():
        model.log_scale.fill_(7.0)
    model.clamp_()
    assert model.log_scale.item() == 7.0


@pytest.mark.parametrize(("bias", "rows"), [(0.0, 16), (-10.0, 16), (3.0, 5)])
def test_the_loss_at_chance_is_its_closed_form(bias: float, rows: int) -> None:
    """With a vanishing scale every logit is the bias; with the bias 0 too, the loss is B log 2."""
    model = seeded(replace(TINY, init_log_scale=-60.0, init_bias=bias))
    loss = total(model.double(), make_batch(model, rows, dtype=torch.float64))
    right, wrong = softplus(torch.tensor([-bias, bias], dtype=torch.float64))
    torch.testing.assert_close(loss, right + (rows - 1) * wrong, rtol=1e-12, atol=0)
    assert model.expected_initial_loss(rows) == pytest.approx(loss.item(), rel=1e-12)
    if bias == 0.0:
        assert loss.item() == pytest.approx(rows * math.log(2), rel=1e-12)


def test_the_loss_is_the_papers_sum_over_pairs() -> None:
    model = seeded(TINY).double()
    batch = make_batch(model, 6, dtype=torch.float64)
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    logits = model.log_scale.exp() * image @ text.T + model.logit_bias
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / 6
    (term,) = model.loss(batch).values()
    assert term.count == 6
    torch.testing.assert_close(term.value, expected, rtol=0, atol=1e-12)


def test_repeated_texts_are_right_where_asked() -> None:
    plain, multi = seeded(TINY), seeded(replace(TINY, duplicates="multi_positive"))
    batch = make_batch(plain)
    twins = replace(batch, text_ids=batch.text_ids.clone().index_fill_(0, torch.tensor([1]), 0))
    assert torch.equal(total(plain, twins), total(plain, batch))
    assert total(multi, twins).item() > total(multi, batch).item() + 1  # two more right pairs, which the bias denies
    torch.testing.assert_close(total(multi, batch), total(plain, batch))


def test_preprocessing_goes_with_the_tower() -> None:
    half = (0.5, 0.5, 0.5)
    assert SigLIP.default_preprocessor(TINY) == Preprocess(image_size_px=32, resize="squash", mean=half, std=half)
    assert SigLIP.default_preprocessor(QUICKSTART) == Preprocess(image_size_px=32)


def test_negatives_and_captions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard negatives are texts that are right for nobody, padded as the text tower wants it."""
    model = seeded(TINY).double()
    batch = make_batch(model, 4, dtype=torch.float64)
    short = batch.tokens[:, None, :5].clone()
    short[..., 4] = 1023
    found = model.embeddings(replace(batch, negatives=short, negatives_given=torch.ones(4, 1, dtype=torch.bool)))
    torch.testing.assert_close(found["negatives"][:, 0], model.encode_text(short[:, 0]), rtol=0, atol=1e-12)
    logits = model.log_scale.exp() * found["image"] @ found["negatives"][:, 0].T + model.logit_bias
    more = softplus(logits).sum() / 4
    torch.testing.assert_close(
        model.loss_from_embeddings(found)["contrastive"].value, total(model, batch) + more, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name: str) -> None:
    import json

    config = CONFIGS[name]
    assert config_from_dict(SigLIPConfig, json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_recipes_have_the_papers_numbers_and_the_quickstarts() -> None:
    from wordsight.recipes.quickstart import quickstart
    from wordsight.recipes.siglip import siglip
    from wordsight.recipes.siglip_quickstart import siglip_quickstart

    recipe = siglip()
    assert (recipe.model, recipe.batch_size, recipe.samples) == ("ViT-B/16-SigLIP", 32_768, 40_000_000_000)
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.warmup_steps) == (1e-3, (0.9, 0.95), 20_000)
    assert recipe.optim.lr * recipe.optim.weight_decay == pytest.approx(1e-4)  # big_vision's decay, which the rate does not scale
    assert replace(siglip_quickstart(), model="clip-quickstart") == quickstart()
    clip = catalog.find("clip-quickstart").config
    assert (QUICKSTART.image, QUICKSTART.text, QUICKSTART.activation) == (clip.image, clip.text, clip.activation)


def test_wrong_options_are_named() -> None:
    for values, says in (
        ({"duplicates": "soft"}, "'soft'"),
        ({"activation": "relu"}, "'relu'"),
        ({"text_activation": "selu"}, "'selu'"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(TINY, **values)
    with pytest.raises(ValueError, match="set embed_dim=64, or project=true"):
        SigLIP(replace(TINY, embed_dim=32))
