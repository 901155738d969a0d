"""Scores samples against real images, by one process or several, and goes on where it was killed.

    python scripts/evaluate.py --samples runs/digits --num_images 1797 --num_inference_steps 20 --reference digits \\
      --metrics frechet_distance kid precision recall --output runs/digits.json
    accelerate launch scripts/evaluate.py --samples samples.npz --reference cifar10-32x32.npz --protocol cifar10-legacy --output fid.json

--samples is a run of this suite, one of its checkpoints, or a pipeline, which is sampled as by scripts/sample.py; or images: a folder, or
an .npz. --protocol fixes what must agree for two scores to be comparable: docs/SCORES.md. Run the command again to continue.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from immiscible.commands import called_as, sample
from immiscible.errors import UserError, run_script
from immiscible.flags import Names, Parser, number, plain_text, text_path

if TYPE_CHECKING:
    from accelerate import Accelerator

    from immiscible.evaluation.features import FeatureNetwork
    from immiscible.evaluation.image_files import ImageFiles
    from immiscible.evaluation.kept_features import MeasuredImages
    from immiscible.evaluation.protocols import Protocol
    from immiscible.evaluation.real_images import RealImages
    from immiscible.evaluation.statistics import StatisticsKey
    from immiscible.sampling.loaded import Loaded

SAME = ("network", "weights_sha256", "resize", "resolution", "protocol")  # what statistics of the reference must agree in


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples", type=text_path, required=True, help="a run, a checkpoint-N, a pipeline, a folder of images, or an .npz"
    )
    parser.add_argument(
        "--reference",
        type=plain_text,
        help="real images: bundled data by name, a folder as --train_data_dir, an .npz of images, or of statistics (own or published)",
    )
    parser.add_argument("--held_out", type=plain_text, help="more of them, not trained on, for nearest_neighbor_ratio")
    parser.add_argument("--output", type=text_path, required=True, help="the JSON file to write")
    parser.add_argument("--metrics", nargs="+", type=plain_text, help="names, see docs/SCORES.md; by default those of the protocol")
    parser.add_argument(
        "--protocol", choices=Names("immiscible.evaluation.protocols", "PROTOCOLS"), default="default", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--features", type=plain_text, help="digits, pixels, efficientnet, inception, clip, clip-l14-336, dinov2, or a network's path"
    )
    parser.add_argument("--feature_weights", type=text_path, help="the network's file or folder, if it is not in the cache folders")
    parser.add_argument("--work_dir", type=text_path, help="for samples and features, kept to continue; by default --output and .work")
    parser.add_argument("--write_reference", type=text_path, metavar="FILE.npz", help="keep the statistics of --reference, for a later one")
    sampling = parser.add_argument_group("of a model to sample, as in scripts/sample.py")
    sampling.add_argument("--num_images", type=number(int, least=1, most=10**8), help="by default those of the protocol")
    sampling.add_argument("--num_inference_steps", type=number(int, least=1, most=10**5), help="steps of the sampler")
    sample.add_sampling(sampling)
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    check(arguments)
    from immiscible.training.session import joined  # after parsing, so that --help and usage errors come at once

    with joined(arguments.mixed_precision, sample.PATIENCE) as accelerator:
        evaluate(arguments, shlex.join([called_as("scripts/evaluate.py"), *argv]), accelerator)


def check(arguments: argparse.Namespace) -> None:
    for name in ("output", "write_reference"):
        path = getattr(arguments, name)
        if path and path.exists():
            raise UserError(f"--{name} {path} is there already: remove it, or give another name")
        if path and not path.parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {path.parent}; make it first")
    if not arguments.samples.exists():
        raise UserError(f"--samples {arguments.samples}: no such file or folder")
    arguments.work_dir = arguments.work_dir or Path(f"{arguments.output}.work")


@dataclass
class Samples:
    """What is known of the samples before they are measured, or even there.

    Args:
        count: how many.
        side: in pixels.
        channels: 1 or 3.
        labels: whether they have classes.
        captions: whether they have captions.
        class_names: where the classes have names.
        labels_chosen: how classes were, where that is known: ``equal`` or ``random``.
        loaded: the model that they are drawn from; None where they are there.
        files: None where they are not.
    """

    count: int
    side: int
    channels: int
    labels: bool
    captions: bool
    class_names: Sequence[str] | None = None
    labels_chosen: str | None = None
    loaded: Loaded | None = None
    files: ImageFiles | None = None


def evaluate(arguments: argparse.Namespace, command: str, accelerator: Accelerator) -> None:
    """What is asked is checked before anything is sampled, and all is sampled before anything is measured."""
    from immiscible.evaluation.kept_features import MeasuredImages, measure_together
    from immiscible.evaluation.protocols import check_protocol, find_protocol
    from immiscible.evaluation.scoring import SETS, chosen_metrics, moments_needed, rows_needed
    from immiscible.processes import on_main_process

    protocol = find_protocol(arguments.protocol)
    names = chosen_metrics(arguments.metrics, protocol)
    samples = of_model(arguments, protocol) if is_model(arguments.samples) else of_files(arguments, names)
    check_protocol(arguments.protocol, resolution=samples.side, samples=samples.count, labels=samples.labels_chosen)
    features = network_of(arguments, protocol, samples, accelerator)
    real = real_images(arguments, protocol, names, samples)
    on_main_process(accelerator, lambda: check_sets(arguments, names, samples, features, real))
    if samples.loaded:
        draw(arguments, command, accelerator, samples)
        samples = of_files(arguments, names, arguments.work_dir / "samples")
    folder = arguments.work_dir / "features"
    measured = {of: MeasuredImages(folder) for of in SETS}
    fields = {of: (rows_needed(names, of) - {"labels"}, moments_needed(names, of)) for of in SETS}
    if arguments.write_reference:
        fields["reference"][1].add("features")
    assert samples.files  # those that were there, or have been drawn
    measured["samples"] = measure_together(
        accelerator, samples.files, features, set.union(*fields["samples"]), folder, "features of the samples"
    )
    for of, images in real.items():
        if not any(fields[of]):
            continue
        key = partial(key_of_read, arguments, protocol, features, samples, images)
        measured[of] = images.measure(accelerator, features, folder, rows=fields[of][0], moments=fields[of][1], key=key)
    on_main_process(accelerator, lambda: finish(arguments, command, protocol, names, samples, features, real, measured), arguments.output)


def is_model(path: Path) -> bool:
    from immiscible.training.checkpoints import NAME
    from immiscible.training.folder import MARKER

    return path.is_dir() and ((path / MARKER).exists() or (path / "model_index.json").exists() or bool(NAME.fullmatch(path.resolve().name)))


def of_files(arguments: argparse.Namespace, names: Sequence[str], drawn: Path | None = None) -> Samples:
    """The images that are there, or those that were drawn into a folder."""
    from immiscible.evaluation.image_files import labels_of, open_samples, sampled
    from immiscible.evaluation.scoring import fields_needed

    if not drawn:
        refuse_sampling(arguments)
    path, needed = drawn or arguments.samples, fields_needed(names, "samples")
    files = open_samples(path, with_labels="labels" in needed, with_captions="text_embeddings" in needed)
    return Samples(
        files.count,
        files.side,
        files.channels,
        files.has_labels,
        files.has_captions,
        files.class_names,
        labels_of(sampled(path)),
        files=files,
    )


def refuse_sampling(arguments: argparse.Namespace) -> None:
    """Whether no flag of sampling is given, where there are images already."""
    flags = argparse.ArgumentParser()
    sample.add_sampling(flags)
    flags.set_defaults(num_images=None, num_inference_steps=None, mixed_precision=arguments.mixed_precision)
    for name, default in vars(flags.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise UserError(f"--{name} is of a model to sample, and --samples {arguments.samples} are images already; leave it out")


def of_model(arguments: argparse.Namespace, protocol: Protocol) -> Samples:
    """What the model will give; completes the arguments to those of sample.py."""
    from immiscible.sampling.loaded import image_mode, image_size

    arguments.num_images = arguments.num_images or protocol.samples
    for name in ("num_images", "num_inference_steps"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is needed to sample --samples {arguments.samples}")
    arguments.model, arguments.output_dir, arguments.npz = str(arguments.samples), arguments.work_dir / "samples", False
    with renamed():
        sample.check(arguments)
        loaded = sample.load(arguments)
        side = (arguments.resolution or loaded.side) if loaded.prompted else arguments.resolution
        width, height = image_size(loaded, side)
    if width != height:
        raise UserError(f"--samples {arguments.samples} samples images of {width}x{height}; only square ones are scored")
    classes = bool(loaded.num_classes or arguments.class_names)
    if classes:
        arguments.labels = arguments.labels or protocol.labels
    return Samples(
        arguments.num_images,
        width,
        1 if image_mode(loaded) == "L" else 3,
        classes,
        loaded.prompted,
        labels_chosen=arguments.labels if classes else None,
        loaded=loaded,
    )


@contextmanager
def renamed() -> Iterator[None]:
    """Says what sample.py says of its flags by the names that they have here."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("--model ", "--samples ").replace("--output_dir ", "--work_dir ")
        raise UserError(said, error.exit_code) from None


