"""Noise coupling in lucidrains' denoising-diffusion-pytorch (read at faed4db, 2.3.4): see README.md beside this file.

All its diffusions take a noise in `p_losses`, but `ElucidatedDiffusion` (EDM), which draws inline.
"""

from __future__ import annotations

import sys
from typing import Any

from immiscible_draws import couple_draws

import immiscible
from immiscible.adapters import couple_p_losses


def install(diffusion: Any, coupling: immiscible.Coupling) -> None:
    """Makes ``diffusion`` train by ``coupling``; of ElucidatedDiffusion this holds for all objects of its class.

    Raises:
        immiscible.UserError: it was built with ``immiscible=True``, which permutes the noise that is added and not the target.
    """
    if hasattr(diffusion, "p_losses"):
        couple_p_losses(diffusion, coupling)
    else:
        couple_draws(sys.modules[type(diffusion).__module__], coupling)
