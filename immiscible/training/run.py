"""The life of a run, whatever is trained: check the folder, resume, prepare, train, measure, save, sample, finish.

What rank 0 does alone goes through `on_main_process`, so that its failures reach all ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm import tqdm

from immiscible.coupling import coupling_state, restore_coupling
from immiscible.data.loading import batch_order, build_loader, images_of, training_images
from immiscible.errors import UserError
from immiscible.evaluation.leakage import ClassLeak
from immiscible.files import PARTIAL, full_disk, replace
from immiscible.flags import defaults_of
from immiscible.networks.optimization import learning_rate, rate_factors, rates_in_words
from immiscible.networks.weights import add_metadata
from immiscible.objectives import Pairs
from immiscible.processes import from_main_process, on_main_process
from immiscible.sampling.pipelines import image_grid
from immiscible.training.cards import check_hub, push_pipeline
from immiscible.training.checkpoints import check_identity, load_checkpoint, save_checkpoint
from immiscible.training.folder import check_folder, folder_state, prepare_folder, run_identity
from immiscible.training.log import RunLog
from immiscible.training.loop import StepStats, train, whole_windows
from immiscible.training.measuring import RunEvaluation
from immiscible.training.memory import plan_table
from immiscible.training.planning import epoch_plans
from immiscible.training.session import settle_seed
from immiscible.training.sharding import Whole, is_sharded, prepared
from immiscible.training.stop import StopRequest
from immiscible.training.summary import (
    check_batch_size,
    checkpoint_bytes,
    grid_path,
    is_finished,
    measured_facts,
    report_end,
    report_plan,
    report_start,
)
from immiscible.training.task import BuildTask, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from immiscible.data.batches import GlobalBatchOrder
    from immiscible.data.stream_order import StreamOrder
    from immiscible.training.arguments import RunConfig


def run(config: RunConfig, accelerator: Accelerator, build_task: BuildTask) -> None:
    """Trains what ``build_task`` makes of the run's seed, from the checkpoint that the flags name or from its beginning.

    Args:
        config: the flags; the seed is written into it.
        accelerator: of `immiscible.training.session.session`; every rank calls this.
        build_task: makes data and network; nothing is written before all of it is known to fit together.

    Raises:
        UserError: whatever a user can get wrong, on every rank.
    """
    if config.push_to_hub and not config.plan:
        on_main_process(accelerator, lambda: check_hub(config))
    resumed, seen = from_main_process(accelerator, lambda: (check_folder(config), folder_state(config.folder)))
    seed = settle_seed(config, resumed)
    task = build_task(seed)
    state = _State.prepare(config, accelerator, task, seed)
    if resumed:
        state.resume(resumed, {f"--{name}": value for name, value in defaults_of(type(config)).items()})
    stop, leak = StopRequest(), ClassLeak() if config.log_class_leak else None
    steps = _steps(config, accelerator, task, state, stop, leak)
    rates = rates_in_words(state.optimizer.param_groups, config)
    report_start(config, task, state.order, state.start_step, state.max_steps, rates)
    with epoch_plans(config, accelerator, task, state.order, state.max_steps, state.identity, stop) as plans:
        if config.plan:
            remaining = state.max_steps - state.start_step
            checkpoint = partial(checkpoint_bytes, task.network, state.optimizer, config.use_ema)
            predict = None if config.torch_compile or is_sharded(accelerator) else partial(plan_table, config, accelerator, task)
            words = plans.words if plans else None
            report_plan(_or_error(steps, stop), task.network, accelerator, remaining, words, checkpoint=checkpoint, predict=predict)
            return
        if is_finished(config, state.start_step, state.max_steps):
            return
        held = prepare_folder(config, accelerator, seen)
        life = _Life(config, accelerator, task, state, stop, leak)
        life.begin(resumed)
        finished = life.follow(steps)
    if finished:
        life.finish()
    for lock in held:
        lock.release()
    if not finished:
        accelerator.wait_for_everyone()
        raise SystemExit(stop.exit_code)


@dataclass
class _State:
    """What is prepared to train, and where it begins.

    Args:
        accelerator: of the run.
        task: what is trained.
        model: the network, wrapped for training.
        optimizer: of its weights.
        ema: the average of its weights, or None.
        whole: the network and its average as rank 0 sees them.
        order: which images a rank takes for which micro-batch.
        max_steps: optimizer steps in all.
        identity: what must be equal for a checkpoint to be continued.
        start_step: optimizer steps taken before.
    """

    accelerator: Accelerator
    task: Task
    model: nn.Module
    optimizer: Any
    ema: EMAModel | None
    whole: Whole
    order: GlobalBatchOrder | StreamOrder
    max_steps: int
    identity: dict[str, Any]
    start_step: int = 0

    @classmethod
    def prepare(cls, config: RunConfig, accelerator: Accelerator, task: Task, seed: int) -> _State:
        """Of a run that begins."""
        processes, accumulation = accelerator.num_processes, config.gradient_accumulation_steps
        model, optimizer, ema, whole = prepared(task.network, config, accelerator)
        order = batch_order(
            task.data.source,
            config,
            batch_size=config.train_batch_size,
            seed=seed,
            rank=accelerator.process_index,
            num_processes=processes,
            buckets=task.data.buckets,
            window=config.window,
        )
        check_batch_size(config, task.objective, order.num_images, order.global_batch_size)
        max_steps = config.max_train_steps or max(1, config.epochs * int(order.batches_per_epoch) // accumulation)
        identity = run_identity(config, data=task.data.images.fingerprint, network=dict(task.identity), processes=processes)
        return cls(accelerator, task, model, optimizer, ema, whole, order, max_steps, identity)

    def resume(self, checkpoint: Path, defaults: Mapping[str, Any]) -> None:
        """Puts back what a checkpoint holds; ``defaults`` are those of the flags.

        Raises:
            UserError: it belongs to another run, or cannot be loaded.
        """
        check_identity(checkpoint, self.identity, defaults)
        self.start_step, restored = load_checkpoint(self.accelerator, checkpoint, self.ema, part=self.task.part)
        try:
            restore_coupling(self.task.objective.coupling, restored)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}", exit_code=1) from None


def _steps(
    config: RunConfig, accelerator: Accelerator, task: Task, state: _State, stop: StopRequest, leak: ClassLeak | None
) -> Iterator[StepStats]:
    """The run's steps, each taken when it is asked for."""
    order, accumulation, data = state.order, config.gradient_accumulation_steps, task.data
    micro_batches = (state.start_step * accumulation, state.max_steps * accumulation)
    order.start, order.stop = whole_windows(*micro_batches, config.window)
    dataset = training_images(
        data.images,
        data.augment or data.transform,
        skip_bad_images=config.skip_bad_images,
        with_labels=config.labels_for is not None,
        with_captions=data.with_captions,
        with_geometry=data.with_geometry,
        buckets=data.buckets,
    )
    loader = build_loader(dataset, order, config.dataloader_num_workers, accelerator.device)
    return train(
        accelerator,
        state.model,
        state.optimizer,
        task.objective,
        images_of(loader, config.skip_bad_images),
        task.encode,
        batch_size=config.train_batch_size,
        seed=int(config.seed or 0),
        start_step=state.start_step,
        max_steps=state.max_steps,
        learning_rate=learning_rate(config, state.optimizer, state.max_steps, accelerator.num_processes),
        max_grad_norm=config.max_grad_norm,
        ema=state.ema,
        stop=stop,
        factors=rate_factors(state.optimizer.param_groups, config),
        ahead=config.look_ahead,
        window=config.window,
        mixed_shapes=data.buckets is not None,
        watch=None if leak is None else partial(_watch, leak),
    )


