"""The flags of Stable Diffusion 3 checkpoints that diffusers' SD3 scripts have, and what they are called here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from immiscible.errors import UserError
from immiscible.flags import flag

# Their names of a law, which they draw before the scheduler's shift, and of a weighting, which with --precondition_outputs is one of the
# image's error: --weighting_scheme -> --timestep_sampling, and (--weighting_scheme, --precondition_outputs) -> --loss_weighting.
LAWS = {"none": "uniform", "sigma_sqrt": "uniform", "logit_normal": "sd3_logit_normal", "mode": "sd3_mode", "cosmap": "uniform"}
WEIGHTINGS = {
    **{(scheme, of_image): "image" if of_image else "none" for scheme in ("none", "logit_normal", "mode") for of_image in (0, 1)},
    ("sigma_sqrt", 0): "sigma_sqrt",
    ("sigma_sqrt", 1): "none",
    ("cosmap", 0): "cosmap",
    ("cosmap", 1): "cosmap_image",
}

PRIORS = (
    "class_data_dir",
    "class_prompt",
    "num_class_images",
    "prior_generation_precision",
    "prior_loss_weight",
    "with_prior_preservation",
)
PRIOR = "a class prior is not trained here; train on images of the class too, with captions of their own"
PRODIGY = "Prodigy is set as diffusers' examples set it: --optimizer prodigy"
SD3_FOREIGN = {  # flags of diffusers' train_dreambooth_lora_sd3.py that the text-to-image scripts have not, and why
    "instance_data_dir": "give --train_data_dir, a folder of images with a caption each",
    "instance_prompt": "each image has a caption, in a .txt beside it or in metadata.jsonl; give all the same one, if that is wanted",
    "repeats": "an epoch takes each image once; give --num_train_epochs or --max_train_steps",
    "sample_batch_size": "it is of class images; samples are drawn by --eval_batch_size",
    **dict.fromkeys(
        (
            "class_data_dir",
            "class_prompt",
            "num_class_images",
            "prior_generation_precision",
            "prior_loss_weight",
            "with_prior_preservation",
        ),
        PRIOR,
    ),
    **dict.fromkeys(("prodigy_beta3", "prodigy_decouple", "prodigy_safeguard_warmup", "prodigy_use_bias_correction"), PRODIGY),
    "lora_blocks": r"--lora_target_modules takes an expression of whole names, such as 'transformer_blocks\.(12|30)\.attn\.to_[kqv]'",
    "lr_num_cycles": "cosine_with_restarts has one cycle, as by default there",
    "lr_power": "polynomial has power 1, as by default there",
    "upcast_before_saving": "what is trained is fp32 always, and saved so",
}


@dataclass
class SD3Arguments:
    """What only a Stable Diffusion 3 checkpoint takes, among the flags of the text-to-image scripts."""

    weighting_scheme: str | None = flag(
        None,
        "of SD3: law and weighting by their one name in diffusers' SD3 scripts, whose default is logit_normal; without it they are "
        "--timestep_sampling and --loss_weighting",
        choices=tuple(LAWS),
    )
    precondition_outputs: int = flag(
        1, "with --weighting_scheme: weigh the error of the image that the output stands for (1), or that of the flow (0)", least=0, most=1
    )
    max_sequence_length: int = flag(
        77, "of SD3: tokens of a caption that T5 reads; where the checkpoint has no T5, zeros in their place", least=1, most=512
    )

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one of them is given without the other.
        """
        if self.weighting_scheme is None and self.precondition_outputs != 1:
            raise UserError(
                f"--precondition_outputs {self.precondition_outputs} is of --weighting_scheme; without that the error is the flow's, and "
                f"--loss_weighting image weighs it as the image's"
            )

    def refuse_sd3(self, named: str) -> None:
        """For a checkpoint of another family.

        Args:
            named: the flag of the checkpoint, and what it is.

        Raises:
            UserError: one of these flags is given.
        """
        for item in fields(SD3Arguments):
            if (value := getattr(self, item.name)) != item.default:
                raise UserError(f"--{item.name} {value} is of Stable Diffusion 3 checkpoints; {named}: leave it out")


def settle_scheme(values: dict[str, Any]) -> None:
    """Gives ``--timestep_sampling`` and ``--loss_weighting`` the names that ``--weighting_scheme`` has for them.

    Raises:
        UserError: they were given others.
    """
    scheme = values["weighting_scheme"]
    if scheme is None:
        return
    chosen = {"timestep_sampling": LAWS[scheme], "loss_weighting": WEIGHTINGS[scheme, values["precondition_outputs"]]}
    defaults = {"timestep_sampling": "uniform", "loss_weighting": "none"}
    for name, value in chosen.items():
        if values[name] not in (defaults[name], value):
            same = " ".join(f"--{other} {what}" for other, what in chosen.items())
            raise UserError(f"--weighting_scheme {scheme} is {same}: leave it or --{name} {values[name]} out")
    values.update(chosen)