def network_of(arguments: argparse.Namespace, protocol: Protocol, samples: Samples, accelerator: Accelerator) -> FeatureNetwork:
    """The network that looks; a protocol's own."""
    from immiscible.evaluation.features import build_features
    from immiscible.evaluation.scoring import check_fid

    if protocol.features and arguments.features not in (None, protocol.features):
        raise UserError(f"--protocol {arguments.protocol} is of the features {protocol.features}, not of {arguments.features}")
    digits = arguments.reference == "digits" and (samples.side, samples.channels) == (8, 1)
    arguments.features = arguments.features or protocol.features or ("digits" if digits else "pixels")
    features = build_features(
        arguments.features,
        channels=samples.channels,
        resolution=samples.side,
        device=accelerator.device,
        weights=arguments.feature_weights,
        resize=protocol.resize,
    )
    check_fid(arguments.metrics, features)
    return features


def real_images(arguments: argparse.Namespace, protocol: Protocol, names: Sequence[str], samples: Samples) -> dict[str, RealImages]:
    """The reference and what is held out, as far as they are given."""
    from immiscible.evaluation.real_images import open_real
    from immiscible.evaluation.scoring import SETS, check_classes, fields_needed

    found = {}
    for of, flag in SETS.items():
        if of == "samples" or getattr(arguments, of) is None:
            continue
        labels = "labels" in fields_needed(names, of)
        found[of] = images = open_real(
            getattr(arguments, of), flag, side=samples.side, channels=samples.channels, crop=protocol.crop, with_labels=labels
        )
        if labels and images.images:
            check_classes(samples.class_names, images.images)
    return found


