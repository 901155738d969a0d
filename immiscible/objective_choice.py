"""Which loss a network from random weights is trained with, on which noise process: the flags, and what they build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.flags import Names, flag

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.consistency import Discretization
    from immiscible.edm import SigmaProcess
    from immiscible.objectives import DenoisingObjective

OBJECTIVES = ("denoising", "edm", "consistency")
PROPOSALS = {"edm": (-1.2, 1.2), "consistency": (-1.1, 2.0)}  # --p_mean and --p_std: EDM's, and those of improved consistency training
SAMPLING_STEPS = {"denoising": 1000, "edm": 18, "consistency": 1}  # --ddpm_num_inference_steps where it is not given
SAMPLED_LEVELS = 40  # of which a consistency model's sampler takes its steps, as diffusers has it


@dataclass
class ProcessArguments:
    """The noise process that a network from random weights learns to reverse, and what it predicts; a checkpoint brings its own."""

    _argument_group_name = "noise process"

    prediction_type: str = flag(
        "epsilon",
        "what the network predicts, of --objective denoising; the others' preconditioned networks have a target of their own",
        choices=("epsilon", "sample", "v_prediction", "flow_prediction"),
    )
    noise_process: str = flag("ddpm", "ddpm, or flow: x_t = (1-s) x0 + s noise (needs flow_prediction)", choices=("ddpm", "flow"))
    ddpm_num_steps: int = flag(
        1000, "T: the number of noise levels, of either process; of the ranges that an axis of sigma is cut into", least=1, most=10**5
    )
    ddpm_beta_schedule: str = flag(
        "linear",
        "the noise schedule; the papers' quadratic is scaled_linear with their betas, Stable Diffusion's that with 0.00085 and 0.012",
        choices=Names("immiscible.process", "BETA_SCHEDULES"),
    )
    ddpm_beta_start: float = flag(1e-4, "beta of the first step", least=0, most=1)
    ddpm_beta_end: float = flag(0.02, "beta of the last step", least=0, most=1)
    image_scale: float = flag(
        1.0,
        "c: diffuse c times the image (the paper's image projection); x_t is divided by its deviation, which multiplies the "
        "signal-to-noise ratio by c^2 and lets plain diffusers sample the result",
        least=1e-3,
        most=1e3,
    )

    def check(self) -> None:
        """Nothing here: what depends on the schedule is checked where it is built."""


@dataclass
class ObjectiveArguments(ProcessArguments):
    """The loss, and what EDM and consistency training need to know. They have an axis of sigma in the place of a noise process."""

    _argument_group_name = "objective"

    objective: str = flag(
        "denoising",
        "denoising: the loss of --prediction_type on --noise_process; edm: a preconditioned network on log-normal sigmas (Karras et al. "
        "2022); consistency: consistency training, sampled in one or two steps (Song and Dhariwal 2024)",
        choices=OBJECTIVES,
    )
    learned_sigma: bool = flag(
        False,
        "the network has twice the channels and learns the variance of each sampling step too, by the hybrid loss (Nichol and Dhariwal "
        "2021), as DiT does; of denoising on ddpm",
    )
    sigma_min: float = flag(0.002, "the least sigma, of edm and consistency: of x0 + sigma noise", above=0, most=1)
    sigma_max: float = flag(80.0, "the greatest sigma, of edm and consistency", least=0.1, most=1e5)
    sigma_data: float = flag(0.5, "the data's standard deviation, of edm and consistency", above=0, most=1e3)
    rho: float = flag(7.0, "spacing of the sigmas of edm's sampler and consistency's levels: sigma^(1/rho) is even", least=1, most=100)
    p_mean: float | None = flag(
        None, "mean of ln(sigma) in the log-normal proposal: -1.2 for edm, -1.1 for consistency by default", least=-10, most=10
    )
    p_std: float | None = flag(None, "its standard deviation: 1.2 for edm, 2.0 for consistency by default", above=0, most=100)
    edm_sampler: str = flag(
        "heun",
        "sampler of an edm network in the run: heun calls it 2n - 1 times in n steps, euler n times; plain diffusers samples what is saved "
        "by euler",
        choices=("heun", "euler"),
    )
    momentum: bool = flag(False, "FDM (Wu et al. 2023) on top of edm: its scaling of the network's input, and its cap on the weights")
    momentum_warmup_steps: int = flag(0, "optimizer steps over which FDM's cap on edm's weight rises from 5 to 500", least=0)
    curriculum_steps: int | None = flag(
        None, "optimizer steps over which consistency's discretization grows finer; by default --max_train_steps", least=1
    )
    discretization: str = flag(
        "doubling",
        "how it grows finer: from s0 by doublings to s1 (improved), by a square root (original), or constant",
        choices=Names("immiscible.consistency", "CURRICULA"),
    )
    discretization_s_0: int = flag(
        10, "s0: noise levels at the beginning, less one; of the square root, which begins with s0, at least 2", least=1, most=10**5
    )
    discretization_s_1: int = flag(1280, "s1: noise levels at the end, less one", least=1, most=10**5)
    constant_discretization_steps: bool = flag(False, "the same as --discretization constant: s0 + 1 levels throughout")
    level_sampling: str = flag(
        "log_normal",
        "which neighboring levels are trained: by the log-normal proposal (improved) or uniform, each pair as often (original)",
        choices=("log_normal", "uniform"),
    )
    consistency_distance: str = flag(
        "pseudo_huber",
        "between network and teacher: pseudo_huber of the whole image (improved), l2, or lpips (with the package lpips)",
        choices=("pseudo_huber", "l2", "lpips"),
    )
    huber_c: float | None = flag(None, "c of pseudo_huber; 0.00054 sqrt(channels x pixels) by default", above=0, most=1e6)
    level_weighting: str = flag(
        "inverse_gap", "of a pair of levels: one over the distance of its sigmas (improved), or none", choices=("inverse_gap", "none")
    )
    teacher: str = flag(
        "student", "whose answer is aimed at: the network's own (improved) or its average's (ema)", choices=("student", "ema")
    )
    teacher_decay: float = flag(0.9, "mu0 of the averaged teacher: mu = exp(s0 ln(mu0) / N)", above=0, below=1)
    skip_steps: int = flag(
        1, "by how many levels the teacher is below the network; draws of the last ones train the last pair", least=1, most=10**4
    )
    noise_precond_type: str = flag(
        "cm", "what the network is told of sigma: 250 ln(sigma), as diffusers' sampler tells it", choices=("cm",)
    )
    input_precond_type: str = flag("cm", "how its input is scaled: as diffusers' sampler scales it", choices=("cm",))
    cast_teacher: bool = flag(False, "nothing: the teacher runs in --mixed_precision as the network does, with this flag or without")

    def check(self) -> None:
        """What these flags can get wrong.

        Raises:
            UserError: one belongs to another objective, or two contradict each other.
        """
        super().check()
        changed = [item.name for item in fields(ObjectiveArguments) if getattr(self, item.name) != item.default]
        for name in changed:
            users = USERS.get(name)
            if users and self.objective not in users:
                raise UserError(f"--{name} belongs to --objective {' or '.join(users)}, not to {self.objective}")
        if self.objective == "denoising":
            if self.learned_sigma and self.noise_process != "ddpm":
                raise UserError(f"--learned_sigma is of the steps of a ddpm process, not of --noise_process {self.noise_process}")
            return
        for name in ("noise_process", "image_scale", "ddpm_beta_schedule", "ddpm_beta_start", "ddpm_beta_end"):
            if name in changed:
                raise UserError(f"--{name} is of --objective denoising; {self.objective} has an axis of sigma: --sigma_min, --sigma_max")
        if not self.sigma_min < self.sigma_max:
            raise UserError(f"--sigma_min {self.sigma_min:g} must be below --sigma_max {self.sigma_max:g}")
        self._check_own()

    @property
    def discretization_kind(self) -> str:
        """How consistency's discretization grows, whichever flag says it."""
        return "constant" if self.constant_discretization_steps else self.discretization

    def _check_own(self) -> None:
        if self.momentum_warmup_steps and not self.momentum:
            raise UserError("--momentum_warmup_steps is of --momentum; give it too")
        if self.objective == "consistency" and self.curriculum_steps is None:
            raise UserError("--objective consistency needs --max_train_steps, or --curriculum_steps: its noise levels grow finer over them")
        constant = self.discretization_kind == "constant"
        if self.discretization_s_1 < self.discretization_s_0 and not constant:
            raise UserError(
                f"--discretization_s_1 {self.discretization_s_1} must be at least --discretization_s_0 {self.discretization_s_0}"
            )
        if self.constant_discretization_steps and self.discretization == "square_root":
            raise UserError("--constant_discretization_steps and --discretization square_root contradict each other; choose one")
        fewest = self.discretization_s_0 + (self.discretization_kind != "square_root")
        if fewest < 2:
            raise UserError("--discretization_s_0 1 with --discretization square_root begins with one level, which has no neighbor: give 2")
        if self.skip_steps >= fewest:
            raise UserError(
                f"--skip_steps {self.skip_steps} must be at most {fewest - 1}: --discretization_s_0 {self.discretization_s_0} begins with "
                f"{fewest} levels"
            )
        if self.huber_c is not None and self.consistency_distance != "pseudo_huber":
            raise UserError("--huber_c is of --consistency_distance pseudo_huber; leave it out")
        if self.teacher == "student" and self.teacher_decay != 0.9:
            raise UserError("--teacher_decay is of --teacher ema; give it too")
        if self.level_sampling == "uniform" and (self.p_mean, self.p_std) != PROPOSALS["consistency"]:
            raise UserError("--p_mean and --p_std are of --level_sampling log_normal; leave them out")


