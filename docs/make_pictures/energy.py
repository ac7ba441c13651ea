"""Fits energies in two dimensions by maximum likelihood and by NCE, and draws docs/pictures/energy.png.

`python docs/make_pictures/energy.py` (needs matplotlib: the `test` extra); under a minute on one core. The data's density is
known and Z can be summed on a grid, so each fit is judged by its Kullback-Leibler divergence from the truth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wordsight.losses.energy import binary_nce, langevin, log_probs, maximum_likelihood

PICTURE = Path(__file__).parents[1] / "pictures" / "energy.png"
RADIUS, DEVIATION, MODES = 2.0, 0.3, 8
STEP_SIZE, LEVEL = 0.02, 0.02
HALF, CELLS = 4.0, 160  # the grid goes from -HALF to HALF in both directions


def log_density(x: Tensor) -> Tensor:
    """log p of the data, eight Gaussians on a ring: [N, 2] -> [N]."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    distance = (x[:, None] - centre).square().sum(2) / (2 * DEVIATION**2)
    return torch.logsumexp(-distance, 1) - math.log(MODES * 2 * math.pi * DEVIATION**2)


def draw(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2] of the data."""
    angle = torch.randint(MODES, (count,), generator=generator) * (2 * math.pi / MODES)
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + DEVIATION * torch.randn(count, 2, generator=generator)


class Energy(nn.Module):
    """An MLP on random waves (arXiv 2006.10739) in front of a wide Gaussian well, so that Z is finite whatever the MLP says."""

    waves: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(2, width // 2))
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2] -> [N]."""
        phase = x @ self.waves
        return self.net(torch.cat([phase.sin(), phase.cos()], 1))[:, 0] + x.square().sum(1) / 8


def fit(method: str, steps: int, generator: torch.Generator) -> tuple[Energy, float]:
    """An energy fitted by "likelihood" or "nce", and NCE's estimate of log Z (nan for maximum likelihood, which has none)."""
    energy, log_partition = Energy(), nn.Parameter(torch.zeros(()))
    noise_law = torch.distributions.Normal(torch.zeros(2), 2.0)
    batch, learning_rate = (256, 3e-3) if method == "likelihood" else (512, 5e-3)
    optimizer = torch.optim.Adam([*energy.parameters(), log_partition], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    chains = 2 * torch.randn(batch, 2, generator=generator)
    for _ in range(steps):
        data, noise = draw(batch, generator), 2 * torch.randn(batch, 2, generator=generator)
        if method == "likelihood":
            anew = torch.rand(batch, 1, generator=generator) < 0.02
            chains = torch.where(anew, noise, chains)
            loss, chains = maximum_likelihood(energy, data, chains, num_steps=10, step_size=STEP_SIZE, generator=generator)
            # the phases leave the energy's level free, and it drifts until Langevin's step is too long (1903.08689 holds it so)
            loss = loss + LEVEL * (energy(data).square().mean() + energy(chains).square().mean())
        else:
            at = [noise_law.log_prob(x).sum(1) for x in (data, noise)]
            loss = binary_nce(energy(data), at[0], energy(noise), at[1], log_partition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return energy, log_partition.item() if method == "nce" else math.nan


@torch.no_grad()
def judge(energy: Callable[[Tensor], Tensor]) -> tuple[Tensor, float, float]:
    """log p on the grid [CELLS, CELLS], log Z, and KL(data || model) in nats."""
    line = (torch.arange(CELLS) + 0.5) * (2 * HALF / CELLS) - HALF
    points = torch.cartesian_prod(line, line)
    volume = (2 * HALF / CELLS) ** 2
    energies, truth = energy(points).double(), log_density(points).double()
    found = log_probs(energies, volume=volume)
    divergence = (truth.exp() * (truth - found)).sum() * volume
    return found.reshape(CELLS, CELLS), -(energies + found)[0].item(), divergence.item()


def main() -> None:
    """Fit, print the figures, draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flat = judge(lambda x: x.square().sum(1) / 8)[2]
    print(f"before: KL {flat:.3f} nats")
    fits: dict[str, tuple[Energy, Tensor, float]] = {}
    for method, steps in (("likelihood", 1000), ("nce", 1500)):
        start = time.perf_counter()
        energy, estimate = fit(method, steps, generator)
        log_p, log_z, divergence = judge(energy)
        fits[method] = energy, log_p, divergence
        seconds = time.perf_counter() - start
        print(f"{method}: KL {divergence:.4f} nats, log Z {log_z:.3f} (its own estimate {estimate:.3f}), {seconds:.0f} s")
    start_at = 2 * torch.randn(2000, 2, generator=generator)
    chains = langevin(fits["likelihood"][0], start_at, num_steps=2000, step_size=STEP_SIZE, generator=generator)
    print(f"Langevin: {int((chains.abs() > HALF).any(1).sum())} of {len(chains)} chains are outside of the picture")

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.7), layout="constrained")
    style = {"extent": (-HALF, HALF, -HALF, HALF), "origin": "lower", "cmap": "magma", "vmin": 0}
    highest = log_density(draw(2000, generator)).max().exp().item()
    axes[0].scatter(*draw(2000, generator).T, s=2, color="black")
    axes[0].set_title("data")
    for axis, method, name in ((axes[1], "likelihood", "maximum likelihood"), (axes[3], "nce", "NCE, noise N(0, 4)")):
        axis.imshow(fits[method][1].exp().T, vmax=highest, **style)
        axis.set_title(f"density: {name}\nKL {fits[method][2]:.3f} nats")
    axes[2].scatter(*chains.T, s=2, color="black")
    axes[2].set_title("Langevin samples of it\n2,000 chains from N(0, 4)")
    for axis in axes:
        axis.set(xlim=(-HALF, HALF), ylim=(-HALF, HALF), aspect="equal", xticks=[], yticks=[])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
