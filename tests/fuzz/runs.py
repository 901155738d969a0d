"""Cases that go through whole scripts, and what they run on."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
from kills import final_hashes
from launch import Result, Scripts, tiny
from PIL import Image
from safetensors.torch import load_file
from tiny_text import tiny_text

from fuzz.damage import damage, damage_images
from fuzz.values import Flag, right_number, targets

Case = tuple[str, Callable[[], "str | None"]]
SECONDS = 150  # of a run of a second or two, on a busy machine
LOCKS = re.compile(r"(^|/)\.[\w.-]*$")  # hidden files: locks and markers
# Whole runs leave these out: what they name is not here, takes minutes, or is tried by other kinds.
LEFT_OUT = re.compile(
    r"num_(train_)?epochs|.*_name_or_path|.*revision|variant|dataset.*|train_data_dir|bundled_data|.*_dir|hub_.*|push_to_hub|local_rank|"
    r"torch_compile.*|use_8bit_adam|enable_xformers.*|report_to|logger|.*_column|streaming|plan|resume_.*|overwrite_.*|cache_.*|tracker_.*|"
    r"validation_prompts?|model_preset|mixed_precision|max_train_steps|use_lora"
)
MOST = {"resolution": 32, "train_batch_size": 32, "dataloader_num_workers": 2, "coupling_candidates": 64, "gradient_accumulation_steps": 4}


class Ground:
    """What cases need, made when the first of them does.

    Args:
        scripts: what runs them.
        folder: for all of it.
    """

    def __init__(self, scripts: Scripts, folder: Path) -> None:
        self._scripts, self._folder, self._count = scripts, folder, 0

    def cases(self, kind: str, draw: random.Random) -> Iterator[Case]:
        """Endless cases of a kind in `RUNS`."""
        while True:
            self._count += 1
            place = self._folder / f"case-{self._count}"
            yield RUNS[kind](self, draw, place)

    def run_case(self, draw: random.Random, place: Path) -> Case:
        """One or two flags with values that the flags' own words allow, on a run of two steps."""
        target = draw.choice([target for target in targets() if target.script in ("train_unconditional.py",) * 3 + ("finetune_sd.py",)])
        flags = [flag for flag in target.flags if not LEFT_OUT.fullmatch(flag.name) and (flag.kind is not str or flag.choices)]
        values = {flag.name: small_value(draw, flag) for flag in draw.sample(flags, draw.choice((1, 1, 2)))}
        words = (tiny if target.script == "train_unconditional.py" else tiny_text)(
            place / "run", **{"max_train_steps": 2, "eval_samples": 4, **values}
        )
        named = [f"--{name}" for name in values]
        return f"{target.script} {values}", partial(self._judge, words, target.script, named, place, sane)

    def data_case(self, draw: random.Random, place: Path) -> Case:
        """A folder of six pictures and something done to it; every picture is read in the one step."""
        photos = place / "photos"
        photos.mkdir(parents=True)
        for number, pixels in enumerate(numpy.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=numpy.uint8)):
            Image.fromarray(pixels).save(photos / f"photo-{number}.png")
        what, is_lost = damage_images(draw, photos)
        words = tiny(place / "run", train_data_dir=photos, train_batch_size=7, max_train_steps=1)
        named = ["--train_data_dir", *(path.name for path in photos.iterdir()), what.split()[0]]

        def fine(result: Result, output: Path) -> str | None:
            said = re.search(r"left out|skipped|not read|unreadable|5 images", result.stderr + result.stdout)
            return sane(result, output) or ("silent: the lost picture is not mentioned" if is_lost and not said else None)

        return what, partial(self._judge, words, "train_unconditional.py", named, place, fine)

    def checkpoint_case(self, draw: random.Random, place: Path) -> Case:
        """A file of a run that is to go on, damaged."""
        run = Path(shutil.copytree(self._run, place / "run"))
        files = sorted(
            path for path in run.rglob("*") if path.is_file() and ("checkpoint-" in str(path.relative_to(run)) or path.parent == run)
        )
        path = draw.choice(files)
        what = (
            f"{path.relative_to(run).parent}/{damage(draw, path, [each for each in files if each.suffix == path.suffix and each != path])}"
        )
        request = draw.choice(("latest", "latest", "checkpoint-4"))
        named = [path.name, "checkpoint-4", "checkpoint-2", str(run)]

        def fine(result: Result, output: Path) -> str | None:
            same = weights(output) == weights(self._continued) or "checkpoint-" in result.stderr
            return sane(result, output) or (None if same else "silent: other weights than without the damage")

        return f"{request}, {what}", partial(self._judge, self._words(run, request), "train_unconditional.py", named, place, fine)

    def cache_case(self, draw: random.Random, place: Path) -> Case:
        """A file of a latent cache, damaged."""
        cache = Path(shutil.copytree(self._cache, place / "cache"))
        files = sorted(path for path in cache.iterdir() if path.is_file() and not path.name.startswith("."))
        path = draw.choice(files)
        what = damage(draw, path, [each for each in files if each.suffix == path.suffix and each != path])

        def fine(result: Result, output: Path) -> str | None:
            same = losses(output) == losses(self._cached)
            return sane(result, output) or (None if same else "silent: other losses than without the damage")

        named = [path.name, "manifest.json", "--latent_cache_dir"]
        return what, partial(self._judge, self._cached_words(place / "run", cache), "train_text_to_image.py", named, place, fine)

    def samples_case(self, draw: random.Random, place: Path) -> Case:
        """A file of a folder of samples, damaged, and the same command again."""
        folder = Path(shutil.copytree(self._samples, place / "run"))
        path = draw.choice(sorted(folder.iterdir()))
        others = [each for each in folder.iterdir() if each.suffix == path.suffix and each != path and each.suffix != ".png"]
        what = damage(draw, path, others)

        def fine(result: Result, output: Path) -> str | None:
            wrong = [each.name for each in self._samples.glob("*.png") if each.read_bytes() != (output / each.name).read_bytes()]
            return f"silent: {wrong} are other images" if wrong else None

        return what, partial(self._judge, self._sample_words(folder), "scripts/sample.py", [path.name, "--output_dir"], place, fine)

    def _judge(
        self, words: Sequence[Any], program: str, named: Sequence[str], place: Path, fine: Callable[[Result, Path], str | None]
    ) -> str | None:
        """Runs a script on ``place / "run"``; what is wrong with how it ended, None if nothing."""
        output = place / "run"
        before = snapshot(output)
        started = self._scripts.start(words, program=program)
        try:
            result = started.wait(SECONDS)
        except AssertionError:
            return "hang"
        problem = verdict(result, named, before == snapshot(output), lambda: fine(result, output))
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(started.folder, ignore_errors=True)
        return problem

    @cached_property
    def _run(self) -> Path:
        """Four steps, checkpoints 2 and 4, and no summary: a run that is to go on."""
        self._done(self._words(self._folder / "run", None, max_train_steps=4))
        return self._folder / "run"

    @cached_property
    def _continued(self) -> Path:
        """The same, to step 6."""
        folder = Path(shutil.copytree(self._run, self._folder / "continued"))
        self._done(self._words(folder, "latest"))
        return folder

    @cached_property
    def _cache(self) -> Path:
        cache = self._folder / "cache"
        words = [*self._cached_words(self._folder / "none", cache), "--rows_per_shard", 6]
        self._done([word for word in words if word != "--cache_latents"], "scripts/precompute_latents.py")
        return cache

    @cached_property
    def _cached(self) -> Path:
        self._done(self._cached_words(self._folder / "cached", self._cache), "train_text_to_image.py")
        return self._folder / "cached"

    @cached_property
    def _samples(self) -> Path:
        self._done(self._sample_words(self._folder / "samples"), "scripts/sample.py")
        return self._folder / "samples"

    def _words(self, folder: Path, request: str | None, **changes: Any) -> list[str]:
        return tiny(
            folder, **{"checkpointing_steps": 2, "use_ema": True, "max_train_steps": 6, "resume_from_checkpoint": request, **changes}
        )

    def _cached_words(self, folder: Path, cache: Path) -> list[str]:
        return tiny_text(folder, cache_latents=True, latent_cache_dir=cache, center_crop=True, max_train_steps=1, train_batch_size=16)

    def _sample_words(self, folder: Path) -> list[Any]:
        return ["--model", self._run, "--output_dir", folder, "--num_images", 3, "--num_inference_steps", 2, "--batch_size", 2]

    def _done(self, words: Sequence[Any], program: str = "train_unconditional.py") -> None:
        self._folder.mkdir(exist_ok=True)
        result = self._scripts(words, program=program)
        assert result.code == 0, result.stderr


