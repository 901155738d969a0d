"""What paired noise tells about the class: probes, and the notice that a conditional run gives."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from immiscible.coupling import Coupling, restore_coupling

QUADRATIC_RANK, QUADRATIC_SAMPLE = 16, 256  # directions that the quadratic probe sees, and images by which it chooses them


class Leak(TypedDict):
    """What paired noise tells about the class; see `class_leak`."""

    accuracy: float
    quadratic_accuracy: float
    chance: float
    mean_shift: dict[int, float]
    largest_mean_shift: float


def class_leak(noise: Tensor, labels: Tensor, x0: Tensor) -> Leak:
    """How well the class can be read from the noise that an image of it was paired with.

    Two probes see the noise in few directions, in which a coupling by distance leaves its mark; looked for in all D directions the same
    mark drowns in the estimation error of D numbers per class. The linear one is a discriminant with a shared covariance in the span of
    the classes' mean images: it reads the noise's mean. The quadratic one has a covariance per class in the `QUADRATIC_RANK` directions
    in which images differ most: it also reads how far the noise scatters. Covariances are shrunk towards the unit matrix, class means by
    James and Stein's factor, and the prior is the classes' shares. Either is fitted to one half of the images and tried on the other,
    both ways; every second image of a class is in the second half. Marks in other directions, as of flipped assignment, are not seen.

    Args:
        noise: as paired with x0, [N, ...], any floating type; a few thousand of them, of many batches.
        labels: int64 [N].
        x0: the images, [N, ...].

    Returns:
        ``accuracy`` and ``quadratic_accuracy``, held out, beside ``chance``, the share of the most frequent class, which they come to for
        independent noise; ``mean_shift`` of each class: the component of its mean noise minus that of all other noises, along its mean
        image minus that of all other images, in standard deviations of that component (about +-sqrt(1/n_class) for independent noise);
        and ``largest_mean_shift``, the largest of them in absolute value.
    """
    noises, images = noise.detach().flatten(1).float(), x0.detach().flatten(1).float()
    classes, label, count = labels.unique(return_inverse=True, return_counts=True)
    members = torch.nn.functional.one_hot(label, len(classes)).float()  # [N,K]
    order = label.argsort(stable=True)
    place = torch.empty_like(label)
    place[order] = torch.arange(len(label), device=label.device) - (count.cumsum(0) - count)[label[order]]  # its number within the class
    linear = quadratic = 0
    for fit in (place % 2 == 1, place % 2 == 0):
        if fit.any():
            fitted = members * fit[:, None]
            linear += int((_linear_probe(noises, images, fitted, fit) == label)[~fit].sum())
            quadratic += int((_quadratic_probe(noises, images, fitted, fit) == label)[~fit].sum())
    shift = _mean_shift(noises, images, members).tolist()
    return Leak(
        accuracy=linear / len(label),
        quadratic_accuracy=quadratic / len(label),
        chance=int(count.max()) / len(label),
        mean_shift=dict(zip(classes.tolist(), shift, strict=True)),
        largest_mean_shift=max(map(abs, shift)),
    )


def _linear_probe(noises: Tensor, images: Tensor, members: Tensor, fit: Tensor) -> Tensor:
    """Each row's class by the linear probe of `class_leak`, int64 [N], fitted to the rows ``fit``, bool [N]; ``members`` is 0 elsewhere."""
    number = members.sum(0)[:, None]  # [K,1]
    offsets = ((members.T @ images) / number.clamp(min=1) - images[fit].mean(0)).masked_fill(number == 0, 0)  # [K,D]
    seen = (noises @ _leading_directions(offsets, len(offsets))).double()  # [N,R], R < K
    seen, means, share = _class_statistics(seen, members, fit)
    within = (seen - members.double() @ means)[fit]
    rank, freedom = seen.shape[1], max(0, len(within) - int((number > 0).sum()))
    unit = torch.eye(rank, dtype=seen.dtype, device=seen.device)
    covariance = (within.T @ within + rank * unit) / (freedom + rank) if rank else unit
    weights = torch.linalg.solve(covariance, means.T)  # [R,K]
    return (seen @ weights - (means.T * weights).sum(0) / 2 + share.log()).argmax(1)