SIGMAS = ("edm", "consistency")
USERS = {
    "learned_sigma": ("denoising",),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "rho", "p_mean", "p_std"), SIGMAS),
    **dict.fromkeys(("edm_sampler", "momentum", "momentum_warmup_steps"), ("edm",)),
}
USERS |= {
    item.name: ("consistency",)
    for item in fields(ObjectiveArguments)
    if item.name not in USERS and item.name != "objective" and item.name not in {each.name for each in fields(ProcessArguments)}
}


def settle_objective(values: dict[str, Any]) -> None:
    """Gives the flags whose default depends on ``--objective`` and ``--max_train_steps`` their values."""
    objective = values["objective"]
    if values["ddpm_num_inference_steps"] is None:
        values["ddpm_num_inference_steps"] = SAMPLING_STEPS[objective]
    if objective in PROPOSALS:
        mean, std = PROPOSALS[objective]
        values["p_mean"] = mean if values["p_mean"] is None else values["p_mean"]
        values["p_std"] = std if values["p_std"] is None else values["p_std"]
    if objective == "consistency" and values["curriculum_steps"] is None:
        values["curriculum_steps"] = values["max_train_steps"]


def training_scheduler(config: ProcessArguments) -> Any:
    """The diffusers scheduler of what the flags ask for: of a noise process, or the sampler of an axis of sigma."""
    from immiscible.schedulers import build_scheduler

    if isinstance(config, ObjectiveArguments) and config.objective in SIGMAS:
        from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler

        ends = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "sigma_data": config.sigma_data, "rho": config.rho}
        if config.objective == "consistency":
            return CMStochasticIterativeScheduler(num_train_timesteps=SAMPLED_LEVELS, **ends)
        return EDMEulerScheduler(**ends)
    scheduler = build_scheduler(
        config.noise_process,
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        image_scale=config.image_scale,
    )
    if isinstance(config, ObjectiveArguments) and config.learned_sigma:
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return type(scheduler)(**{**settings, "variance_type": "learned_range"})
    return scheduler


