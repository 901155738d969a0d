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
    eval_raw_weights: bool = flag(
        False, "measure the weights themselves beside their average of --use_ema, into `raw` of the same line: what the average's lag costs"
    )
    eval_metrics: list[str] = flag(  # noqa: RUF009
        ["frechet_distance"],
        "what else to measure of the same samples and their features, e.g. kid precision recall, see docs/SCORES.md; those by class need "
        "--class_conditional; frechet_distance is measured always, as reports draw their curves of it",
        choices=Names("immiscible.evaluation.metrics", "METRICS"),
    )
    eval_features: str | None = flag(
        None,
        "what the Frechet distance compares: digits (a classifier of the bundled digits; FD-digits), pixels (8x8 pooled; FD-pixels-8x8), "
        "efficientnet (EfficientNet-lite0, which has seen ImageNet; FD-EfficientNet; 1,280 features), inception (its network; FID; 2,048), "
        "clip, clip-l14-336 or dinov2 (FD-DINOv2; 1,024); the weights of the last four are fetched by hand, see docs/SCORES.md; by default "
        "digits for the bundled digits and pixels for other data",
        choices=Names("immiscible.evaluation.features", "FEATURES"),
    )
    eval_feature_directions: int | None = flag(
        None, "measure along so many directions in which the data's features vary most, e.g. 64: for fewer samples than features", least=1
    )
    validation_split: float | None = flag(
        None,
        "share of the images to hold out, at --eval_steps: for a loss per noise level, the samples' distance from them, and whether the "
        "samples are nearer to the images trained on",
        above=0,
        below=1,
    )
    eval_data_dir: str | None = flag(
        None, "a folder of images to hold out instead, as --train_data_dir; as many as there are to train on show copies best"
    )

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one needs another.
        """
        for name in ("validation_split", "eval_data_dir"):
            if getattr(self, name) is not None and self.eval_steps is None:
                raise UserError(f"--{name} holds images out for evaluation: give --eval_steps too")
        if self.eval_steps is None and set(self.eval_metrics) != {"frechet_distance"}:
            raise UserError("--eval_metrics are of evaluation: give --eval_steps too")
        if self.eval_raw_weights and self.eval_steps is None:
            raise UserError("--eval_raw_weights is of evaluation: give --eval_steps too")
        if self.validation_split is not None and self.eval_data_dir is not None:
            raise UserError("--validation_split and --eval_data_dir both say which images are held out; give one of them")
