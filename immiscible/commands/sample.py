"""Samples a trained model into a folder: exactly N images, by one process or several, resumable, the same ones for a seed.

    python scripts/sample.py --model runs/digits --num_images 1003 --num_inference_steps 50 --output_dir samples
    accelerate launch scripts/sample.py --model RUN/checkpoint-5000 --weights raw --class_names classes.txt --num_images 50000 \\
      --num_inference_steps 50 --guidance_scale 1.5 --scheduler ddim --npz --output_dir samples

--model is a run of this suite, one of its checkpoints, or a pipeline that plain diffusers loads. A model that is told the class is sampled
in turn, so each class equally often; so are prompts and class names, by their line. Run the command again to complete a folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from immiscible.commands import called_as
from immiscible.errors import UserError, run_script
from immiscible.flags import Names, Parser, number, plain_text, text_path

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.sampling.folder import Request, SampleFolder
    from immiscible.sampling.loaded import Loaded

PATIENCE = timedelta(hours=12)  # with which processes that finish early wait for the last one


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=plain_text,
        required=True,
        help="a run's folder, a checkpoint-N in one, or a diffusers pipeline, local or on the hub",
    )
    parser.add_argument(
        "--output_dir",
        type=text_path,
        required=True,
        help="gets 000000.png and so on, manifest.json, and metadata.jsonl (what each was told)",
    )
    parser.add_argument("--num_images", type=number(int, least=1, most=10**8), required=True, help="N: exactly as many files are left")
    parser.add_argument("--num_inference_steps", type=number(int, least=1, most=10**5), required=True, help="steps of the sampler")
    add_sampling(parser)
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, as the ADM evaluation reads it")
    return parser


def add_sampling(parser: Any) -> None:
    """The flags that say how a model is sampled, which other scripts that sample have too."""
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a run or checkpoint; by default the average where the run kept one")
    parser.add_argument("--lora", type=plain_text, help="adapters for a text-to-image pipeline: a folder, or a name on the hub")
    parser.add_argument(
        "--base",
        type=plain_text,
        help="of a checkpoint or a LoRA run: the VAE or the checkpoint it was trained with, if that is not where it was",
    )
    parser.add_argument("--prompts", type=text_path, metavar="FILE", help="a prompt a line; image i is of prompt i modulo their number")
    parser.add_argument(
        "--class_names",
        type=text_path,
        metavar="FILE",
        help="as --prompts, a class a line; equal names stay classes apart, and go into arr_1",
    )
    parser.add_argument(
        "--guidance_scale",
        type=number(float, least=0, most=100),
        help="1 is no guidance; required with prompts or class names, at least 1 there of a U-Net; of a model trained with "
        "--class_dropout_prob 1 by default, and 0 samples no class",
    )
    parser.add_argument(
        "--guidance_interval",
        type=number(float, least=0, most=1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of such a model: only steps at these noise levels are guided, of 0 (image) to 1 (noise); by default all",
    )
    parser.add_argument(
        "--scheduler", choices=Names("immiscible.sampling.loaded", "SCHEDULERS"), help="the sampler; by default what the pipeline has"
    )
    parser.add_argument(
        "--resolution",
        type=number(int, least=1, most=2**14),
        help="side of text-to-image samples; by default the run's, or what the network says",
    )
    parser.add_argument(
        "--labels",
        choices=("equal", "random"),
        help="each class or prompt in turn (by default), or one drawn for each image by --seed, as ADM and EDM do",
    )
    parser.add_argument("--seed", type=number(int, least=0, most=2**63 - 1), default=0, help="image i is a function of it and of i")
    parser.add_argument("--batch_size", type=number(int, least=1, most=2**14), default=16, help="images sampled together by a process")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="inside the network")


def check(arguments: argparse.Namespace) -> None:
    if arguments.prompts and arguments.class_names:
        raise UserError("--prompts and --class_names are given together; choose one")


def check_model(arguments: argparse.Namespace, loaded: Loaded) -> None:
    steps = loaded.pipeline.scheduler.config.num_train_timesteps
    if arguments.num_inference_steps > steps:
        raise UserError(f"--num_inference_steps {arguments.num_inference_steps} exceeds the {steps} steps of the model's noise process")
    kind, told = type(loaded.pipeline).__name__, arguments.prompts or arguments.class_names
    if loaded.prompted and not told:
        raise UserError(f"--model {arguments.model} is a {kind}: give --prompts or --class_names")
    if loaded.prompted and arguments.guidance_scale is None:
        raise UserError("--guidance_scale is needed with prompts: 1 samples without guidance, 7.5 is Stable Diffusion's usual")
    for name in ("prompts", "class_names"):
        if not loaded.prompted and getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for text-to-image pipelines; --model {arguments.model} is a {kind}")
    if arguments.labels and not loaded.prompted and loaded.num_classes is None:
        raise UserError(f"--labels is of classes and prompts, and --model {arguments.model} is told neither")
    check_guidance(arguments, loaded)


def check_guidance(arguments: argparse.Namespace, loaded: Loaded) -> None:
    scale, interval = arguments.guidance_scale, arguments.guidance_interval
    if scale not in (None, 1) and not loaded.guidable:
        raise UserError(
            f"--guidance_scale is for text-to-image pipelines and models trained with --class_dropout_prob; --model {arguments.model} is "
            "neither"
        )
    if scale is not None and scale < loaded.least_guidance:
        raise UserError(f"--guidance_scale must be at least 1 with prompts, not {scale:g}")
    if interval and (loaded.prompted or scale in (None, 1)):
        raise UserError("--guidance_interval is for a model that is told classes by number, and --guidance_scale other than 1")
    if interval and interval[0] > interval[1]:
        raise UserError(f"--guidance_interval must have the lower number first, not {interval[0]:g} {interval[1]:g}")


def check_steps(steps: int, loaded: Loaded) -> None:
    """Stable Diffusion's samplers begin a step later (``steps_offset``), which at all 1,000 steps is one that there is not."""
    scheduler = loaded.pipeline.scheduler
    scheduler.set_timesteps(steps)
    last = scheduler.config.num_train_timesteps - 1
    if type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler") and scheduler.timesteps.max() > last:
        raise UserError(
            f"--num_inference_steps {steps}: {type(scheduler).__name__} would begin beyond the model's last step, {last}; give fewer"
        )


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    check(arguments)
    from immiscible.training.session import joined  # after parsing, so that --help and usage errors come at once

    with joined(arguments.mixed_precision, PATIENCE) as accelerator:
        sample(arguments, shlex.join([called_as("scripts/sample.py"), *argv]), accelerator, load(arguments))


