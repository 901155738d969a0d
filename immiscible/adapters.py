"""The couplings behind the interfaces of others' training code, which is told apart by its attributes and not imported.

from immiscible.adapters import OTPlanSampler, couple_p_losses

matcher.ot_sampler = OTPlanSampler()                            # torchcfm: ExactOptimalTransportConditionalFlowMatcher
couple_p_losses(diffusion, immiscible.AssignmentCoupling())     # denoising-diffusion-pytorch: GaussianDiffusion
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from immiscible.assignment.solve import assign
from immiscible.coupling import Coupling
from immiscible.errors import UserError


class OTPlanSampler:
    """torchcfm's ``OTPlanSampler``: the plan of least cost between noise ``x0`` and data ``x1``, in its naming of the two.

    The plan between as many noises as images, all of one weight, is a permutation, and it is returned as it is: the images stay in order
    and every noise is used once. torchcfm draws pairs from it, by default with replacement, so that some images come twice and others not
    at all; ``replace`` is accepted for its callers' sake.

    Args:
        metric: as in `assign`; torchcfm's cost is ``squared_l2``.
        solver: as in `assign`.
    """

    def __init__(self, metric: str = "squared_l2", solver: str = "auto") -> None:
        self.metric, self.solver = metric, solver

    def __repr__(self) -> str:
        return f"OTPlanSampler(metric={self.metric!r}, solver={self.solver!r})"

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """The noises x0 [B, ...] in the order of the data x1 [B, ...] that they go with, and x1.

        Raises:
            UserError: as `assign`, among others where there are not as many noises as images.
        """
        return x0[self._plan(x0, x1)], x1

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Tensor, y0: Tensor | None = None, y1: Tensor | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `sample_plan`, with the labels y0 [B] of the noises in their new order and y1 [B] of the data as they are."""
        index = self._plan(x0, x1)
        return x0[index], x1, None if y0 is None else y0[index], y1

    def _plan(self, x0: Tensor, x1: Tensor) -> Tensor:
        return assign(x1, x0, metric=self.metric, solver=self.solver)


def couple_p_losses(diffusion: Any, coupling: Coupling) -> None:
    """Makes ``diffusion.p_losses(x_start, t, noise=None, ...)`` of denoising-diffusion-pytorch train with the coupling's noise.

    The noise goes in by the method's own argument, so that what is added and what is to be predicted are the same.

    Args:
        diffusion: a ``GaussianDiffusion``; its ``p_losses`` is replaced on this object.
        coupling: called as ``coupling(x_start, noise, timesteps=t, labels=classes)``, with the classes that are trained, if there are any.

    Raises:
        UserError: it was built with ``immiscible=True``, which permutes the noise that is added once more, but not the target.
    """
    if getattr(diffusion, "immiscible", False):
        raise UserError("this GaussianDiffusion permutes noises itself, behind the back of its own target: build it with immiscible=False")
    p_losses = diffusion.p_losses

    def coupled(x_start: Tensor, t: Tensor, noise: Tensor | None = None, *args: Any, **options: Any) -> Any:
        noise = coupling(x_start, noise, timesteps=t, labels=options.get("classes"))
        # By name, as with classes there is no place for it; what comes after it by its place needs it in its own.
        return p_losses(x_start, t, noise, *args, **options) if args else p_losses(x_start, t, noise=noise, **options)

    diffusion.p_losses = coupled