def check_sets(
    arguments: argparse.Namespace, names: Sequence[str], samples: Samples, features: FeatureNetwork, real: dict[str, RealImages]
) -> None:
    from immiscible.evaluation.kept_features import given_by
    from immiscible.evaluation.scoring import available, check_available
    from immiscible.evaluation.statistics import key_of

    given = given_by(features, samples.channels, samples.side)
    ours = available(f"--samples {arguments.samples}", given, labels=samples.labels, captions=samples.captions)
    check_available(names, {"samples": ours, **{of: images.available(given) for of, images in real.items()}}, features)
    if arguments.write_reference and ("reference" not in real or real["reference"].file):
        raise UserError("--write_reference needs --reference, and images in it")
    for images in real.values():
        if images.file:
            key = key_of(features, data="", split="", crop="", resolution=samples.side, count=0, protocol=arguments.protocol)
            images.file.check(features.num_features, **{name: getattr(key, name) for name in SAME})


def key_of_read(
    arguments: argparse.Namespace,
    protocol: Protocol,
    features: FeatureNetwork,
    samples: Samples,
    images: RealImages,
    read: MeasuredImages,
) -> StatisticsKey:
    """The key of the statistics of these images: by their pixels, as two folders may have equal names in them."""
    from immiscible.evaluation.statistics import key_of

    files = images.images
    assert files  # of statistics in a file nothing is read
    return key_of(
        features,
        data=f"{files.fingerprint}, pixels {read.pixels}",
        split=protocol.split,
        crop=files.crop,
        resolution=samples.side,
        count=files.count,
        protocol=arguments.protocol,
    )


