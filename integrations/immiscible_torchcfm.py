"""Any coupling in torchcfm (1.0.7): see README.md beside this file.

The matchers of optimal transport ask their ``ot_sampler`` for pairs of noise ``x0`` and data ``x1``. For assignment alone
`immiscible.adapters.OTPlanSampler` is enough; here it may be a reservoir, the nearest, or an assignment inside classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import immiscible


class Pairs:
    """The interface of torchcfm's ``OTPlanSampler``; the data stay in order."""

    def __init__(self, coupling: immiscible.Coupling) -> None:
        self._coupling = coupling

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """A noise for each of x1 [B, ...], and x1."""
        return self._coupling(x1, x0), x1

    def sample_plan_with_labels(self, x0: Tensor, x1: Tensor, y0: Any = None, y1: Any = None, replace: bool = True) -> Any:
        """As `sample_plan`, inside the classes y1 [B] where the coupling looks at them.

        Raises:
            immiscible.UserError: the noises have labels, which a coupling does not carry along.
        """
        if y0 is not None:
            raise immiscible.UserError("y0 labels noises; immiscible.adapters.OTPlanSampler carries such labels along")
        return self._coupling(x1, x0, labels=y1), x1, y0, y1


def install(matcher: Any, coupling: immiscible.Coupling) -> None:
    """Makes ``matcher`` pair by ``coupling``.

    Raises:
        immiscible.UserError: it asks nobody for pairs.
    """
    if not hasattr(matcher, "ot_sampler"):
        raise immiscible.UserError(f"{type(matcher).__name__} pairs nothing; take ExactOptimalTransportConditionalFlowMatcher")
    matcher.ot_sampler = Pairs(coupling)
