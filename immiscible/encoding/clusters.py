"""Captions as classes: images whose captions say something alike, inside which noises can be assigned (experimental)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from immiscible.data.sources import ImageSource

logger = logging.getLogger(__name__)

IMAGES_OF_A_CLUSTER = 200  # on average; fewer leave an assignment little to choose from, more tell more of the caption
TOGETHER = 256  # captions encoded at once


@torch.no_grad()
def caption_clusters(source: ImageSource, pooled: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Which cluster the first caption of each image is in, by k-means of the captions' pooled text states, scaled to unit length.

    Args:
        source: with captions.
        pooled: gives captions' pooled text states, [B, E] on any device.

    Returns:
        int64 [N]; -1 for an image whose captions cannot be read. The same whenever the captions and the text encoder are.
    """
    from sklearn.cluster import MiniBatchKMeans

    captions: list[str | None] = []
    for index in tqdm(range(len(source)), desc="reading captions", unit="caption", delay=2, leave=False, disable=None):
        try:
            captions.append(source.captions(index)[0])
        except (OSError, ValueError):
            captions.append(None)
    distinct = sorted({caption for caption in captions if caption is not None})
    starts = tqdm(range(0, len(distinct), TOGETHER), desc="encoding captions", delay=2, leave=False, disable=None)
    states = torch.cat([pooled(distinct[start : start + TOGETHER]).float().cpu() for start in starts])
    clusters = max(1, min(len(distinct), round(len(captions) / IMAGES_OF_A_CLUSTER)))
    means = MiniBatchKMeans(clusters, random_state=0, n_init=3)
    found = means.fit_predict(torch.nn.functional.normalize(states, dim=1).numpy())
    of_caption = dict(zip(distinct, found.tolist(), strict=True))
    logger.warning(
        "--coupling_condition within on captions (experimental): %d captions fall into %d clusters of like text states, inside which "
        "noises are assigned",
        len(distinct),
        clusters,
    )
    return torch.tensor([-1 if caption is None else of_caption[caption] for caption in captions])