def sigma_process(config: ObjectiveArguments) -> SigmaProcess:
    """The axis of sigma that the flags ask for, with the scalings of its network."""
    from immiscible.consistency import ConsistencyScalings
    from immiscible.edm import EDMScalings, Karras, LogNormal, MomentumScalings, SigmaProcess

    data, low, high = config.sigma_data, config.sigma_min, config.sigma_max
    mean, std = PROPOSALS[config.objective]
    log_normal = (mean if config.p_mean is None else config.p_mean, std if config.p_std is None else config.p_std)
    size: dict[str, Any] = {"sigma_data": data, "num_levels": config.ddpm_num_steps}
    if config.objective == "edm":
        scalings = MomentumScalings(data, low, high) if config.momentum else EDMScalings(data)
        return SigmaProcess.build(LogNormal(*log_normal), scalings, **size)
    uniform = config.level_sampling == "uniform"
    proposal = Karras(low, high, config.rho) if uniform else LogNormal(*log_normal, low, high)
    return SigmaProcess.build(proposal, ConsistencyScalings(data, low), **size)


def chosen_objective(config: ObjectiveArguments, accelerator: Accelerator, axes: Mapping[str, Any]) -> DenoisingObjective:
    """The objective that the flags ask for, of what `immiscible.method.build_objective` has built for the ``axes``."""
    from immiscible.edm import Karras, MomentumObjective
    from immiscible.objectives import DenoisingObjective

    if config.objective == "edm" and config.momentum:
        return MomentumObjective(**axes, warmup_steps=config.momentum_warmup_steps)
    if config.learned_sigma:
        from immiscible.learned_sigma import LearnedSigmaObjective

        return LearnedSigmaObjective(**axes)
    if config.objective != "consistency":
        return DenoisingObjective(**axes)
    from immiscible.consistency import AveragedTeacher, ConsistencyObjective, student

    discretization = chosen_discretization(config)
    teacher: Any = student
    if config.teacher == "ema":
        teacher = AveragedTeacher(
            discretization, config.teacher_decay, lambda model: accelerator.unwrap_model(model, keep_torch_compile=False)
        )
        accelerator.register_for_checkpointing(teacher)
    return ConsistencyObjective(
        **axes,
        levels=Karras(config.sigma_min, config.sigma_max, config.rho),
        discretization=discretization,
        distance=chosen_distance(config, accelerator),
        teacher=teacher,
        by_gap=config.level_weighting == "inverse_gap",
        skip_steps=config.skip_steps,
    )