def draw(arguments: argparse.Namespace, command: str, accelerator: Accelerator, samples: Samples) -> None:
    """Samples the model into the work folder, or what of it is not there yet."""
    from immiscible.processes import on_main_process

    on_main_process(accelerator, lambda: arguments.work_dir.mkdir(parents=True, exist_ok=True), arguments.work_dir)
    loaded, samples.loaded = samples.loaded, None
    assert loaded
    with renamed():
        sample.sample(arguments, command, accelerator, loaded)
    accelerator.free_memory()  # of the model, which would stay beside the network that looks


def finish(
    arguments: argparse.Namespace,
    command: str,
    protocol: Protocol,
    names: Sequence[str],
    samples: Samples,
    features: FeatureNetwork,
    real: dict[str, RealImages],
    measured: dict[str, MeasuredImages],
) -> None:
    """Computes the scores, writes and prints them."""
    from immiscible.evaluation.image_files import sampled
    from immiscible.evaluation.scoring import facts_of, moments_needed, score, table, values_of, versions
    from immiscible.evaluation.statistics import write_reference
    from immiscible.files import PARTIAL, replace

    scores = score(names, **measured)
    for images in real.values():
        if images.file and images.file.key is None:
            scores.warnings.append(f"{images.named} does not say how it was made; nothing but its size was checked")
    if arguments.write_reference:
        key = key_of_read(arguments, protocol, features, samples, real["reference"], measured["reference"])
        needed = moments_needed(names, "reference") | {"features"}
        write_reference(arguments.write_reference, key, {name: measured["reference"].moments(name) for name in needed})
    reference = {of: {"from": getattr(arguments, of), **images.facts()} for of, images in real.items()}
    drawn = sampled(arguments.work_dir / "samples") if is_model(arguments.samples) else sampled(arguments.samples)
    found = {
        "command": command,
        "protocol": arguments.protocol,
        "versions": versions(),
        "features": facts_of(features, arguments.features),
        "samples": {"from": str(arguments.samples), "images": samples.count, "side": samples.side, "pixels": measured["samples"].pixels},
        "sampling": {name: len(value) if name == "prompts" else value for name, value in drawn.items()},
        **reference,
        "scores": values_of(scores),
        "warnings": scores.warnings,
    }
    partial_file = arguments.output.with_name(f"{PARTIAL}{arguments.output.name}")
    partial_file.write_text(json.dumps(found, indent=1) + "\n")
    replace(partial_file, arguments.output)
    against = "".join(
        f", {of.replace('_', ' ')} {facts['from']} ({facts['images'] or 'unknown'} images)" for of, facts in reference.items()
    )
    features_used = f"protocol {arguments.protocol}, features {arguments.features}"
    sys.stdout.write(
        f"{samples.count} samples of {samples.side}x{samples.side}{against}; {features_used}\n{table(scores, features.name)}\n"
        f"{arguments.output} is written; {arguments.work_dir} keeps what was sampled and measured, for more metrics, and may be removed\n"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
