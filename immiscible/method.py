"""The flags of the five axes, and the objective that they ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from immiscible.errors import UserError
from immiscible.flags import Names, check_ranges, flag, given
from immiscible.objective_choice import ObjectiveArguments, chosen_objective, sigma_process

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.coupling import Coupling
    from immiscible.objectives import DenoisingObjective
    from immiscible.process import NoiseProcess
    from immiscible.samplers import TimestepSampler
    from immiscible.weighting import LossWeights

# The constructors' parameters behind the flags of couplings; those of laws and weightings have the flags' names.
COUPLING_OPTIONS = {
    "coupling_metric": "metric",
    "coupling_dtype": "dtype",
    "coupling_solver": "solver",
    "coupling_condition": "condition",
    "coupling_condition_ratio": "condition_ratio",
    "coupling_candidates": "candidates",
    "coupling_score": "score",
    "coupling_reservoir": "size",
}

LEAST_WEIGHT = 1e-12  # of the greatest in a vector of loss weights; AdamW's epsilon and fp32 would make less of it nothing


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
        "precision of the operands of the cost; float16 and float8 are the paper's; auto is bfloat16 (or int8) where the hardware has it",
        choices=Names("immiscible.assignment.costs", "COST_DTYPES"),
    )
    coupling_solver: str = flag(
        "auto",
        "exact, or an auction that keeps more than 99.9 % of the reduction in a fraction of the time; auto is exact below 128 images; "
        "stable is the stable matching, whose pairs are each other's best that is left",
        choices=Names("immiscible.assignment.solve", "SOLVERS"),
    )
    coupling_scope: str = flag(
        "process",
        "global assigns over the batches of all processes at once (one gather of the cost's rows in 16 bits), process over each one's own",
        choices=Names("immiscible.assignment.ranks", "SCOPES"),
    )
    coupling_window: int | str = flag(
        1,
        "assign over this many micro-batches at once, accumulated or of successive steps: the remedy for small batches; `epoch` assigns "
        "over all images of an epoch, planned while the one before it trains: the nearest noises there are",
        least=1,
        most=2**10,
        word="epoch",
    )
    coupling_caches: int = flag(
        0,
        "noises that each image keeps from epoch to epoch, and that the images of a batch exchange by assignment, one at a time (LOOM); "
        "0 draws new ones in each step",
        least=0,
        most=64,
    )
    coupling_condition: str = flag(
        "none",
        "so that the noise does not tell the class: assign within each class; centered, after taking each class's mean so far from its "
        "images (experimental; of use with few images of a class in a batch); or with a penalty for exchanges between classes (C2OT)",
        choices=Names("immiscible.assignment.conditions", "CONDITIONS"),
    )
    coupling_condition_ratio: float = flag(
        0.01,
        "r of --coupling_condition penalty: the share of all pairs of a batch that may still be better than an image's own noise",
        least=0,
        most=1,
    )
    coupling_reservoir: int = flag(256, "noises that the reservoir coupling keeps", least=1, most=2**20)
    coupling_candidates: int = flag(8, "k of the nearest coupling", least=1, most=2**16)
    coupling_score: str = flag(
        "l2", "nearest by l2, or by dot (keeps the length of the noise)", choices=Names("immiscible.coupling", "SCORES")
    )
    coupling_min_timestep: int = flag(0, "pair only images at or above this timestep; the others keep their own noise", least=0)
    coupling_start_step: int = flag(
        0, "train with independent noise until this optimizer step; a window is paired if it begins at or after it", least=0
    )
    timestep_sampling: str = flag(
        "uniform",
        "how often each noise level is trained: asymmetric is SpeeD's eq. 3, what ends in released is what its code does; clts and "
        "loss_second_moment change in a run",
        choices=Names("immiscible.timesteps", "TIMESTEP_SAMPLINGS"),
    )
    second_timestep_sampling: str | None = flag(
        None, "another law from --second_phase_step on", choices=Names("immiscible.timesteps", "TIMESTEP_SAMPLINGS")
    )
    second_phase_step: int | None = flag(None, "the optimizer step at which --second_timestep_sampling begins", least=1)
    timestep_shift: float = flag(
        1.0, "m: push the law forward in flow time, to m times its noise (SD3's resolution shift); 1 is none", above=0, most=1e3
    )
    asymmetric_k: float = flag(5.0, "k of SpeeD: steps before the threshold are drawn k times as often as those after", least=1, most=1e6)
    asymmetric_r: float | None = flag(
        None,
        "r of SpeeD: the threshold tau is the first step with alpha_bar <= 1/r; 143.55 (tau = 700 on the linear schedule) if "
        "neither this nor --asymmetric_tau is given",
        least=1,
        most=1e12,
    )
    asymmetric_tau: int | None = flag(None, "tau of SpeeD, directly: steps 0..tau-1 are boosted; not together with --asymmetric_r", least=1)
    logit_mean: float = flag(
        0.0, "m of logit_normal, where positive means noisier, and of sd3_logit_normal, where it means less noisy", least=-10, most=10
    )
    logit_std: float = flag(1.0, "s of logit_normal and sd3_logit_normal", above=0, most=100)
    edm_mean: float = flag(-1.2, "mean of ln(sigma) of edm_log_normal; EDM's", least=-10, most=10)
    edm_std: float = flag(1.2, "its standard deviation", above=0, most=100)
    edm_sigma_data: float = flag(
        0.5, "the data's standard deviation, of edm_log_normal and edm: 0.5 is EDM's, latents have about 1", above=0, most=1e3
    )
    mode_scale: float = flag(1.29, "s of mode and sd3_mode", least=-1, most=1.75)
    laplace_mean: float = flag(0.0, "mu of laplace, of log-SNR; positive means less noisy", least=-20, most=20)
    laplace_scale: float = flag(0.5, "b of laplace", above=0, most=100)
    beta_a: float = flag(0.8, "a of beta; below 1 means the least noise most", above=0, most=1e3)
    beta_b: float = flag(1.0, "b of beta; below 1 means the most noise most", above=0, most=1e3)
    clts_mean: float = flag(0.3, "mu of clts as a share of T", least=-10, most=10)
    clts_std: float = flag(1.0, "sigma of clts as a share of T; the paper's is not known", above=0, most=100)
    clts_ramp_steps: int = flag(50_000, "optimizer steps until clts is its Gaussian", least=1)
    loss_weighting: str = flag(
        "none",
        "what an error at each level costs: none is the plain MSE, change_aware SpeeD's, snr the diffusers script's for "
        "--prediction_type sample, velocity v-prediction's for any other type",
        choices=Names("immiscible.weighting", "LOSS_WEIGHTINGS"),
    )
    change_aware_lambda: float = flag(0.6, "lambda of SpeeD's weighting; 0.5 is flat", least=0.5, most=1)
    snr_gamma: float | None = flag(None, "gamma of min_snr, 5 if not given, and of soft_min_snr, 4 if not given", above=0, most=1e6)
    p2_k: float = flag(1.0, "k of p2", least=0, most=1000)
    p2_gamma: float = flag(1.0, "gamma of p2", least=0, most=10)
    velocity_cap: float = flag(10.0, "the most that a level costs under velocity", least=1, most=1e6)
    debiased_cap: float | None = flag(None, "debiased counts SNRs above this as this; kohya's scripts have 1000", above=0, most=1e12)
    noise_offset: float = flag(
        0.0, "add this times a normal number per image and channel to the noise, after the coupling", least=0, most=10
    )
    log_class_leak: bool = flag(
        False, "log how well a linear probe reads the class from the paired noise (of the last 4,096 images), beside chance"
    )
    input_perturbation: float = flag(
        0.0, "perturb the noise by this in x_t but not in the target, after coupling and offset", least=0, most=10
    )

    @property
    def by_epoch(self) -> bool:
        """Whether noises are assigned over whole epochs."""
        return self.coupling_window == "epoch"

    @property
    def window(self) -> int:
        """Micro-batches that are paired at once; 1 where the pairs of an epoch are looked up."""
        return 1 if self.by_epoch else int(self.coupling_window)

    def check(self) -> None:
        """What these flags can get wrong, also of methods that are not on; what depends on the schedule is checked where it is built.

        Raises:
            UserError: one is out of range, or does not go with another.
        """
        check_ranges(self)  # which parsing has done; these arguments are also put together by hand
        if self.asymmetric_tau is not None and self.asymmetric_r is not None:
            raise UserError("--asymmetric_tau and --asymmetric_r both say where SpeeD's threshold is; give one of them")
        self._check_laws()
        for name, users in _unused(vars(self)).items():
            if name in ("coupling_scope", "coupling_window", "coupling_caches", "coupling_condition"):
                raise UserError(
                    f"--{name} is for couplings that pair the images of a batch with each other ({_named(users)}); "
                    f"{self.noise_coupling} serves each image on its own"
                )
            chosen = " and ".join(str(getattr(self, choice)) for choice in users)
            raise UserError(f"--{name} belongs to {_named(users)}, not to {chosen}")
        if self.coupling_caches:
            others = ("coupling_window", "coupling_scope", "coupling_condition", "coupling_min_timestep")
            for name, default in ((item.name, item.default) for item in fields(MethodArguments) if item.name in others):
                if getattr(self, name) != default:
                    raise UserError(f"--{name} has no meaning with --coupling_caches, whose noises pass between all images of a batch")
        if self.by_epoch and self.coupling_min_timestep:
            raise UserError("--coupling_min_timestep is of a batch, whose timesteps are drawn; --coupling_window epoch pairs all images")
        if self.by_epoch and self.coupling_condition not in ("none", "within"):
            raise UserError(
                f"--coupling_condition {self.coupling_condition} is of a batch; --coupling_window epoch takes none, or within, which there "
                f"has whole classes to assign"
            )

    def _check_laws(self) -> None:
        if (self.second_timestep_sampling is None) != (self.second_phase_step is None):
            raise UserError("--second_phase_step and --second_timestep_sampling LAW go together: give both, or neither")
        if self.second_timestep_sampling == self.timestep_sampling:
            raise UserError(f"--second_timestep_sampling {self.timestep_sampling} is the first law too: leave it out, or name another")
        if "loss_second_moment" in (self.timestep_sampling, self.second_timestep_sampling) and self.window > 1:
            raise UserError(
                "--coupling_window draws the timesteps of steps to come, whose law loss_second_moment does not know yet: give 1 or epoch"
            )


def unused_flags(values: Mapping[str, Any]) -> dict[str, str]:
    """The flags of `MethodArguments` that are set, that is unlike their default, and that the chosen method does not use.

    What a coupling, a law or a weighting uses is what its constructor has a parameter for.

    Args:
        values: of flags by name; other flags than these do not matter, and one that is missing has its default.

    Returns:
        what would use each of them: ``{"asymmetric_k": "used by --timestep_sampling asymmetric or asymmetric_released"}``.
    """
    return {name: f"used by {_named(users)}" for name, users in _unused(values).items()}


def _unused(values: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """See `unused_flags`; ``{flag: {the flag that chooses: those of its choices that use it}}``."""
    defaults = {item.name: item.default for item in fields(MethodArguments)}
    chosen = {name: values.get(name, default) for name, default in defaults.items()}
    changed = [name for name, default in defaults.items() if chosen[name] != default]
    found: dict[str, dict[str, list[str]]] = {}
    for name in changed:
        users = _users(name)
        laws = {chosen["second_timestep_sampling"]} & set(users.get("timestep_sampling", ()))
        if users and not laws and not any(chosen[choice] in names for choice, names in users.items()):
            found[name] = users
        elif name == "coupling_condition_ratio" and chosen["coupling_condition"] != "penalty":
            found[name] = {"coupling_condition": ["penalty"]}
        elif name == "second_phase_step" and chosen["second_timestep_sampling"] is None:
            found[name] = {"second_timestep_sampling": ["LAW"]}
    return found


def _users(name: str) -> dict[str, list[str]]:
    """Which choices of which flags use the flag ``name``; empty for one that every method uses, or that chooses itself."""
    if name in ("noise_coupling", "timestep_sampling", "second_timestep_sampling", "loss_weighting"):
        return {}
    from immiscible.choices import option_names
    from immiscible.coupling import COUPLINGS, IndependentCoupling
    from immiscible.timesteps import TIMESTEP_SAMPLINGS
    from immiscible.weighting import LOSS_WEIGHTINGS

    if name in COUPLING_OPTIONS:
        return {"noise_coupling": [choice for choice, built in COUPLINGS.items() if COUPLING_OPTIONS[name] in option_names(built)]}
    if name in ("coupling_scope", "coupling_window", "coupling_caches"):
        return {"noise_coupling": [choice for choice, built in COUPLINGS.items() if getattr(built, "pairs_batch", False)]}
    if name in ("coupling_min_timestep", "coupling_start_step"):
        return {"noise_coupling": [choice for choice, built in COUPLINGS.items() if built is not IndependentCoupling]}
    laws = [choice for choice, law in TIMESTEP_SAMPLINGS.items() if name in option_names(law, 1)]
    weightings = [choice for choice, weighting in LOSS_WEIGHTINGS.items() if name in option_names(weighting, 2)]
    return {flag: names for flag, names in (("timestep_sampling", laws), ("loss_weighting", weightings)) if names}


def _named(users: Mapping[str, list[str]]) -> str:
    """Such as ``--timestep_sampling asymmetric or asymmetric_released``."""
    return ", or ".join(f"--{choice} {' or '.join(names)}" for choice, names in users.items())


def in_flags(text: str) -> str:
    """A message of the library, which names its arguments in backticks and its calls as they are written, in terms of the flags."""
    calls = {"build_coupling": "noise_coupling", "timestep_sampler": "timestep_sampling", "loss_weights": "loss_weighting"}
    flags = {option: name for name, option in COUPLING_OPTIONS.items()} | {"min_timestep": "coupling_min_timestep"}
    flags |= {item.name: item.name for group in (MethodArguments, ObjectiveArguments) for item in fields(group)}
    text = re.sub(rf"({'|'.join(calls)})\('(\w+)'\)", lambda found: f"--{calls[found[1]]} {found[2]}", text)
    text = re.sub(r"the noise process '(\w+)'", r"--noise_process \1", text).replace("GlobalCoupling", "--coupling_scope global")
    return re.sub(r"`(\w+)`", lambda found: f"--{flags[found[1]]}" if found[1] in flags else found[0], text)


@contextmanager
def naming_flags() -> Iterator[None]:
    """Inside the block the library's `UserError` names the flags of the scripts instead of its own arguments."""
    try:
        yield
    except UserError as error:
        error.args = (in_flags(str(error)),)
        raise


