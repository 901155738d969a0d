"""Protocols name what exists and refuse what does not fit, in a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from immiscible.data.arguments import ImageArguments
from immiscible.errors import UserError
from immiscible.evaluation.features import FEATURES
from immiscible.evaluation.metrics import METRICS
from immiscible.evaluation.protocols import PROTOCOLS, check_protocol, find_protocol
from immiscible.evaluation.resize import RESIZES


def test_every_protocol_names_a_network_and_a_resize_that_exist():
    assert list(PROTOCOLS) == ["default", "cifar10-legacy", "imagenet256-pytorchfid", "adm", "dinov2"]
    crops = next(field for field in dataclasses.fields(ImageArguments) if field.name == "crop").metadata["choices"]
    for name, protocol in PROTOCOLS.items():
        if name != "default":
            assert protocol.features in FEATURES and protocol.resize in RESIZES and protocol.samples == 50_000
        assert protocol.crop in crops and protocol.metrics and set(protocol.metrics) <= METRICS.keys()


def test_the_page_lists_them_as_they_are():
    page = (Path(__file__).resolve().parents[2] / "docs" / "SCORES.md").read_text()
    for name, protocol in PROTOCOLS.items():
        (line,) = (line for line in page.split("## Protocols")[1].splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{what}`" in line for what in (protocol.features, protocol.resize, *protocol.metrics) if what)
        assert all(str(side) in line for side in protocol.resolutions) and protocol.labels in line
        assert protocol.published in page


def test_what_fits_passes():
    check_protocol("default", resolution=8, samples=3, labels="random")
    check_protocol("cifar10-legacy", resolution=32, samples=50_000)
    check_protocol("adm", resolution=512, samples=50_000, labels="random")
    check_protocol("dinov2", resolution=40, samples=50_000)


@pytest.mark.parametrize(
    ("name", "facts", "says"),
    [
        ("cifar10-legacy", {"resolution": 64}, "cifar10-legacy is of images of 32 pixels a side, not 64; "),
        ("adm", {"resolution": 32}, "adm is of images of 64 or 128 or 256 or 512 pixels a side, not 32; "),
        ("dinov2", {"samples": 10_000}, "dinov2 is of 50000 samples, not 10000; "),
        ("imagenet256-pytorchfid", {"labels": "random"}, "is of equal labels, not random; "),
        ("adm", {"resolution": 32, "samples": 5}, "not 32, of 50000 samples, not 5; "),
    ],
)
def test_what_does_not_fit_is_one_line(name, facts, says):
    with pytest.raises(UserError, match=says) as error:
        check_protocol(name, **{"resolution": 256 if "256" in name or name == "adm" else 32, "samples": 50_000, "labels": None} | facts)
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_lists_what_there_is():
    with pytest.raises(UserError, match="'fid' is unknown; known: default, cifar10-legacy"):
        find_protocol("fid")
