"""Random numbers by row: the same for every split of a batch, uniform, independent between rows, streams and steps."""

import torch

from wordsight.nn.random import number_streams, numbered_rows, uniform


def draw(seed: int, first_row: int, rows: int, columns: int, stream: int = 1) -> torch.Tensor:
    with numbered_rows(seed, first_row, "cpu"):
        return uniform(rows, columns, stream=stream, device="cpu")


def test_a_row_draws_the_same_in_every_split() -> None:
    whole = draw(7, 0, 32, 49)
    assert torch.equal(torch.cat([draw(7, i, 5, 49) for i in range(0, 30, 5)] + [draw(7, 30, 2, 49)]), whole)


def test_several_texts_a_row_draw_the_same_in_every_split() -> None:
    def texts(first_row: int, rows: int) -> torch.Tensor:
        with numbered_rows(7, first_row, "cpu", rows):
            return uniform(3 * rows, 5, stream=1, device="cpu")

    assert torch.equal(torch.cat([texts(i, min(4, 10 - i)) for i in range(0, 10, 4)]), texts(0, 10))
    with numbered_rows(7, 4, "cpu", 6):
        assert torch.equal(uniform(6, 5, stream=1, device="cpu"), draw(7, 4, 6, 5))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = draw(3, 10, 2000, 50).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 19 degrees of freedom: p = .0007
    others = [draw(3, 11, 2000, 50), draw(4, 10, 2000, 50), draw(3, 10, 2000, 50, stream=2), u.roll(1, dims=1), u.roll(1, dims=0)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([u.flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 0.013  # 4 sigma of 1e5 numbers


def test_outside_it_is_torch_rand() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3, 4)
    torch.manual_seed(5)
    assert torch.equal(uniform(3, 4, stream=1, device="cpu"), expected)


def test_streams_are_numbered_by_place() -> None:
    model = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(4)])
    model[1].random_stream = 0
    model[3].random_stream = 0
    number_streams(model)
    assert (model[1].random_stream, model[3].random_stream) == (1, 2)
    assert not hasattr(model[0], "random_stream")
