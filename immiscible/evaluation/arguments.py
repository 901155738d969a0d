"""The flags of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from immiscible.evaluation.features import FEATURES
from immiscible.flags import flag


@dataclass
class EvaluationArguments:
    """What is measured while training. Evaluation draws nothing from training's randomness: weights come out bit-equal without it."""

    _argument_group_name = "evaluation"

    eval_steps: int | None = flag(None, "optimizer steps between evaluations, into evaluation.jsonl; not given, nothing is evaluated")
    eval_inference_steps: list[int] = field(
        default_factory=lambda: [5, 20], metadata={"help": "numbers of inference steps at which samples are compared with the data"}
    )
    eval_samples: int = flag(1500, "samples per number of inference steps, from the same noises in every run")
    eval_features: str | None = flag(
        None,
        "what the Frechet distance compares: digits (a classifier of the bundled digits; FD-digits) or pixels (8x8 pooled; "
        "FD-pixels-8x8); by default digits for the bundled digits and pixels for other data. Neither is FID",
        choices=FEATURES,
    )
    validation_split: float | None = flag(None, "share of the images to hold out for a loss per noise level, at --eval_steps")
