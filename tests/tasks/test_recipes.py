"""The papers' Stable Diffusion experiments as task files, the files for `accelerate launch`, and what docs/DATA.md says to run."""

import json
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launch import ROOT, accelerate_launch, flags, free_port, run_command
from PIL import Image
from tiny_text import model_folder

from immiscible.configs import TextToImageConfig, UnconditionalConfig
from immiscible.data.loading import load_images
from immiscible.errors import UserError
from immiscible.flags import parse_config

DEMO = sorted((ROOT / "configs/tasks").glob("sd_tiny*.yaml"))
RECIPES = sorted(set((ROOT / "configs/tasks").glob("sd_*.yaml")) - set(DEMO))
SPEED = ROOT / "configs/tasks/mscoco_dit.yaml"  # of another paper, with a network of its own
XL = sorted((ROOT / "configs/tasks").glob("sdxl*.yaml"))  # of no paper
SD3 = ROOT / "configs/tasks/sd3_lora.yaml"  # likewise
METHODS = sorted((ROOT / "configs/methods").glob("*.yaml"))
ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
CONFIGS = {
    "train_unconditional.py": UnconditionalConfig,
    "train_text_to_image.py": TextToImageConfig,
    "finetune_sd.py": TextToImageConfig,
}
IDS = {"ids": lambda path: path.stem}


def launch_line(path: Path) -> tuple[list[str], str, list[str]]:
    """What the file's header says to run: the launcher's words, the script, and the script's words."""
    header = "\n".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    lines = re.findall(r"^ +accelerate launch (.+)$", re.sub(r"\\\n *", "", header), flags=re.MULTILINE)
    (line,) = [line for line in lines if "scripts/evaluate.py" not in line]
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    return words[: words.index(script)], script, words[words.index(script) + 1 :]


def parse(script: str, words) -> UnconditionalConfig | TextToImageConfig:
    absolute = [str(ROOT / word) if str(word).startswith("configs/") else str(word) for word in words]
    return parse_config(CONFIGS[script], absolute, program=script, description="")


def recipe(stem: str) -> tuple[UnconditionalConfig | TextToImageConfig, int]:
    """The configuration that the launch line of a task gives, and its number of processes."""
    launcher, script, words = launch_line(ROOT / f"configs/tasks/{stem}.yaml")
    assert launcher[0] == "--config_file" and len(launcher) == 2
    return parse(script, words), load_config_from_file(str(ROOT / launcher[1])).num_processes


# The files


@pytest.mark.parametrize("path", [*RECIPES, SPEED, *XL, SD3], **IDS)
def test_a_header_says_what_design_asks_for(path):
    text = path.read_text()
    header = text[: text.index("\n", text.rindex("\n#") + 1)]
    for what in (r"# Devices?: ", r"# Expected (FID|number)", r"# Reproduced: no \(needs", r"not measured", r"docs/DATA.md|see there"):
        assert re.search(what, header), what
    assert "accelerate launch scripts/evaluate.py --samples runs/" in path.read_text()
    launcher, _, words = launch_line(path)
    assert (ROOT / launcher[1]).is_file() and f"configs/tasks/{path.name}" in words and "--output_dir" in words


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in ("sd_imagenet", "sd_unconditional_imagenet10")], **IDS)
def test_a_recipe_composes_with_the_methods(path):
    """A text-to-image script has no other process than the checkpoint's."""
    _, script, _ = launch_line(path)
    alone = asdict(parse(script, ["--config", path]))
    refused = []
    for method in METHODS:
        try:
            together = asdict(parse(script, ["--config", path, method]))
        except UserError as error:
            refused.append(method.stem)
            assert re.search(r"image_scale|noise_process|flow_prediction", str(error)), error
            continue
        told = {line.partition(":")[0] for line in method.read_text().splitlines() if not line.startswith("#")}
        assert {name for name in alone if alone[name] != together[name]} <= told
    assert refused == ([] if script == "train_unconditional.py" else ["best", "flow", "loom", "nearest_flow", "ot_cfm", "scaled"])


