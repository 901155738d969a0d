"""``scripts/evaluate.py``: samples drawn on the way or there already become numbers, the same however the work is shared and cut short."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from kills import finish
from launch import flags, tiny
from measured import DIGITS
from PIL import Image

from immiscible.evaluation.features import PixelFeatures
from immiscible.evaluation.metrics import frechet_distance

PROGRAM = "scripts/evaluate.py"


class Slow(torch.nn.Module):
    """Means of a few rows, after a while."""

    def forward(self, images):
        wasted = torch.ones(200, 200)
        for _ in range(1):
            wasted = (wasted @ wasted).clamp(max=1.0)
        return images.mean([1, 3])[:, :6] + 0 * wasted[0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Half of the digits."""
    folder = tmp_path_factory.mktemp("samples") / "digits"
    folder.mkdir()
    for number, image in enumerate(DIGITS[::2]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def words(samples: Path, output: Path, **changes) -> list[str]:
    return flags({"samples": samples, "reference": "digits", "features": "pixels", "output": output, **changes})


def scored(script, cache, samples: Path, output: Path, **changes) -> dict:
    result = script(words(samples, output, **changes), program=PROGRAM, env=cache)
    assert result.code == 0, result.stderr
    return json.loads(output.read_text()) | {"stdout": result.stdout, "stderr": result.stderr}


def test_a_run_is_sampled_once_and_scored_by_any_metrics(script, cache, tmp_path):
    assert script(tiny(tmp_path / "run", class_conditional=True)).code == 0
    options = {"num_images": 24, "num_inference_steps": 2, "work_dir": tmp_path / "work", "seed": 3, "batch_size": 8}
    metrics = ["frechet_distance", "precision", "per_class_frechet_distance"]
    found = scored(script, cache, tmp_path / "run", tmp_path / "a.json", metrics=metrics, **options)
    assert list(found["scores"]) == metrics and "interval" in found["scores"]["precision"]
    assert "24 sampled" in found["stdout"] and "| frechet_distance (FD-pixels-8x8) | " in found["stdout"]
    assert all(bar in found["stderr"] for bar in ("sampling", "features of the samples", "features of the reference"))
    assert found["sampling"]["seed"] == 3 and found["sampling"]["labels"] == "class numbers" and found["sampling"]["networks"]
    assert found["features"]["distance"] == "FD-pixels-8x8" and found["reference"]["images"] == 1797 and found["protocol"] == "default"
    assert set(found["versions"]) == {"python", "torch", "diffusers", "immiscible"}
    assert "frechet_distance: 24 images are too few for a covariance of 64 features, which needs at least 65" in found["warnings"][0]
    again = scored(script, cache, tmp_path / "run", tmp_path / "b.json", metrics=["recall", "frechet_distance"], **options)
    assert "0 sampled" in again["stdout"] and again["scores"]["frechet_distance"] == found["scores"]["frechet_distance"]
    there = scored(script, cache, tmp_path / "work" / "samples", tmp_path / "c.json", metrics=metrics)
    assert there["scores"] == found["scores"] and there["sampling"] == again["sampling"]


def test_one_and_two_processes_find_the_same_numbers(script, cache, folder, tmp_path):
    options = {"metrics": ["frechet_distance", "coverage"], "held_out": folder}
    one = scored(script, cache, folder, tmp_path / "one.json", **options)
    results = finish(script.start_ranks(words(folder, tmp_path / "two.json", **options), program=PROGRAM))
    two = json.loads((tmp_path / "two.json").read_text())
    assert {**two, "command": ""} == {**{name: one[name] for name in two}, "command": ""}
    assert "| coverage |" in results[0].stdout and not results[1].stdout
    features = PixelFeatures(1, 8)
    assert one["samples"]["images"] == 899  # of parts of 256: the last, smaller one is counted
    wanted = frechet_distance(features(DIGITS[::2]), features(DIGITS))
    assert one["scores"]["frechet_distance"]["value"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(script, cache, folder, tmp_path):
    network = tmp_path / "slow.pt"
    torch.jit.script(Slow()).save(str(network))
    options = {"features": network, "metrics": ["frechet_distance", "recall"]}
    whole = scored(script, cache, folder, tmp_path / "whole.json", **options)
    run = script.start(words(folder, tmp_path / "cut.json", **options), program=PROGRAM, env=cache)
    kept = tmp_path / "cut.json.work" / "features"
    run.wait_until(lambda: any(kept.glob("[!.]*.safetensors")))
    run.kill_all()
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("[!.]*.safetensors")}
    assert 0 < len(before) < 4 + 8 and not (tmp_path / "cut.json").exists()
    again = scored(script, cache, folder, tmp_path / "cut.json", **options)
    assert again["scores"] == whole["scores"]
    assert {name: (kept / name).stat().st_mtime_ns for name in before} == before


def test_statistics_that_were_written_serve_as_a_reference_of_their_own_kind_alone(script, cache, folder, tmp_path):
    one = scored(script, cache, folder, tmp_path / "one.json", write_reference=tmp_path / "own.npz")
    two = scored(script, cache, folder, tmp_path / "two.json", reference=tmp_path / "own.npz")
    assert two["scores"] == one["scores"] and two["reference"]["images"] == 1797 and len(two["reference"]["sha256"]) == 64
    network = tmp_path / "network.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64))).save(str(network))
    options = {"reference": tmp_path / "own.npz", "features": network}
    result = script(words(folder, tmp_path / "three.json", **options), program=PROGRAM, env=cache)
    assert result.code == 2 and "own.npz does not fit: its network is FD-pixels-8x8, not FD-network; its weights_sha256 is" in result.error


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"samples": "nowhere"}, 2, "--samples nowhere: no such file or folder"),
        ({"metrics": ["fdi"]}, 2, "--metrics: metric 'fdi' is unknown; known: frechet_distance, "),
        ({"metrics": ["fid"]}, 2, "--metrics fid is of --features inception alone"),
        ({"reference": None}, 2, "--metrics frechet_distance needs --reference"),
        ({"protocol": "cifar10-legacy", "features": None}, 2, "cifar10-legacy is of images of 32 pixels a side, not 8, of 50000 samples"),
        ({"protocol": "adm"}, 2, "--protocol adm is of images of 64"),
        ({"features": "inception"}, 1, "pt_inception-2015-12-05-6726825d.pth"),
        ({"output": "nowhere/o.json"}, 2, "--output nowhere/o.json: there is no folder nowhere; make it first"),
        ({"num_images": 5}, 2, "--num_images is of a model to sample"),
        ({"write_reference": "a.npz", "reference": None, "metrics": ["uniformity"]}, 2, "--write_reference needs --reference"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_measured(script, cache, folder, tmp_path, changes, code, says):
    result = script(words(**{"samples": folder, "output": tmp_path / "o.json", **changes}), program=PROGRAM, env=cache)
    assert result.code == code and says in result.error and not any(tmp_path.iterdir())


def test_numbers_that_are_there_are_not_overwritten_and_samples_of_a_model_are_asked_for(script, cache, folder, tmp_path):
    (tmp_path / "o.json").write_text("{}")
    result = script(words(folder, tmp_path / "o.json"), program=PROGRAM, env=cache)
    assert result.code == 2 and result.error.endswith("o.json is there already: remove it, or give another name")
    assert script(tiny(tmp_path / "run")).code == 0
    result = script(words(tmp_path / "run", tmp_path / "p.json"), program=PROGRAM, env=cache)
    assert result.code == 2 and result.error.startswith("--num_images is needed to sample --samples ")
    shutil.rmtree(tmp_path / "run" / "unet")
    sampling = {"num_images": 4, "num_inference_steps": 2}
    result = script(words(tmp_path / "run", tmp_path / "p.json", **sampling), program=PROGRAM, env=cache)
    assert result.code == 1 and result.error.startswith("--samples ")
