"""Many texts for a text tower, in batches.

Shape legend: N texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def text_batches(texts: Sequence[str], batch_size: int) -> tuple[list[list[str]], Tensor]:
    """What is encoded of texts: each once, those of like length together, so that little padding is computed.

    Args:
        texts: N texts.
        batch_size: texts of a batch; the last one may be smaller.

    Returns:
        the batches, which depend on the set of texts alone; int64 [N], the row of each text in the batches one after the other.
    """
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row_of = {text: row for row, text in enumerate(unique)}
    batches = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
    return batches, torch.tensor([row_of[text] for text in texts], dtype=torch.int64)
