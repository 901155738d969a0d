"""Conditions: couplings that do not tell the class, and a probe that says how much a coupling tells.

A coupling that goes by the image alone makes the noise a clue to the condition: bright images get bright noises, so a network that is
told the class learns from noise that already agrees with it, while sampling starts from noise that says nothing (the reviewers'
objection to Immiscible Diffusion; C2OT, arXiv 2503.10636, measures the harm). The condition of an image is its class, int64, or its
caption's pooled text state, floating. Three ways to pair with regard to it, all of them permutations of the batch's noises, so that
the noise's marginal stays exactly standard normal:

- ``within``: noises change places among images of one class only. The noise says nothing about the class, but a class with one image
  in the batch has nothing to exchange.
- ``centered``: the assignment of x0 - E[x0 | condition], as far as it is known. Ours and experimental: the class's mean is gone from the
  noise, differences between the classes' covariances are not. On the digits a linear probe finds nothing, a quadratic one still reads
  the class in 19 % of cases (chance 11 %).
- ``penalty``: an exchange between conditions costs extra (C2OT), so much that few pairs are still worth it.

``scripts/benchmark_conditions.py`` measures what each tells and what it costs in distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from immiscible.assignment.solve import solve
from immiscible.errors import UserError

CONDITIONS = ("none", "within", "centered", "penalty")

SAME_CONDITION = 1e-6  # cosine distance below which two text states are one caption, computed twice
ROWS_FOR_RATIO = 1024  # images whose candidates are counted for the penalty's ratio; an even sample of a larger batch


def check_labels(labels: Tensor | None, condition: str, images: int) -> Tensor:
    """``labels``, if ``condition`` can work with them for this number of images.

    Raises:
        UserError: there are none, their shape or dtype is wrong, a class is negative, or a text state is NaN or infinite (named).
    """
    if labels is None:
        raise UserError(f"`condition` {condition} needs every image's class or text state: coupling(x0, noise, labels=labels)")
    classes = labels.dtype == torch.int64 and labels.shape == (images,)
    states = labels.is_floating_point() and labels.dim() == 2 and len(labels) == images
    if not classes and not states:
        raise UserError(
            f"labels must be int64 [{images}] (classes) or floating [{images}, E] (text states), not {labels.dtype} {list(labels.shape)}"
        )
    if states and condition == "within":
        raise UserError("`condition` within needs classes, int64 labels, and not text states; use centered or penalty")
    wrong = ~torch.isfinite(labels).all(1) if states else labels < 0
    if wrong.any():
        what = "holds NaN or infinite values" if states else "is negative; classes are numbered from 0"
        raise UserError(f"label {int(wrong.nonzero()[0])} of the batch {what}")
    return labels


def conditioned_index(cost: Tensor, labels: Tensor | None, condition: str, ratio: float, solver: str) -> Tensor:
    """The permutation of least summed cost under a condition, as `assign` gives it without one.

    Args:
        cost: fp32 [N, N], any device, finite: of image i and noise j, which comes with image j's condition.
        labels: int64 [N] or floating [N, E], on any device; not used with ``none`` and ``centered``.
        condition: one of `CONDITIONS`; ``centered`` is a matter of the cost alone (`centered`), which is solved as it is.
        ratio: of ``penalty``; see `penalty_weight`.
        solver: as in `solve`.

    Returns:
        int64 [N] on the cost's device: image i goes with noise ``index[i]``.

    Raises:
        UserError: see `check_labels`.
    """
    if len(cost) == 1:
        return torch.zeros(1, dtype=torch.int64, device=cost.device)
    if condition in ("none", "centered"):
        return solve(cost, solver=solver).index
    labels = check_labels(labels, condition, len(cost))
    if condition == "within":
        return _within(cost, labels, solver)
    distance = condition_distance(labels.to(cost.device))
    weight = penalty_weight(cost, distance, ratio)
    if weight == math.inf:
        return _within(cost, (distance == 0).int().argmax(1), solver)  # the first image of the same condition stands for all
    return solve(cost + weight * distance, solver=solver).index if weight else solve(cost, solver=solver).index


def condition_distance(labels: Tensor) -> Tensor:
    """How far apart the conditions of images i and j are, fp32 [N, N], as in C2OT: 0 or 1 for classes, 1 - cosine for text states."""
    if not labels.is_floating_point():
        return (labels[:, None] != labels).float()
    unit = torch.nn.functional.normalize(labels.double(), dim=1)
    distance = (1 - unit @ unit.T).float().fill_diagonal_(0)
    return distance.masked_fill_(distance < SAME_CONDITION, 0)


def penalty_weight(cost: Tensor, distance: Tensor, ratio: float) -> float:
    """The least w >= 0 that leaves a share of at most ``ratio`` of all N^2 pairs as candidates (C2OT's adaptive weight).

    Noise j is a candidate of image i if it beats the image's own one in spite of its condition: ``cost_ij + w distance_ij < cost_ii``,
    where the cost is taken less each column's mean, since constants of columns (such as a noise's length) change no assignment and
    `cost_matrix` leaves them open. The paper compares full distances, counts each image's own noise too (1/N more) and searches w by
    bisection; here w is read off as an order statistic of ``(cost_ii - cost_ij) / distance_ij``.

    Pairs of equal condition cost nothing extra and stay candidates at any w: where they alone exceed ``ratio`` the result is infinite,
    which is what C2OT takes for classes, and pairing is within equal conditions. So with K equally frequent classes, of whose pairs about
    half are candidates, a finite weight needs a ratio above 1 / (2 K).

    Args:
        cost: fp32 [N, N], finite.
        distance: fp32 [N, N], >= 0; see `condition_distance`.
        ratio: r, 0 to 1; from about 0.5 on w is 0.
    """
    rows = slice(None, None, -(-len(cost) // ROWS_FOR_RATIO))
    means = cost.mean(0)  # [N]
    gain, apart = (cost.diagonal() - means)[rows, None] - (cost[rows] - means), distance[rows]
    candidates = gain > 0
    spare = math.floor(ratio * gain.numel()) - int((candidates & (apart == 0)).sum())
    if spare < 0:
        return math.inf
    candidates &= apart > 0
    last_worthwhile = gain[candidates] / apart[candidates]  # the w up to which the pair is a candidate
    if len(last_worthwhile) <= spare:
        return 0.0
    return float(last_worthwhile.kthvalue(len(last_worthwhile) - spare).values)


def _within(cost: Tensor, groups: Tensor, solver: str) -> Tensor:
    """Each group's own assignment: int64 [N] on the cost's device; ``groups`` is int64 [N]."""
    on_cpu, groups = cost.cpu(), groups.cpu()  # where the solver is; many small problems should not cross the bus one by one
    index = torch.arange(len(cost), device="cpu")
    sizes = groups.unique(return_counts=True)[1].tolist()
    for rows in groups.argsort(stable=True).split(sizes):
        if len(rows) > 1:
            index[rows] = rows[solve(on_cpu[rows[:, None], rows], solver=solver).index]
    return index.to(cost.device)


def centered(x0: Tensor, labels: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """x0 less what its condition predicts of it from the images of earlier calls.

    A batch enters only what later batches are centered by. Otherwise the only image of its class would be moved towards zero by itself,
    and with it all that it could be assigned by; and a noise would depend on an estimate that its own image had a part in.

    Classes: the mean of the class, before its first image the mean of all images, before the first batch zero. Text states: ridge
    regression with an intercept, by recursive least squares in information form (sums of products, solved anew in each call). The ridge
    is the mean squared length of a text state, so that it counts as one image.

    Args:
        x0: [N, ...], floating point, any device.
        labels: int64 [N], or floating [N, E].
        state: what the last call returned, on any device, or empty. It is not changed.

    Returns:
        fp32 [N, ...], and the state that knows this batch too, on x0's device. With D numbers in an image it holds for classes ``mean``
        fp32 [K, D] and ``count`` int64 [K], where K - 1 is the largest class so far; for text states ``gram`` float64 [E + 1, E + 1] and
        ``cross`` fp32 [E + 1, D], the sums of ``(e, 1) (e, 1)^T`` and of ``(e, 1) x0^T``.

    Raises:
        UserError: the state is of images of another size.
    """
    images, labels = x0.detach().flatten(1).float(), labels.to(x0.device)
    held = {name: tensor.to(x0.device) for name, tensor in state.items()}
    dimension = next((held[name].shape[1] for name in ("mean", "cross") if name in held), images.shape[1])
    if dimension != images.shape[1]:
        raise UserError(f"the means that `condition` centered keeps are of {dimension} numbers, the images have {images.shape[1]}")
    predicted, entered = (_linear_prediction if labels.is_floating_point() else _class_means)(images, labels, held)
    return (images - predicted).view_as(x0), entered


def _class_means(images: Tensor, labels: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of each image's class before this batch, fp32 [N, D], and the state after it."""
    present, label, number = labels.unique(return_inverse=True, return_counts=True)  # [U], [N], [U]
    mean = state.get("mean", images.new_zeros(0, images.shape[1]))
    count = state.get("count", labels.new_zeros(0))
    missing = max(0, int(present[-1]) + 1 - len(count))
    mean, count = torch.nn.functional.pad(mean, (0, 0, 0, missing)), torch.nn.functional.pad(count, (0, missing))

    known = count[present, None]  # [U,1]
    overall = (count / count.sum().clamp(min=1)).float() @ mean  # [D]
    predicted = torch.where(known > 0, mean[present], overall)[label]
    sums = torch.nn.functional.one_hot(label, len(present)).float().T @ images  # [U,D] no atomic additions: the same on every run
    after = known + number[:, None]
    updated = mean[present] + (sums - number[:, None] * mean[present]) / after
    return predicted, {"mean": mean.index_copy(0, present, updated), "count": count.index_copy(0, present, after[:, 0])}


def _linear_prediction(images: Tensor, states: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What ridge regression on the batches before this one predicts, fp32 [N, D], and the state after it."""
    inputs = torch.nn.functional.pad(states.double(), (0, 1), value=1.0)  # [N,E+1]
    products = {"gram": inputs.T @ inputs, "cross": inputs.float().T @ images}
    if not state:
        return torch.zeros_like(images), products
    gram = state["gram"]
    squared_length = gram.diagonal()[:-1].sum() / gram[-1, -1]
    ridge = squared_length.clamp(min=1e-12).repeat(len(gram))
    ridge[-1] = 0  # the intercept
    weights = torch.cholesky_solve(inputs.T, torch.linalg.cholesky(gram + ridge.diag()))  # [E+1,N]
    return weights.float().T @ state["cross"], {name: state[name] + product for name, product in products.items()}