def _or_error(steps: Iterator[StepStats], stop: StopRequest) -> Iterator[StepStats]:
    """The steps; a failure that ends them is raised, on every rank, as a plan saves nothing that it could be told after."""
    yield from steps
    if stop.error:
        raise UserError(stop.error, exit_code=1)


def _watch(leak: ClassLeak, pairs: Pairs) -> None:
    if pairs.labels is not None:  # a run that logs the leak has them
        leak.add(pairs.noise, pairs.labels, pairs.x0)


class _Life:
    """A run whose folder is open: what is written, measured, sampled and saved, and when.

    Args:
        config: the flags.
        accelerator: every rank has one of these.
        task: what is trained.
        state: of the training.
        stop: what may end the run early.
        leak: what is logged of the classes in the noise, if anything.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, task: Task, state: _State, stop: StopRequest, leak: ClassLeak | None
    ) -> None:
        self._config, self._accelerator, self._task, self._state = config, accelerator, task, state
        self._stop, self._leak, self._folder = stop, leak, config.folder
        self._log = RunLog(self._folder, accelerator, config, state.start_step, state.max_steps)
        self._evaluation = RunEvaluation(config, task) if config.eval_steps else None
        self._coupling_state = coupling_state(task.objective.coupling)
        self._saved = False

    def begin(self, resumed: Path | None) -> None:
        """Reads what is measured against; a run that goes on in another folder than its checkpoint's has its beginning there too."""
        step = self._state.start_step
        if self._evaluation:
            evaluation = self._evaluation
            self._alone(lambda: evaluation.prepare(step))
        if resumed and resumed.resolve().parent != self._folder.resolve():
            self._save(step)
        elif resumed and step:  # what the kill came before
            self._measure(step)
            if step < self._state.max_steps:
                self._show(step)
        self._saved = resumed is not None

    def follow(self, steps: Iterator[StepStats]) -> bool:
        """Takes the steps: shows progress, writes lines, measures, saves a checkpoint when one is due and at the end, samples.

        Returns:
            whether the last step was reached; if not, a signal stopped the run, and it has said so.

        Raises:
            UserError: a rank met one; everything up to the last step is saved.
        """
        config, last = self._config, self._state.max_steps
        step = self._state.start_step
        bar = tqdm(total=last, initial=step, desc="training", unit="step", disable=not self._accelerator.is_main_process)
        with self._stop, bar:
            for stats in steps:
                step, self._coupling_state = stats.step, stats.coupling_state
                due = step % config.checkpointing_steps == 0
                means = self._log.add(step, stats.metrics, write=step % config.logging_steps == 0 or due or step == last, leak=self._leak)
                bar.update()
                bar.set_postfix(self._log.shown(means), refresh=False)
                self._measure(step)  # before saving, so that a run that goes on from there has its measurements
                if due:
                    self._save(step)
                self._saved = due
                if step < last:
                    self._show(step)
            stopped = step < last or self._stop.agreed(self._accelerator)  # at the last step, too: what is left is made when it goes on
            if not self._saved and not (self._stop.error and step == 0):  # then nothing was trained, and the corrected command may begin
                self._save(step)
        if self._stop.error:
            where = f"and saved at step {step}" if step else "before the first step"
            raise UserError(f"{self._stop.error} (stopped {where})", exit_code=1)
        if stopped:
            reason = f"Stopped by {self._stop.reason} at step {step} of {last}"
            self._accelerator.print(f"{reason}; continue with --resume_from_checkpoint latest")
        return not stopped

    def finish(self) -> None:
        """The pipeline, the last samples, which the card then shows, the summary, the upload."""
        step = self._state.max_steps
        self._save_pipeline(step)
        self._sample(step)
        self._alone(lambda: self._write_card(self._folder))
        self._alone(lambda: report_end(self._config, step, self._task.facts))
        if self._config.push_to_hub:
            self._alone(lambda: push_pipeline(self._config, step))

    def _alone(self, work: Callable[[], None]) -> None:
        on_main_process(self._accelerator, work, self._folder)

    def _measure(self, step: int) -> None:
        evaluation, config = self._evaluation, self._config
        if evaluation and config.eval_steps and (step % config.eval_steps == 0 or step == self._state.max_steps):
            with self._state.whole.at(step) as ema:
                self._alone(lambda: self._measured(evaluation, step, ema))

    def _measured(self, evaluation: RunEvaluation, step: int, ema: EMAModel | None) -> None:
        if evaluation.has_measured(step):
            return
        with self._stop.interrupts(self._task.network, f"the evaluation of step {step}"):
            evaluation(ema, step, self._log.times)

    def _save(self, step: int) -> None:
        state, limit = self._state, self._config.checkpoints_total_limit
        held: Mapping[str, Tensor] = self._coupling_state
        save_checkpoint(self._accelerator, self._folder, step, state.ema, state.identity, limit, held, part=self._task.part)

    def _show(self, step: int) -> None:
        """Samples and saves the pipeline where they are due after a step that is not the last."""

        def passed(epochs: int) -> bool:
            per_epoch, accumulation = self._state.order.batches_per_epoch, self._config.gradient_accumulation_steps
            now, before = (count * accumulation // per_epoch for count in (step, step - 1))
            return epochs > 0 and now // epochs > before // epochs

        if self._config.grid_is_due(step, passed) and not grid_path(self._folder, step).exists():
            self._sample(step)
        if self._config.pipeline_is_due(passed):
            self._save_pipeline(step)

    def _sample(self, step: int) -> None:
        def sample(ema: EMAModel | None) -> None:
            with self._stop.interrupts(self._task.network, f"the samples of step {step}"):
                images = self._task.samples(ema)
                if images is None:
                    return
                path = grid_path(self._folder, step)
                partial = path.with_name(f"{PARTIAL}{path.name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                image_grid(images).save(partial, format="PNG")
                replace(partial, path)
                self._log.add_images(self._task.grid_name, images, step)

        with self._state.whole.at(step) as ema:
            self._alone(lambda: sample(ema))

    def _write_card(self, folder: Path) -> None:
        """Into ``folder``, of what the run's folder holds."""
        facts = {**self._task.facts, **measured_facts(self._config)}
        grid = max(self._folder.glob("samples/step-*.png"), default=None)
        card = self._task.card(self._folder.resolve().name, facts, grid and grid.relative_to(self._folder))
        partial = folder / f"{PARTIAL}README.md"
        card.save(partial)
        replace(partial, folder / "README.md")

    def _save_pipeline(self, step: int) -> None:
        """Leaves in the folder a pipeline that plain diffusers samples, with the card and the method in the weights' metadata."""

        def save(ema: EMAModel | None) -> None:
            task, folder = self._task, self._folder
            facts = {**task.facts, **measured_facts(self._config)}
            partial = folder / f"{PARTIAL}pipeline"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                with full_disk(partial):
                    task.save(partial, ema)
                    for weights in [*partial.glob("*.safetensors"), *partial.glob(f"{task.part}*/*.safetensors")]:
                        add_metadata(weights, facts)
                self._write_card(partial)
                for item in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # last: it makes it a pipeline
                    replace(item, folder / item.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # after a failure it may be what fills the disk

        with self._state.whole.at(step) as ema:
            self._alone(lambda: save(ema))
