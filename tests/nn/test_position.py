"""Position embeddings at another resolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.nn.position import resize_positions


def test_the_same_grid_is_the_same_tensor() -> None:
    positions = torch.randn(1 + 9, 4)
    assert resize_positions(positions, (3, 3)) is positions


@settings(max_examples=30, deadline=None)
@given(side=st.integers(1, 8), height=st.integers(1, 12), width=st.integers(1, 12), prefix=st.integers(0, 2))
def test_prefix_stays_and_constants_stay(side: int, height: int, width: int, prefix: int) -> None:
    positions = torch.cat([torch.randn(prefix, 3), torch.tensor([1.0, -2.0, 0.5]).expand(side * side, 3)])
    resized = resize_positions(positions, (height, width), num_prefix=prefix)
    assert resized.shape == (prefix + height * width, 3)
    assert torch.equal(resized[:prefix], positions[:prefix])
    torch.testing.assert_close(resized[prefix:], positions[prefix:][:1].expand(height * width, 3), atol=1e-5, rtol=0)


def test_axes_keep_their_meaning() -> None:
    """A ramp down the rows stays one, and does not become a ramp along the columns."""
    ramp = torch.linspace(0, 1, 7)[:, None].expand(7, 7).reshape(49, 1)
    resized = resize_positions(ramp, (14, 5), num_prefix=0).reshape(14, 5)
    assert (resized.diff(dim=0) > 0).all()
    assert resized.std(dim=1).max() < 1e-6


@pytest.mark.parametrize("grid", [(4, 4), (10, 10)])
def test_equals_open_clip(grid: tuple[int, int]) -> None:
    from types import SimpleNamespace

    from open_clip.model import resize_pos_embed

    positions = torch.randn(1 + 49, 16)
    state = {"visual.positional_embedding": positions.clone()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    torch.testing.assert_close(resize_positions(positions, grid), state["visual.positional_embedding"], rtol=0, atol=1e-6)


def test_half_precision_is_kept() -> None:
    assert resize_positions(torch.randn(5, 4, dtype=torch.float16), (3, 3)).dtype is torch.float16


def test_a_wrong_prefix_is_named() -> None:
    with pytest.raises(ValueError, match="10 positions less 0 prefix rows are not a square grid"):
        resize_positions(torch.randn(10, 4), (2, 2), num_prefix=0)