PAPER = {  # batch, steps, learning rate, processes
    "sd_imagenet": (2048, 20_000, 1e-4, 8),
    "sd_imagenet_1gpu": (2048, 20_000, 1e-4, 1),
    "sd_finetune_imagenet": (512, 5_000, 1e-5, 4),
    "sd_finetune_imagenet_1gpu": (512, 5_000, 1e-5, 1),
    "sd_unconditional_imagenet10": (512, 70_000, 1e-4, 4),
    "sd_laion10k": (512, 25_000, 1e-4, 4),
    "sd_coco": (512, 50_000, 1e-4, 4),
}


def test_the_recipes_are_the_papers():
    assert sorted(PAPER) == [path.stem for path in RECIPES]
    for stem, (batch, steps, rate, processes) in PAPER.items():
        config, count = recipe(stem)
        assert (count, config.max_train_steps, config.learning_rate) == (processes, steps, rate), stem
        assert count * config.train_batch_size * config.gradient_accumulation_steps == batch, stem
        assert (config.resolution, config.mixed_precision, config.use_ema, config.max_grad_norm) == (256, "fp16", True, 1), stem
        assert config.center_crop and config.random_flip and config.gradient_checkpointing, stem
        assert (config.lr_scheduler, config.lr_warmup_steps, config.seed) == ("constant", 0, 42), stem
        assert (config.adam_beta1, config.adam_beta2, config.adam_weight_decay) == (0.9, 0.999, 0.01), stem
        assert config.noise_coupling == ("independent" if stem == "sd_coco" else "assignment"), stem  # not of the papers, and our advice
        assert "v1-4" in str(getattr(config, "pretrained_model_name_or_path", None) or config.vae_model_name_or_path), stem
    unconditional, _ = recipe("sd_unconditional_imagenet10")
    assert (unconditional.train_subset_fraction, unconditional.ddpm_beta_schedule) == (0.1, "scaled_linear")
    assert (unconditional.ddpm_beta_start, unconditional.ddpm_beta_end) == (0.00085, 0.012)


def test_the_recipe_of_speeds_text_to_image_is_the_papers():
    """Table 5 and appendix A.7."""
    config, count = recipe(SPEED.stem)
    assert (config.model_preset, config.resolution, config.guidance_scale) == ("dit-xl-2", 256, 1.5)
    assert (count * config.train_batch_size, config.max_train_steps, config.learning_rate, config.adam_weight_decay) == (
        256,
        400_000,
        1e-4,
        0,
    )
    assert config.use_ema and config.random_flip and config.proportion_empty_prompts == 0.1
    assert (config.timestep_sampling, config.loss_weighting) == ("asymmetric", "change_aware")


def test_one_gpu_takes_the_same_step_in_more_pieces():
    for stem in ("sd_imagenet", "sd_finetune_imagenet"):
        script = launch_line(ROOT / f"configs/tasks/{stem}.yaml")[1]
        many, one = (asdict(parse(script, ["--config", f"configs/tasks/{name}.yaml"])) for name in (stem, f"{stem}_1gpu"))
        assert {name for name in many if many[name] != one[name]} == {"train_batch_size", "gradient_accumulation_steps"}
        config, _ = recipe(f"{stem}_1gpu")
        text = (ROOT / f"configs/tasks/{stem}_1gpu.yaml").read_text()
        micro, step = config.train_batch_size, config.train_batch_size * config.gradient_accumulation_steps
        assert config.coupling_window == config.gradient_accumulation_steps  # the launch line's: pairs over the whole step
        assert f"here over {micro} images and not, as the paper's, over {step}" in text
        assert f"`--coupling_window {config.coupling_window}` it pairs over all {step} images" in text


