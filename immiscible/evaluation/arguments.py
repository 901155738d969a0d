"""The flags of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from immiscible.errors import UserError
from immiscible.flags import Names, flag


@dataclass
class EvaluationArguments:
    """What is measured while training. Evaluation draws nothing from training's randomness: weights come out bit-equal without it."""

    _argument_group_name = "evaluation"

    eval_steps: int | None = flag(
        None, "optimizer steps between evaluations, into evaluation.jsonl; not given, nothing is evaluated", least=1
    )
    eval_inference_steps: list[int] = flag(  # noqa: RUF009
        [5, 20], "numbers of inference steps at which samples are compared with the data", least=1, most=10**5
    )
    eval_guidance_scales: list[float] = flag(  # noqa: RUF009
        [1.0],
        "guidance scales at which they are, each at all these numbers of steps; 1 is none; others need --class_dropout_prob, or captions",
        least=0,
        most=100,
    )
    eval_samples: int = flag(1500, "samples per number of inference steps, from the same noises in every run", least=1, most=10**7)
    eval_features: str | None = flag(
        None,
        "what the Frechet distance compares: digits (a classifier of the bundled digits; FD-digits) or pixels (8x8 pooled; "
        "FD-pixels-8x8); by default digits for the bundled digits and pixels for other data. Neither is FID",
        choices=Names("immiscible.evaluation.features", "FEATURES"),
    )
    validation_split: float | None = flag(
        None, "share of the images to hold out for a loss per noise level, at --eval_steps", above=0, below=1
    )

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one needs another.
        """
        if self.validation_split is not None and self.eval_steps is None:
            raise UserError("--validation_split holds images out for evaluation: give --eval_steps too")