def build_objective(
    config: MethodArguments,
    scheduler: Any,
    accelerator: Accelerator,
    *,
    image_scale: float = 1.0,
    dream_detail_preservation: float | None = None,
) -> DenoisingObjective:
    """The objective that the flags ask for; every rank calls it.

    Args:
        config: the flags of the axes, and with `ObjectiveArguments` those of the objective; without, it is `DenoisingObjective`.
        scheduler: of diffusers: its noise process and prediction type are trained, unless the flags ask for an axis of sigma.
        accelerator: of the run.
        image_scale: see `DenoisingObjective`, as the next.
        dream_detail_preservation: p of DREAM.

    Raises:
        UserError: an option out of range, or what the coupling, the law or the weighting cannot do with this process.
    """
    from immiscible.coupling import pairs_batch
    from immiscible.epoch import CachedCoupling, EpochCoupling
    from immiscible.objectives import DenoisingObjective
    from immiscible.pools import GlobalCoupling
    from immiscible.process import PRECONDITIONED, NoiseProcess

    with naming_flags():
        process: NoiseProcess
        if isinstance(config, ObjectiveArguments) and config.objective != "denoising":
            process, prediction_type = sigma_process(config), PRECONDITIONED
        else:
            process = NoiseProcess.from_scheduler(scheduler)
            prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
        if config.coupling_min_timestep >= process.num_timesteps:
            raise UserError(f"--coupling_min_timestep must be below {process.num_timesteps}, not {config.coupling_min_timestep}")
        coupling = chosen_coupling(config)
        if config.by_epoch:
            coupling = EpochCoupling(coupling)
        elif config.coupling_caches:
            coupling = CachedCoupling(coupling, caches=config.coupling_caches)
        elif config.coupling_scope == "global" and pairs_batch(coupling):
            coupling = GlobalCoupling(accelerator, coupling, window=config.window)
        axes: dict[str, Any] = {
            "process": process.to(accelerator.device),
            "sampler": kept_sampler(config, process, accelerator),
            "coupling": coupling,
            "weights": chosen_weights(config, process, prediction_type).float().to(accelerator.device),
            "prediction_type": prediction_type,
            "image_scale": image_scale,
            "coupling_start_step": config.coupling_start_step,
            "noise_offset": config.noise_offset,
            "input_perturbation": config.input_perturbation,
            "dream_detail_preservation": dream_detail_preservation,
        }
        if isinstance(config, ObjectiveArguments):
            return chosen_objective(config, accelerator, axes)
        return DenoisingObjective(**axes)


