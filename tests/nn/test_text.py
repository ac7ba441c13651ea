"""The text transformer: nothing behind the longest caption is computed, and nothing behind an end token counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.nn.text import SigLIPText, SigLIPTextConfig, TextConfig, TextTransformer

END = 99


@pytest.fixture(scope="module")
def tower() -> TextTransformer:
    torch.manual_seed(0)
    config = TextConfig(vocab_size=100, context_length=20, width=16, num_layers=2, num_heads=2)
    return TextTransformer(config, 8, "quick_gelu").double()


def rows(lengths: list[int], total: int, seed: int = 0, filler: int = 0) -> torch.Tensor:
    """Texts whose end token stands at lengths[i]; behind it zeros, or random ids below the end token if `filler`."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), total, dtype=torch.int64)
    for i, length in enumerate(lengths):
        tokens[i, :length] = torch.randint(1, 90, (length,), generator=g)
        tokens[i, length] = END
        if filler:
            tokens[i, length + 1 :] = torch.randint(
                0, END + 1, (total - length - 1,), generator=torch.Generator().manual_seed(filler)
            )
    return tokens


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 18), min_size=1, max_size=5), filler=st.integers(0, 9))
def test_what_stands_behind_the_end_token_changes_nothing(tower: TextTransformer, lengths: list[int], filler: int) -> None:
    full = tower(rows(lengths, 20))
    torch.testing.assert_close(tower(rows(lengths, 20, filler=filler)), full, rtol=0, atol=1e-12)
    torch.testing.assert_close(tower(rows(lengths, max(lengths) + 1)), full, rtol=0, atol=1e-12)
    alone = torch.cat([tower(row[None]) for row in rows(lengths, 20)])
    torch.testing.assert_close(alone, full, rtol=0, atol=1e-12)


def test_only_the_longest_caption_is_computed(tower: TextTransformer) -> None:
    seen = []
    handle = tower.blocks[0].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    tower(rows([3, 9, 6], 20))
    handle.remove()
    assert seen == [10]


def test_equals_the_whole_context_computed_by_hand_with_gradients(tower: TextTransformer) -> None:
    tokens = rows([4, 11, 19], 20, filler=3)
    tower.zero_grad()
    out = tower(tokens)
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters()}
    tower.zero_grad()
    x = tower.token_embedding(tokens) + tower.position_embedding
    x = tower.norm_final(tower.blocks.forward_tokens(x, is_causal=True))
    expected = x[torch.arange(3), torch.tensor([4, 11, 19])] @ tower.projection
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for name, p in tower.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-11, msg=name)


def test_weights_start_as_published() -> None:
    width, layers = 128, 4
    tower = TextTransformer(
        TextConfig(vocab_size=2000, context_length=77, width=width, num_layers=layers, num_heads=2), 64, "gelu"
    )
    block = tower.blocks[1]
    for weight, std in (
        (tower.token_embedding.weight, 0.02),
        (tower.position_embedding, 0.01),
        (tower.projection, width**-0.5),
        (block.attn.qkv.weight, width**-0.5),
        (block.attn.proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (block.mlp.fc1.weight, (2 * width) ** -0.5),
        (block.mlp.fc2.weight, width**-0.5 * (2 * layers) ** -0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * std
    assert block.attn.qkv.bias.abs().max() == block.attn.proj.bias.abs().max() == 0


@pytest.fixture(scope="module")
def padded() -> SigLIPText:
    torch.manual_seed(0)
    config = SigLIPTextConfig(vocab_size=100, context_length=12, width=16, num_layers=2, num_heads=2, pad_id=1)
    return SigLIPText(config, 8, "gelu_tanh").double()


@pytest.mark.parametrize("length", [1, 5, 11, 12])
def test_siglip_reads_the_last_of_all_its_places_however_long_a_row_comes(padded: SigLIPText, length: int) -> None:
    short = torch.randint(2, 100, (3, length))
    full = torch.full((3, 12), 1)
    full[:, :length] = short
    torch.testing.assert_close(padded(short), padded(full), rtol=0, atol=1e-12)
    tokens = padded.token_embedding(full) + padded.position_embedding
    last = padded.norm_final(padded.blocks.forward_tokens(tokens))[:, -1]
    torch.testing.assert_close(padded(full), padded.head(last), rtol=0, atol=1e-12)


def test_siglip_sees_padding_and_every_place(padded: SigLIPText) -> None:
    tokens = torch.full((1, 12), 1)
    tokens[0, :4] = torch.tensor([5, 6, 7, 8])
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = 50
        assert (padded(changed) - padded(tokens)).abs().max() > 1e-4, place


def test_siglip_text_starts_as_in_big_vision() -> None:
    torch.manual_seed(0)
    tower = SigLIPText(SigLIPTextConfig(vocab_size=500, width=128, num_layers=1, num_heads=2), 64, "gelu_tanh")
    for weight in (tower.token_embedding.weight, tower.position_embedding, tower.head.weight):
        assert weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not tower.head.bias.any()
    with pytest.raises(ValueError, match=r"pad_id must be in \[0, 500\), got 500"):
        SigLIPTextConfig(vocab_size=500, pad_id=500)