def sample(arguments: argparse.Namespace, command: str, accelerator: Accelerator, loaded: Loaded) -> None:
    """Completes the folder; ``command`` is what asked for it."""
    from immiscible.processes import on_main_process
    from immiscible.sampling.folder import Request, SampleFolder, read_lines
    from immiscible.sampling.loaded import image_mode, image_size
    from immiscible.sampling.pipelines import WHOLE

    flag = "--prompts" if arguments.prompts else "--class_names"
    file = arguments.prompts or arguments.class_names
    prompts = read_lines(file, flag) if file else []
    side = (arguments.resolution or loaded.side) if loaded.prompted else arguments.resolution
    folder = SampleFolder(arguments.output_dir, image_size(loaded, side), image_mode(loaded))
    request = Request(
        num_images=arguments.num_images,
        steps=arguments.num_inference_steps,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        prompts=prompts,
        guidance_scale=1.0 if arguments.guidance_scale is None else arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval or WHOLE),
        side=side,
        random_labels=arguments.labels == "random",
    )
    classes = len(prompts) if arguments.class_names else loaded.num_classes
    manifest: dict[str, Any] = {}

    def prepare() -> None:
        manifest.update(describe(arguments, command, loaded, request, folder.size, accelerator.num_processes))
        folder.prepare(manifest)

    on_main_process(accelerator, prepare)
    notice(accelerator, loaded, request, classes)
    start = time.perf_counter()
    total = draw_share(accelerator, loaded, request, folder)
    on_main_process(accelerator, lambda: finish(arguments, request, folder, manifest, classes))
    seconds, (width, height) = timedelta(seconds=round(time.perf_counter() - start)), folder.size
    accelerator.print(
        f"{request.num_images} images of {width}x{height} in {arguments.output_dir}: "
        f"{total} sampled in {seconds}, {request.num_images - total} were there"
    )