def chosen_coupling(config: MethodArguments) -> Coupling:
    """The coupling that the flags ask for, over this process's batch."""
    from immiscible.choices import used_options
    from immiscible.coupling import COUPLINGS, build_coupling

    options = {option: getattr(config, name) for name, option in COUPLING_OPTIONS.items()}
    options = used_options(COUPLINGS[config.noise_coupling], options)
    return build_coupling(config.noise_coupling, min_timestep=config.coupling_min_timestep, **options)


def chosen_sampler(config: MethodArguments, process: NoiseProcess) -> TimestepSampler:
    """The timestep law that the flags ask for, or the two."""
    from immiscible.choices import used_options
    from immiscible.samplers import TwoPhases
    from immiscible.timesteps import TIMESTEP_SAMPLINGS, timestep_sampler

    def built(name: str) -> TimestepSampler:
        options = used_options(TIMESTEP_SAMPLINGS[name], given(config, MethodArguments))
        return timestep_sampler(name, process, timestep_shift=config.timestep_shift, **options)

    if config.second_timestep_sampling is None or config.second_phase_step is None:
        return built(config.timestep_sampling)
    return TwoPhases.of(built(config.timestep_sampling), built(config.second_timestep_sampling), config.second_phase_step)


def kept_sampler(config: MethodArguments, process: NoiseProcess, accelerator: Accelerator) -> TimestepSampler:
    """`chosen_sampler` of a run: what its law must remember is in every checkpoint, and is of the losses of all ranks."""
    sampler = chosen_sampler(config, process)
    if sampler.history is not None:
        sampler.history.gather = accelerator.gather
        accelerator.register_for_checkpointing(sampler.history)
    return sampler


def chosen_weights(config: MethodArguments, process: NoiseProcess, prediction_type: str) -> LossWeights:
    """The loss weights that the flags ask for."""
    from immiscible.choices import used_options
    from immiscible.weighting import LOSS_WEIGHTINGS, loss_weights

    name = config.loss_weighting
    options = used_options(LOSS_WEIGHTINGS[name], given(config, MethodArguments))
    weights = loss_weights(name, process, prediction_type, **options)
    if not LEAST_WEIGHT <= (greatest := float(weights.vector.max())) <= 1 / LEAST_WEIGHT:
        flags = "".join(f" --{option} {options[option]:g}" for option in options)
        raise UserError(f"--loss_weighting {name}{flags}: the greatest weight of any timestep is {greatest:g}, which trains nothing")
    return weights
