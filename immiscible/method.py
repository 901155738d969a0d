"""The flags of the five axes, and the objective that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.flags import Bounds, Names, flag, given

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.objectives import DenoisingObjective


@dataclass
class ProcessArguments:
    """The noise process that a network from random weights learns to reverse, and what it predicts; a checkpoint brings its own."""

    _argument_group_name = "noise process"

    prediction_type: str = flag("epsilon", "what the network predicts", choices=("epsilon", "sample", "v_prediction", "flow_prediction"))
    noise_process: str = flag("ddpm", "ddpm, or flow: x_t = (1-s) x0 + s noise (needs flow_prediction)", choices=("ddpm", "flow"))
    ddpm_num_steps: int = flag(1000, "T: the number of noise levels, of either process")
    ddpm_beta_schedule: str = flag(
        "linear",
        "the noise schedule; the papers' quadratic is scaled_linear, Stable Diffusion's too with betas 0.00085 and 0.012",
        choices=Names("immiscible.process", "BETA_SCHEDULES"),
    )
    ddpm_beta_start: float = flag(1e-4, "beta of the first step")
    ddpm_beta_end: float = flag(0.02, "beta of the last step")
    image_scale: float = flag(
        1.0,
        "c: diffuse c times the image (the paper's image projection); x_t is divided by its deviation, which multiplies the "
        "signal-to-noise ratio by c^2 and lets plain diffusers sample the result",
    )

    def check(self) -> None:
        """What these flags can get wrong; what depends on the schedule is checked where it is built.

        Raises:
            UserError: one is out of range.
        """
        Bounds("ddpm_num_steps", positive="image_scale").check(self)


@dataclass
class MethodArguments:
    """How noise and time are drawn, and what an error costs: the axes this suite adds to the diffusers scripts."""

    _argument_group_name = "method"

    noise_coupling: str = flag(
        "independent",
        "which noise belongs to which image: assignment is Immiscible Diffusion, nearest takes the best of k "
        "(biases the noise), reservoir keeps noises between steps (for batches of 1 to 8), flipped_assignment is the rebuttal's control",
        choices=Names("immiscible.coupling", "COUPLINGS"),
    )
    coupling_metric: str = flag("l2", "the distance that the assignment minimizes", choices=Names("immiscible.assignment.costs", "METRICS"))
    coupling_dtype: str = flag(
        "auto",
        "precision of the operands of the assignment's cost; the paper quantizes to float16; auto is bfloat16 where the hardware has it",
        choices=Names("immiscible.assignment.costs", "COST_DTYPES"),
    )
    coupling_solver: str = flag(
        "auto",
        "exact, or an auction that keeps more than 99.9 % of the reduction in a fraction of the time; auto is exact below 128 images",
        choices=Names("immiscible.assignment.solve", "SOLVERS"),
    )
    coupling_scope: str = flag(
        "process",
        "global assigns over the batches of all processes at once (one gather of the cost's rows in 16 bits), process over each one's own",
        choices=Names("immiscible.assignment.ranks", "SCOPES"),
    )
    coupling_window: int = flag(
        1, "assign over this many micro-batches at once, accumulated or of successive steps: the remedy for small batches"
    )
    coupling_condition: str = flag(
        "none",
        "so that the noise does not tell the class: assign within each class; centered, after taking each class's mean so far from its "
        "images (experimental; of use with few images of a class in a batch); or with a penalty for exchanges between classes (C2OT)",
        choices=Names("immiscible.assignment.conditions", "CONDITIONS"),
    )
    coupling_condition_ratio: float = flag(
        0.01, "r of --coupling_condition penalty: the share of all pairs of a batch that may still be better than an image's own noise"
    )
    coupling_reservoir: int = flag(256, "noises that the reservoir coupling keeps")
    coupling_candidates: int = flag(8, "k of the nearest coupling")
    coupling_score: str = flag(
        "l2", "nearest by l2, or by dot (keeps the length of the noise)", choices=Names("immiscible.coupling", "SCORES")
    )
    coupling_min_timestep: int = flag(0, "pair only images at or above this timestep; the others keep their own noise")
    coupling_start_step: int = flag(
        0, "train with independent noise until this optimizer step; a window is paired if it begins at or after it"
    )
    timestep_sampling: str = flag(
        "uniform",
        "how often each noise level is trained: asymmetric is SpeeD's eq. 3, asymmetric_released what its code does",
        choices=Names("immiscible.timesteps", "TIMESTEP_SAMPLINGS"),
    )
    asymmetric_k: float = flag(5.0, "k of SpeeD: steps before the threshold are drawn k times as often as those after")
    asymmetric_r: float | None = flag(
        None,
        "r of SpeeD: the threshold tau is the first step with alpha_bar <= 1/r; 143.55 (tau = 700 on the linear schedule) if "
        "neither this nor --asymmetric_tau is given",
    )
    asymmetric_tau: int | None = flag(None, "tau of SpeeD, directly: steps 0..tau-1 are boosted; not together with --asymmetric_r")
    logit_mean: float = flag(0.0, "m of logit_normal; positive means noisier")
    logit_std: float = flag(1.0, "s of logit_normal")
    loss_weighting: str = flag(
        "none",
        "what an error at each level costs: none is the plain MSE, change_aware SpeeD's, snr the diffusers script's for "
        "--prediction_type sample",
        choices=Names("immiscible.weighting", "LOSS_WEIGHTINGS"),
    )
    change_aware_lambda: float = flag(0.6, "lambda of SpeeD's weighting, 0.5 (flat) to 1")
    snr_gamma: float | None = flag(None, "gamma of min_snr; 5 if not given")
    p2_k: float = flag(1.0, "k of p2")
    p2_gamma: float = flag(1.0, "gamma of p2")
    noise_offset: float = flag(0.0, "add this times a normal number per image and channel to the noise, after the coupling")
    log_class_leak: bool = flag(
        False, "log how well a linear probe reads the class from the paired noise (of the last 4,096 images), beside chance"
    )
    input_perturbation: float = flag(0.0, "perturb the noise by this in x_t but not in the target, after coupling and offset")

    def check(self) -> None:
        """What these flags can get wrong, also of methods that are not on; what depends on the schedule is checked where it is built.

        Raises:
            UserError: one is out of range, or does not go with another.
        """
        Bounds(
            "coupling_candidates coupling_window coupling_reservoir asymmetric_k asymmetric_r asymmetric_tau",
            "coupling_min_timestep coupling_start_step noise_offset input_perturbation p2_k p2_gamma",
            positive="logit_std snr_gamma",
        ).check(self)
        if not 0 <= self.coupling_condition_ratio <= 1:
            raise UserError(f"--coupling_condition_ratio must be from 0 to 1, not {self.coupling_condition_ratio}")
        if not 0.5 <= self.change_aware_lambda <= 1:
            raise UserError(f"--change_aware_lambda must be from 0.5 to 1, not {self.change_aware_lambda}")
        if self.asymmetric_tau is not None and self.asymmetric_r is not None:
            raise UserError("--asymmetric_tau and --asymmetric_r both say where SpeeD's threshold is; give one of them")
        assigns = self.noise_coupling in ("independent", "assignment", "flipped_assignment")
        for name, default in (("coupling_scope", "process"), ("coupling_window", 1), ("coupling_condition", "none")):
            if getattr(self, name) != default and not assigns:
                raise UserError(
                    f"--{name} is for couplings that pair the images of a batch with each other (--noise_coupling assignment or "
                    f"flipped_assignment); {self.noise_coupling} serves each image on its own"
                )
        if self.snr_gamma is not None and self.loss_weighting != "min_snr":
            raise UserError(f"--snr_gamma belongs to --loss_weighting min_snr, not to {self.loss_weighting}")


def training_scheduler(config: ProcessArguments) -> Any:
    """The diffusers scheduler of the noise process that the flags ask for."""
    from immiscible.schedulers import build_scheduler

    return build_scheduler(
        config.noise_process,
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        image_scale=config.image_scale,
    )


def build_objective(
    config: MethodArguments,
    scheduler: Any,
    accelerator: Accelerator,
    *,
    image_scale: float = 1.0,
    dream_detail_preservation: float | None = None,
) -> DenoisingObjective:
    """The objective that the flags ask for, on the process and the prediction type of a diffusers scheduler; every rank calls it.

    Raises:
        UserError: an option out of range, or what the coupling, the law or the weighting cannot do with this process.
    """
    from immiscible.coupling import build_coupling, pairs_batch
    from immiscible.objectives import DenoisingObjective
    from immiscible.pools import across_ranks
    from immiscible.process import NoiseProcess
    from immiscible.timesteps import timestep_sampler
    from immiscible.weighting import loss_weights

    method, process = given(config, MethodArguments), NoiseProcess.from_scheduler(scheduler)
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if config.coupling_min_timestep >= process.num_timesteps:
        raise UserError(f"--coupling_min_timestep must be below {process.num_timesteps}, not {config.coupling_min_timestep}")
    coupling = build_coupling(
        config.noise_coupling,
        min_timestep=config.coupling_min_timestep,
        metric=config.coupling_metric,
        dtype=config.coupling_dtype,
        solver=config.coupling_solver,
        condition=config.coupling_condition,
        condition_ratio=config.coupling_condition_ratio,
        candidates=config.coupling_candidates,
        score=config.coupling_score,
        size=config.coupling_reservoir,
    )
    if config.coupling_scope == "global" and pairs_batch(coupling):
        coupling = across_ranks(coupling, accelerator, config.coupling_window)
    return DenoisingObjective(
        process=process.to(accelerator.device),
        sampler=timestep_sampler(config.timestep_sampling, process, **method),
        coupling=coupling,
        weights=loss_weights(config.loss_weighting, process, prediction_type, **method).float().to(accelerator.device),
        prediction_type=prediction_type,
        image_scale=image_scale,
        coupling_start_step=config.coupling_start_step,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
        dream_detail_preservation=dream_detail_preservation,
    )