def _quadratic_probe(noises: Tensor, images: Tensor, members: Tensor, fit: Tensor) -> Tensor:
    """As `_linear_probe`, for the quadratic probe."""
    sample = images[fit][:: -(-int(fit.sum()) // QUADRATIC_SAMPLE)]
    seen = (noises @ _leading_directions(sample - sample.mean(0), QUADRATIC_RANK)).double()  # [N,R]
    seen, means, share = _class_statistics(seen, members, fit)
    rank = seen.shape[1]
    within = seen - members.double() @ means
    scatter = members.double().T @ (within[:, :, None] * within[:, None, :]).flatten(1)  # [K,R*R]
    unit, prior = torch.eye(rank, dtype=seen.dtype, device=seen.device), 4 * rank
    covariance = (scatter.view(len(means), rank, rank) + prior * unit) / (members.double().sum(0)[:, None, None] + prior)
    precision = covariance.inverse()
    weights = (precision @ means[:, :, None])[:, :, 0]  # [K,R]
    squares = (seen[:, :, None] * seen[:, None, :]).flatten(1) @ precision.flatten(1).T  # [N,K]
    constant = (means * weights).sum(1) + covariance.logdet()
    return (seen @ weights.T - (squares + constant) / 2 + share.log()).argmax(1)


def _leading_directions(offsets: Tensor, most: int) -> Tensor:
    """At most ``most`` orthonormal directions in which rows [M, D] of mean zero are largest, fp32 [D, R]."""
    values, vectors = torch.linalg.eigh((offsets @ offsets.T).double())
    kept = values[-most:] > 1e-6 * values[-1]
    return offsets.T @ (vectors[:, -most:][:, kept] / values[-most:][kept].sqrt()).float()


def _class_statistics(seen: Tensor, members: Tensor, fit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What both probes begin with: ``seen`` [N, R] less its mean over ``fit``, the classes' shrunk means [K, R] and shares [K]."""
    seen = seen - seen[fit].mean(0)
    number = members.double().sum(0)[:, None]
    means = members.double().T @ seen / number.clamp(min=1)
    shrunk = (1 - seen.shape[1] / (number * means.square().sum(1, keepdim=True)).clamp(min=1e-12)).clamp(min=0)
    return seen, means * shrunk, number[:, 0] / number.sum()


def _mean_shift(noises: Tensor, images: Tensor, members: Tensor) -> Tensor:
    """``mean_shift`` of `class_leak`, [K]; 0 if there is one class."""
    number = members.sum(0)[:, None]
    others = (len(members) - number).clamp(min=1)
    apart = (
        (members.T @ rows) / number - (rows.sum(0) - members.T @ rows) / others if len(number) > 1 else torch.zeros_like(rows[:1])
        for rows in (images, noises)
    )
    image_apart, noise_apart = apart
    axes = torch.nn.functional.normalize(image_apart)  # [K,D]
    deviation = (noises @ axes.T).std(0, correction=0).clamp(min=1e-12)
    return (noise_apart * axes).sum(1) / deviation


class ClassLeak:
    """`class_leak` of the last images of a run: one batch is too small to tell.

    Args:
        capacity: how many images are kept, with their noises, in bfloat16 (4 D bytes an image) on their device; older batches are dropped.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._batches: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    def add(self, noise: Tensor, labels: Tensor, x0: Tensor) -> None:
        """A batch, as in `class_leak`; one larger than the capacity is kept as a whole."""
        self._batches.append((noise.detach().bfloat16(), labels, x0.detach().bfloat16()))
        while sum(len(labels) for _, labels, _ in self._batches) - len(self._batches[0][1]) >= self.capacity:
            self._batches.popleft()

    def result(self) -> Leak:
        """The leak among the kept images; at least one batch was added."""
        return class_leak(*(torch.cat(column) for column in zip(*self._batches, strict=True)))


def bright_and_dark(images: int, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The reviewers' example: two equally likely classes, dark (0) and bright (1), of smooth colour pictures.

    Args:
        images: N.
        shape: (C, H, W) of an image.
        generator: on the CPU.

    Returns:
        x0 fp32 [N, C, H, W] in [-1, 1] and labels int64 [N].
    """
    labels = torch.randint(2, (images,), device="cpu", generator=generator)
    channels, height, width = shape
    brightness = 0.8 * labels - 0.4 + 0.1 * torch.randn(images, device="cpu", generator=generator)
    coarse = torch.randn(images, channels, 4, 4, device="cpu", generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    grain = torch.randn(images, channels, height, width, device="cpu", generator=generator)
    return (brightness[:, None, None, None] + 0.3 * picture + 0.1 * grain).clamp(-1, 1), labels


def toy_leak(couple: Callable[[Tensor], Tensor]) -> Leak:
    """What ``couple(x0) -> noise`` tells about the class on eight batches of 256 images of 8x8 by `bright_and_dark`, of one seed."""
    generator = torch.Generator("cpu").manual_seed(0)
    leak = ClassLeak()
    for _ in range(8):
        x0, labels = bright_and_dark(256, (3, 8, 8), generator)
        leak.add(couple(x0), labels, x0)
    return leak.result()


NOTICEABLE_LEAK = 0.05  # accuracy above chance from which `leak_notice` speaks


def leak_notice(coupling: Coupling, num_classes: int, *, captions: bool = False) -> str:
    """What ``coupling`` lets the noise tell about the class, with numbers, for the user of a conditional run to read once.

    Empty for a coupling that has regard to the labels, and for one that tells nothing. The numbers are measured on `toy_leak`, with a
    copy of ``coupling``.

    Args:
        coupling: any.
        num_classes: how many classes, or captions, the network is told apart.
        captions: whether these are captions, among which there are no groups to pair within.
    """
    # What a GlobalCoupling or an AboveTimestep holds; its state is of the run's images, which have another shape than the toy's.
    inner: Any = copy.deepcopy(getattr(coupling, "coupling", coupling))
    if num_classes < 2 or getattr(inner, "condition", "none") != "none":
        return ""
    restore_coupling(inner, {})
    generator = torch.Generator("cpu").manual_seed(0)
    leak = toy_leak(lambda x0: inner(x0, generator=generator))
    if leak["accuracy"] < leak["chance"] + NOTICEABLE_LEAK:
        return ""
    first, kind = getattr(coupling, "min_timestep", 0), "captions" if captions else "classes"
    remedy = (
        "--coupling_condition centered (experimental) or penalty has regard to captions"
        if captions
        else "--coupling_condition within, over the epoch at best, avoids it and --log_class_leak measures it"
    )
    effect = "harms unguided samples and helps strongly guided ones of few steps"
    if captions:
        effect = "was no better than independent noise, with guidance or without"
    return (
        f"{f'from timestep {first} on, ' if first else ''}the coupling pairs by the image alone: in training the noise tells which of "
        f"{num_classes} {kind} is wanted, in sampling it does not (a linear probe reads the class of a toy from the noise in "
        f"{leak['accuracy']:.0%} of cases, chance {leak['chance']:.0%}). It {effect} (docs/RESULTS.md); "
        f"--noise_coupling assignment with {remedy}"
    )
