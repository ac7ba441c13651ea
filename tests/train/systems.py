"""Small systems for the training tests: a CLIP of two thin towers, a classifier with batch norm, two terms with counts of their
own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig
from wordsight.types import Batch, Term


def tiny_clip(patch_dropout: float = 0.0, stochastic_depth: float = 0.0, duplicates: str = "plain", seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(
        CLIPConfig(
            embed_dim=8,
            image=ViTConfig(
                image_size_px=16,
                patch_size_px=4,
                width=16,
                num_layers=2,
                num_heads=2,
                patch_dropout=patch_dropout,
                stochastic_depth=stochastic_depth,
            ),
            text=TextConfig(vocab_size=32, context_length=6, width=16, num_layers=2, num_heads=2),
            duplicates=duplicates,
        )
    )


def tiny_batch(rows: int = 12, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (rows, 6), generator=g)
    tokens[:, 4] = 31
    tokens[:, 5] = 0
    return Batch(
        pixels=torch.randn(rows, 3, 16, 16, generator=g, dtype=torch.float64).to(dtype),
        tokens=tokens,
        text_ids=torch.arange(rows) // 2,
        image_ids=torch.arange(rows),
        keys=tuple(f"sample-{i}" for i in range(rows)),
    )


class TwoTerms(nn.Module):
    """Not contrastive: a term that counts pixels above zero, and one that counts samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 1)

    def loss(self, batch: Batch) -> dict[str, Term]:
        maps = self.conv(batch.pixels)
        seen = (batch.pixels[:, :1, 1:-1, 1:-1] > 0).to(maps.dtype)
        return {
            "bright": Term(sum=(maps.square() * seen).sum(), count=seen.sum(), weight=0.3),
            "mean": Term(sum=(self.head(maps.mean((2, 3))) - 1).square().sum(), count=len(batch)),
        }


class Normed(nn.Module):
    """Contrastive, with batch norm in its image tower: of maps, or of vectors, which have one value per channel."""

    def __init__(self, vectors: bool = False) -> None:
        super().__init__()
        parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 8)]
        if vectors:
            parts = [nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16), nn.Linear(3 * 16 * 16, 8)]
        self.tower = nn.Sequential(*parts)
        self.text = nn.Embedding(32, 8)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def loss(self, batch: Batch) -> dict[str, Term]:
        return self.loss_from_embeddings(self.embeddings(batch))

    def embeddings(self, batch: Batch) -> dict[str, Tensor]:
        return {"image": self.tower(batch.pixels), "text": self.text(batch.tokens).mean(1)}

    def loss_from_embeddings(self, embeddings: dict[str, Tensor], ring: None = None) -> dict[str, Term]:
        assert ring is None, "this system is for gathered embeddings"
        logits = (
            self.log_scale.exp() * nn.functional.normalize(embeddings["image"]) @ nn.functional.normalize(embeddings["text"]).T
        )
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="sum")
        return {"pairs": Term(sum=loss, count=len(logits))}

    def loss_parameters(self) -> list[nn.Parameter]:
        return [self.log_scale]