def small_value(draw: random.Random, flag: Flag) -> Any:
    """A value that the flag's words allow and that is served in a second."""
    if flag.kind is bool:
        return draw.choice(("true", "false"))
    if flag.choices:
        return draw.choice(list(flag.choices))
    if flag.name == "resolution":
        return 8 * draw.randint(1, 4)
    return right_number(draw, flag, MOST.get(flag.name, 20 if flag.kind is int else math.inf))


def verdict(result: Result, named: Sequence[str], is_untouched: bool, fine: Callable[[], str | None]) -> str | None:
    """What is wrong with how a script ended; ``fine`` looks at what it left where it says that all went well."""
    if "Traceback" in result.stderr:
        return f"traceback: {result.stderr.strip().splitlines()[-1]:.300}"
    if result.code == 0:
        return fine()
    if result.code not in (1, 2):
        return f"exit code {result.code}: {result.stderr[-300:]}"
    before = f"{Path(result.program).name}: error: "
    lines = [line.removeprefix(before) for line in result.stderr.splitlines() if line.startswith(before)]
    if len(lines) != 1:
        return f"{len(lines)} lines: {result.stderr[-300:]}"
    if not any(name in lines[0] for name in named):
        return f"unnamed: {lines[0]:.400}"
    return None if is_untouched or result.code == 1 else f"touched: {lines[0]:.300}"


def sane(result: Result, output: Path) -> str | None:
    """What is wrong with what a training run has left."""
    if not (output / "summary.json").exists():
        return "silent: no summary"
    found = losses(output)
    if not found or not all(isinstance(loss, float) and math.isfinite(loss) and loss > 0 for loss in found):
        return f"silent: losses {found}"
    for path in [*output.glob("*/*.safetensors"), *output.glob("*.safetensors")]:
        if not all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()):
            return f"silent: {path.relative_to(output)} is not finite"
    return None


def losses(output: Path) -> list[Any]:
    """Those of metrics.jsonl."""
    return [json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, str]:
    """Hashes of the network and of its average in the last checkpoint."""
    return final_hashes(output, 6)


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of every file but locks."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()} if folder.exists() else {}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if not LOCKS.search(name)}


RUNS: dict[str, Callable[[Ground, random.Random, Path], Case]] = {
    "run": Ground.run_case,
    "data": Ground.data_case,
    "checkpoint": Ground.checkpoint_case,
    "cache": Ground.cache_case,
    "samples": Ground.samples_case,
}