def chosen_discretization(config: ObjectiveArguments) -> Discretization:
    """How many noise levels there are at each step."""
    from immiscible.consistency import Discretization

    assert config.curriculum_steps is not None
    return Discretization(config.discretization_kind, config.discretization_s_0, config.discretization_s_1, config.curriculum_steps)


def chosen_distance(config: ObjectiveArguments, accelerator: Accelerator) -> Any:
    """Of the outputs of network and teacher."""
    from functools import partial

    from immiscible.consistency import LPIPS, l2, pseudo_huber

    if config.consistency_distance == "lpips":
        return LPIPS(accelerator.device)
    return l2 if config.consistency_distance == "l2" else partial(pseudo_huber, huber_c=config.huber_c)


def objective_facts(config: ObjectiveArguments) -> dict[str, str]:
    """What is said of the objective, in words; nothing of the plain denoising loss."""
    proposal = f"ln sigma ~ N({config.p_mean:g}, {config.p_std:g}^2)" if config.p_mean is not None and config.p_std is not None else ""
    if config.objective == "edm":
        return {"objective": f"edm{' with momentum (FDM)' if config.momentum else ''}, {proposal}, sampled by {config.edm_sampler}"}
    if config.objective == "denoising":
        return {"objective": "denoising, with a learned variance (hybrid loss)"} if config.learned_sigma else {}
    discretization, kind = chosen_discretization(config), config.discretization_kind
    levels = f"{discretization(0)} levels"
    if kind != "constant":
        levels = f"{discretization(0)} to {discretization(discretization.steps)} levels over {discretization.steps} steps"
    chosen = "uniform" if config.level_sampling == "uniform" else proposal
    return {
        "objective": f"consistency, {levels} ({kind}), {chosen}, {config.consistency_distance}, teacher: {config.teacher}",
    }