# Runs, with everything large replaced by something small


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint, a folder of two classes, and one of captioned images."""
    folder = tmp_path_factory.mktemp("recipes")
    random = np.random.default_rng(0)
    lines = []
    for number in range(40):
        picture = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
        for path in (folder / "classes" / ("crane", "tench")[number % 2] / f"{number}.png", folder / "captions" / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        lines.append({"file_name": f"{number}.png", "text": [f"picture {number}", f"number {number}"]})
    (folder / "captions/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"model": model_folder(), "xl": model_folder("xl"), "sd3": model_folder("3")}
    return {**models, "classes": folder / "classes", "captions": folder / "captions"}


def shrunk(config: UnconditionalConfig | TextToImageConfig, small: dict[str, Path], output: Path) -> list[str]:
    """The flags that replace data, network and sizes, and nothing that makes the recipe what it is."""
    words = {
        "resolution": 64,
        "train_batch_size": 4,
        "gradient_accumulation_steps": min(2, config.gradient_accumulation_steps),
        "coupling_window": min(2, config.coupling_window),
        "max_train_steps": 1,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "output_dir": output,
    }
    data = small["classes" if config.dataset_name == "ILSVRC/imagenet-1k" else "captions"]
    words |= {"dataset_name": data} if config.dataset_name else {"train_data_dir": data}
    if isinstance(config, TextToImageConfig):
        words |= {"pretrained_model_name_or_path": small["model"], "report_to": "none", "validation_prompts": ["a cat", "a rocket"]}
        words |= {"model_preset": "dit-tiny"} if config.model_preset else {}
        if config.pretrained_vae_model_name_or_path:
            words |= {"pretrained_model_name_or_path": small["xl"], "pretrained_vae_model_name_or_path": small["xl"]}
        words |= {"pretrained_model_name_or_path": small["sd3"]} if config.weighting_scheme else {}
        return flags({**words, "validation_inference_steps": 2})
    words |= {"vae_model_name_or_path": small["model"], "model_preset": "unet-tiny", "logger": "none"}
    return flags({**words, "ddpm_num_inference_steps": 2, "eval_batch_size": 2})


@pytest.mark.parametrize(
    "path", [*RECIPES[:2], *(pytest.param(path, marks=pytest.mark.slow) for path in [*RECIPES[2:], SPEED, *XL, SD3])], **IDS
)
def test_a_recipe_trains_when_shrunk(script, small, tmp_path, path):
    _, program, words = launch_line(path)
    config = recipe(path.stem)[0]
    replaced = shrunk(config, small, tmp_path / "run")
    result = script([*words, *replaced], program=program, cwd=ROOT)
    assert result.code == 0, result.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    window = 2 if path.stem.endswith("1gpu") else 1
    if config.noise_coupling == "independent":
        assert line["paired_images"] == 1
    else:
        assert line["pair_distance"] < line["pair_distance_drawn"] and line["paired_images"] == 4 * window
    left = "pytorch_lora_weights.safetensors" if getattr(config, "use_lora", False) else "model_index.json"
    assert (tmp_path / "run" / left).is_file() and len(list((tmp_path / "run/samples").iterdir())) == 1


# accelerate


@pytest.mark.parametrize("path", ACCELERATE, **IDS)
def test_accelerate_loads_its_files(path):
    """It refuses keys that it does not know, and what the header says of tests is there for every file."""
    config = load_config_from_file(str(path))
    kind = {"1gpu": "NO", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert config.distributed_type.value == kind and config.mixed_precision == "no"
    number = {"1gpu": 1, "8xa800": 8, "multi_node": 16}.get(path.stem, 4)
    assert config.num_processes == number and config.num_machines == 1 + (path.stem == "multi_node")
    assert re.search(r"^# (Tested: |NOT TESTED)", path.read_text(), flags=re.MULTILINE)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.mark.slow
def test_two_processes_by_a_file_for_four_gpus(small, tmp_path):
    """The one distributed setup that needs no GPU: the file's DDP, on the CPU, with its number of processes lowered."""
    path = ROOT / "configs/tasks/sd_finetune_imagenet.yaml"
    launcher, program, words = launch_line(path)
    launch = accelerate_launch(*launcher, "--num_processes", 2, "--main_process_port", free_port(), program=program)
    result = run_command([*launch, *words, *shrunk(recipe(path.stem)[0], small, tmp_path / "run")], timeout=300)
    assert result.code == 0, result.stderr
    assert "4 images x 2 processes x 1 micro-batches = 8 a step" in result.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert line["paired_images"] == 8 and line["pair_distance"] < line["pair_distance_drawn"]


# The demonstration