def load(arguments: argparse.Namespace) -> Loaded:
    """The model with the sampler that is asked for, looked at whether it can do what the flags say."""
    from diffusers.utils import logging

    from immiscible.sampling.loaded import take_scheduler
    from immiscible.tasks.from_run import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of an AutoencoderKL in an LDMPipeline diffusers says that it expected a VQ model
    loaded = load_model(arguments.model, weights=arguments.weights, lora=arguments.lora, base=arguments.base)
    check_model(arguments, loaded)
    if arguments.scheduler:
        loaded.pipeline = take_scheduler(loaded.pipeline, arguments.scheduler)
    check_steps(arguments.num_inference_steps, loaded)
    return loaded


def notice(accelerator: Accelerator, loaded: Loaded, request: Request, classes: int | None) -> None:
    """Says of which classes there will be more, and which prompts are not read to their end."""
    from immiscible.sampling.loaded import cut_short

    if classes and request.num_images % classes and not request.random_labels:
        more = request.num_images % classes
        accelerator.print(f"{request.num_images} images of {classes} classes: classes 0 to {more - 1} get one image more than the others")
    prompts = request.prompts
    if accelerator.is_main_process and prompts and (short := cut_short(loaded.pipeline, prompts)):
        most = loaded.pipeline.tokenizer.model_max_length
        accelerator.print(
            f"{len(short)} of {len(prompts)} prompts, first line {short[0] + 1}, are cut off after the text encoder's {most} tokens"
        )


def draw_share(accelerator: Accelerator, loaded: Loaded, request: Request, folder: SampleFolder) -> int:
    """Samples this process's images that are not there yet; returns how many all processes have sampled.

    Raises:
        UserError: a process failed; on every process.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from immiscible.networks.kinds import part_of
    from immiscible.sampling.folder import draw
    from immiscible.sampling.pipelines import network_of

    network = network_of(loaded.pipeline)
    setattr(loaded.pipeline, part_of(network), accelerator.prepare_model(network, evaluation_mode=True))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = sum(map(len, request.batches(rank, ranks)))
    written, failure = 0, None
    share = f" (process 0 of {ranks})" if ranks > 1 else ""
    with tqdm(total=mine, desc=f"sampling{share}", unit="image", disable=not accelerator.is_main_process) as bar:
        try:
            written = draw(loaded.pipeline, request, folder, device=accelerator.device, rank=rank, ranks=ranks, progress=bar.update)
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = f"cannot write {error.filename or folder.path}: {error.strerror or error}"
    found = gather_object([(written, failure)])
    for _, problem in found:
        if problem:
            raise UserError(problem, exit_code=1)
    return sum(count for count, _ in found)


def describe(
    arguments: argparse.Namespace, command: str, loaded: Loaded, request: Request, size: tuple[int, int], processes: int
) -> dict[str, Any]:
    """What defines the samples, and how they were made."""
    import diffusers
    import torch

    from immiscible.sampling.loaded import networks

    pipeline = loaded.pipeline
    kind = "class names" if arguments.class_names else "class numbers" if loaded.num_classes else None
    settings = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        "command": command,
        "complete": False,
        "num_images": request.num_images,
        "batch_size": request.batch_size,
        "processes": processes,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "model": arguments.model,
        "weights": loaded.weights,
        "lora": arguments.lora,
        "networks": networks(pipeline),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_settings": settings,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale if loaded.prompted or request.guidance_scale != 1 else None,
        "guidance_interval": arguments.guidance_interval,
        "seed": request.seed,
        "size": list(size),
        "mixed_precision": arguments.mixed_precision,
        "prompts": list(request.prompts),
        "labels": f"{kind or 'prompts'}, drawn at random" if request.random_labels else kind,
    }


def finish(arguments: argparse.Namespace, request: Request, folder: SampleFolder, manifest: dict[str, Any], classes: int | None) -> None:
    """Makes sure that every image is there, and writes what is written at the end."""
    from immiscible.sampling.folder import file_name

    lacking = [number for number in range(request.num_images) if not (folder.path / file_name(number)).exists()]
    if lacking:
        raise UserError(f"{len(lacking)} of {request.num_images} images are missing, the first is {lacking[0]}; sample again", exit_code=1)
    if request.prompts or classes:
        folder.write_metadata(request.num_images, request.prompts, classes, request.turn)
    if arguments.npz:
        folder.write_table(request.num_images, classes, request.turn)
    folder.write_manifest({**manifest, "complete": True})


if __name__ == "__main__":
    sys.exit(run_script(main))
