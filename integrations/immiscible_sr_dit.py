"""Noise coupling in SR-DiT (SpeedrunDiT, read at c24c2ff): see README.md beside this file.

`loss.SILoss` draws inline, the images' noise and that of their class token. The second stays as it is drawn.
"""

from __future__ import annotations

from importlib import import_module

from immiscible_draws import couple_draws

import immiscible


def install(coupling: immiscible.Coupling) -> None:
    """Pairs the images' noise by ``coupling`` from now on."""
    couple_draws(import_module("loss"), coupling)
