"""Captions as classes: like text states fall together, the same ones every time."""

import torch

from immiscible.encoding.clusters import caption_clusters

DIRECTIONS = {"cat": 0, "dog": 1, "house": 2}


class Captioned:
    """Three kinds of captions in turn, each in many wordings; one image has none."""

    def __len__(self) -> int:
        return 600

    def captions(self, index: int) -> list[str]:
        if index == 7:
            raise ValueError("no caption")
        return [f"{list(DIRECTIONS)[index % 3]} number {index // 6}", "another one"]


def pooled(captions):
    states = torch.zeros(len(captions), 8)
    for row, caption in enumerate(captions):
        kind, _, number = caption.split()
        states[row, DIRECTIONS[kind]] = 5 + int(number) / 100
        states[row, 3 + int(number) % 5] = 0.3
    return states


def test_like_captions_fall_together():
    clusters = caption_clusters(Captioned(), pooled)
    assert clusters[7] == -1 and torch.equal(clusters, caption_clusters(Captioned(), pooled))
    kept = torch.arange(600) != 7
    kinds = torch.arange(600) % 3
    assert len(clusters[kept].unique()) == 3
    for kind in range(3):
        assert len(clusters[kept & (kinds == kind)].unique()) == 1
