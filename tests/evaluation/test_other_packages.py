"""Metrics beside other people's code, where it is installed (docs/SCORES.md); of packages that need torchvision the function alone."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy
import pytest
import scipy.linalg
import torch

from immiscible.evaluation.kernels import cmmd, kid
from immiscible.evaluation.metrics import frechet_distance
from immiscible.evaluation.neighborhoods import neighborhoods
from immiscible.evaluation.within_classes import per_class_frechet_distance


def function_of(module, name):
    """A function of numpy and scipy, read from a module that is not imported."""
    package, file = module.split(".")
    pytest.importorskip(package)
    path = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / f"{file}.py"
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == name]
    names = {"np": numpy, "linalg": scipy.linalg}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    return names[name]


def drawn(count, seed, features=64, rank=64, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / rank**0.5
    return torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing + shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scipy, which will take sqrtm's disp away
@pytest.mark.parametrize("module, name", [("pytorch_fid.fid_score", "calculate_frechet_distance"), ("cleanfid.fid", "frechet_distance")])
@pytest.mark.parametrize(
    "a, b, within",
    [
        (drawn(900, 1), drawn(800, 2, shift=0.1), 1e-9),
        (drawn(40, 1), drawn(30, 2, shift=0.1), 1e-6),  # fewer images than features: roots of rounded zeros
        (drawn(500, 1, rank=7), drawn(500, 2, rank=7, shift=0.1), 1e-5),
    ],
)
def test_frechet_distance_is_that_of_other_packages(module, name, a, b, within):
    others = function_of(module, name)(
        *(of(x.numpy()) for x in (a, b) for of in (lambda x: x.mean(0), lambda x: numpy.cov(x, rowvar=False)))
    )
    one_class = [torch.zeros(len(x), dtype=torch.int64) for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(others, rel=within)
    assert per_class_frechet_distance(a, one_class[0], b, one_class[1])[0] == pytest.approx(others, rel=within)


def test_kid_is_clean_fids_but_for_the_subsets():
    others = function_of("cleanfid.fid", "kernel_distance")
    a, b = drawn(400, 1), drawn(400, 2, shift=0.1)
    assert kid(a, b, subsets=1) == pytest.approx(others(a.numpy(), b.numpy(), num_subsets=1), rel=1e-9)  # of all images


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # scikit-learn's and joblib's
def test_balls_are_those_of_prdc_but_for_ties():
    others = pytest.importorskip("prdc").compute_prdc
    a, b = drawn(300, 1), drawn(250, 2, shift=0.05)
    for k, names in ((3, ("precision", "recall")), (5, ("density", "coverage"))):
        theirs = others(b.numpy(), a.numpy(), k)
        for name in names:
            assert float(getattr(neighborhoods(a, b), name).mean()) == pytest.approx(theirs[name], rel=1e-12)
    copies = drawn(4, 1).repeat(10, 1)
    assert float(neighborhoods(copies, copies).precision.mean()) == 1
    assert others(copies.numpy(), copies.numpy(), 3)["precision"] == 0  # what is as far as the third neighbour is outside there


def test_cmmd_is_that_of_clip_mmd():
    calculation = pytest.importorskip("clip_mmd.calculation")
    a, b = (torch.nn.functional.normalize(drawn(300, seed, shift=0.3)) for seed in (1, 2))
    assert cmmd(a, b) == pytest.approx(calculation.mmd_efficient(a, b, precision=torch.float64), rel=1e-8)
    assert cmmd(a, b) == pytest.approx(calculation.mmd_efficient(a, b), abs=1e-3)  # in float32, as it and the paper's code do
