"""What networks say of a set of images, as metrics take it, and an order of its rows that is the same whichever they came in."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from immiscible.errors import UserError
from immiscible.randomness import seeded_generator

CHECKED = 1024  # rows looked at together: a check of all at once would take as much memory as they do


@dataclass
class ImageSet:
    """What is known of N images: of each network what it said, one row an image, on the CPU. A metric asks for what it needs of it.

    Rows may come in any order and from any number of batches or ranks; who gathers them drops what a sampler repeated. What is a float
    becomes float64 here: sums over pairs of float32 features differ by a percent from run to run.

    Args:
        features: [N, F], what a `FeatureNetwork` gives.
        spatial: [N, S], the network's features before they are pooled, flattened.
        probabilities: [N, K], how likely a classifier thinks each class, after its softmax.
        image_embeddings: [N, E], of CLIP.
        text_embeddings: [N, E], of the same CLIP, of each image's caption.
        labels: whole numbers [N], the classes.

    Raises:
        UserError: rows are not equally many, or hold NaN or infinite values.
    """

    features: Tensor | None = None
    spatial: Tensor | None = None
    probabilities: Tensor | None = None
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        rows = {}
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            rows[field.name] = len(values)
            if not all(bool(part.isfinite().all()) for part in values.split(CHECKED)):
                raise UserError(f"the images' {field.name.replace('_', ' ')} hold NaN or infinite values", exit_code=1)
            setattr(self, field.name, values.long() if field.name == "labels" else values.double())
        if len(set(rows.values())) > 1:
            raise UserError(f"a set of images has rows of different number: {', '.join(f'{n} {name}' for name, n in rows.items())}")


def shuffled(rows: Tensor, purpose: str) -> Tensor:
    """int64 [N]: a random order of the rows, float64 [N, F], that depends on what they hold and not on where each stands.

    They are sorted by their projection onto a fixed random direction, in which only equal rows are tied, and then shuffled by a fixed
    seed. So a random choice of a set's images is the same for any batch size and number of ranks.
    """
    direction = torch.randn(rows.shape[1], dtype=torch.float64, generator=seeded_generator("order of a set"))
    return (rows @ direction).argsort(stable=True)[torch.randperm(len(rows), generator=seeded_generator(purpose))]