def test_the_demonstration_fine_tunes_what_it_has_trained():
    """`make demo-sd` is too long for a test; that its parts fit together is not."""
    scratch, tuned = (
        parse(script, ["--config", path]) for script, path in zip(("train_text_to_image.py", "finetune_sd.py"), DEMO, strict=True)
    )
    makefile = (ROOT / "Makefile").read_text()
    (folder,) = re.findall(r"^SD_DEMO_DIR := (.+)$", makefile, flags=re.MULTILINE)
    (tiny,) = re.findall(r"^TINY_SD_DIR := (.+)$", makefile, flags=re.MULTILINE)
    assert scratch.pretrained_model_name_or_path == f"{tiny}/model" and scratch.train_data_dir == f"{tiny}/captions"
    assert tuned.pretrained_model_name_or_path == f"{folder}/scratch/baseline-seed0" and tuned.train_data_dir == f"{tiny}/classes"
    assert scratch.latent_cache_dir == f"{folder}/captions" and tuned.latent_cache_dir == f"{folder}/classes"
    for config in (scratch, tuned):
        assert config.cache_latents and config.eval_steps and config.max_train_steps % config.eval_steps == 0


# docs/STABLE_DIFFUSION.md


def test_the_page_on_stable_diffusion_names_what_exists():
    page = (ROOT / "docs/STABLE_DIFFUSION.md").read_text()
    files = set(re.findall(r"(?:configs|scripts|docs|immiscible|tests)/[\w/.-]+\.\w+", page))
    assert len(files) > 10 and [name for name in sorted(files) if not (ROOT / name).exists()] == []
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", page))
    assert len(tests) > 10 and [name for name in sorted(tests) if f"def {name}(" not in sources] == []
    flags = [item for config in CONFIGS.values() for item in fields(config)]
    known = {"config", "help", *(item.name for item in flags), *(item.metadata.get("alias") for item in flags)}
    scripts = "".join(path.read_text() for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("immiscible/commands/*.py")])
    named = {flag.removeprefix("--") for flag in re.findall(r"(?<![\w-])--[a-z_0-9]+", page)}
    assert len(named) > 40 and [name for name in sorted(named - known) if f'"--{name}"' not in scripts] == []


def test_the_commands_of_the_page_on_stable_diffusion_parse():
    page = re.sub(r"\\\n *", "", (ROOT / "docs/STABLE_DIFFUSION.md").read_text())
    commands = re.findall(r"^accelerate launch (\w+\.py) (.+)$", page, flags=re.MULTILINE)
    assert [script for script, _ in commands] == ["finetune_sd.py"] * 3
    for script, words in commands:
        assert parse(script, shlex.split(words)).max_train_steps


# docs/DATA.md


def test_the_page_on_data_names_every_recipe_with_foreign_data():
    data = "sd|mscoco|cifar10|celeba|tiny_imagenet|imagenet|metfaces|ffhq|digits|photo|emoji"
    named = set(re.findall(rf"`((?:{data})\w*\*?)`", (ROOT / "docs/DATA.md").read_text()))
    no_data = {ROOT / f"configs/tasks/{part}.yaml" for part in ("classes", "consistency", "dit_tiny", "edm")}
    for path in {*(ROOT / "configs/tasks").glob("*.yaml")} - no_data:
        assert any(path.stem == name or (name.endswith("*") and path.stem.startswith(name[:-1])) for name in named), path.stem


def test_captions_of_coco_become_a_folder_that_loads(tmp_path, monkeypatch):
    """The lines that docs/DATA.md tells to run, on annotations of COCO's layout."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/coco", "data/annotations"):
        Path(folder).mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(f"data/coco/{number:012}.jpg")
    images = [{"id": 7 + number, "file_name": f"{number:012}.jpg", "license": 1} for number in range(4)]  # the last is not there
    annotations = [{"image_id": 7 + number, "id": 5 * number + i, "caption": f"a  {i}\n{number} "} for number in range(4) for i in range(5)]
    Path("data/annotations/captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/DATA.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "docs/DATA.md", "exec"), {})
    source = load_images(train_data_dir="data/coco", caption_column="text", cache_dir=str(tmp_path / "cache"))
    assert len(source) == 3
    found = sorted(source.captions(index) for index in range(3))
    assert found == [[f"a {i} {number}" for i in range(5)] for number in range(3)]
