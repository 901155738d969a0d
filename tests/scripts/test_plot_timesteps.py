"""What ``scripts/plot_timesteps.py`` prints, draws and refuses."""

from __future__ import annotations

import runpy
import sys

import numpy
import pytest
from launch import ROOT
from PIL import Image

from immiscible.errors import UserError, run_script

main = runpy.run_path(f"{ROOT}/scripts/plot_timesteps.py")["main"]


def drawn(picture) -> bool:
    with Image.open(picture) as image:
        return len(numpy.unique(numpy.asarray(image.convert("L")))) > 20


def test_laws_and_weights(tmp_path, capsys):
    picture = tmp_path / "deeper" / "laws.png"
    main(["--ddpm_num_steps", "800", "--timestep_sampling", "uniform", "asymmetric", "--asymmetric_tau", "600", "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "uniform: 0.0% of draws moved, 25.00% of draws beyond tau 600",
        "asymmetric: 18.8% of draws moved, 6.25% of draws beyond tau 600",
        f"picture in {picture}",
    ]
    assert drawn(picture)
    with pytest.raises(UserError, match="--asymmetric_k"):
        main(["--timestep_sampling", "asymmetric", "--asymmetric_k", "0", "--output", str(picture)])


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["ddpm"],
            [
                "ddpm, linear, T = 1000",
                "                t        mean / x0        |mean| <=         variance      lower bound    d variance/dt chain's variance",
                "      closed form     220.143        477.048        676.304        829.199",
                "     in the steps         220            476            674            826",
                "of the time at r = 10: acceleration 21.9%, deceleration 25.7%, convergence 52.4%",
            ],
        ),
        (
            ["ddpm", "--image_scale", "0.5"],
            ["ddpm, linear, T = 1000, image scale 0.5", "     in the steps          93            340            566            739"],
        ),
        (
            ["ddpm", "--ddpm_beta_schedule", "scaled_linear", "--ddpm_beta_start", "0.00085", "--ddpm_beta_end", "0.012"],
            ["     in the steps         314            675            934           none"],
        ),
        (["vp"], ["vp, beta from 0.1 to 20, 1000 steps", "      closed form    0.219143       0.476058        0.67531       0.828205"]),
        (["ve", "--sigma_data", "0.5"], ["   t by equal SNR        none           2.25          24.75         249.75"]),
        (["edm", "--sigma_data", "0.5"], ["   t by equal SNR        none            1.5        4.97494        15.8035"]),
        (["flow"], ["flow, (1 - t) x0 + t n, 1000 steps", "   t by equal SNR        none           0.75       0.908675       0.969332"]),
    ],
)
def test_increments(words, said, tmp_path, capsys):
    picture = tmp_path / "increments.png"
    main(["--increments", *words, "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert set(said) <= set(lines), lines
    assert any(line.startswith("no areas in the paper: its variance grows") for line in lines) == (words[0] in ("ve", "edm", "flow"))
    assert lines[-1] == f"picture in {picture}" and drawn(picture)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--increments", "ddmp"], "argument --increments: invalid choice: 'ddmp'"),
        (["--increments", "edm", "--sigma_data", "0"], "--sigma_data 0 is out of range"),
        (["--increments", "vp", "--sigma_data", "0.5"], "--sigma_data is for --increments ve or edm or flow, not for vp"),
        (["--sigma_data", "0.5"], "--sigma_data is for --increments ve, edm or flow: laws"),
        (["--increments", "--asymmetric_r", "10"], "--asymmetric_r is for laws and weightings"),
        (["--increments", "--noise_process", "flow"], "--noise_process is for laws and weightings"),
        (["--noise_process", "flow", "--ddpm_beta_schedule", "quadratic"], "--ddpm_beta_schedule is of --noise_process ddpm"),
        (["--increments", "--ddpm_num_steps", "2"], "--ddpm_num_steps 2 is too small for --increments: it must be at least 3"),
        (["--increments", "vp", "--ddpm_beta_end", "2"], "--ddpm_beta_end 2 are out of range"),
        (["--increments", "vp", "--ddpm_beta_schedule", "scaled_linear"], "--ddpm_beta_schedule is for --increments ddpm, not for vp"),
    ],
)
def test_wrong_values_are_one_line_and_code_2(words, told, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "none.png"
    monkeypatch.setattr(sys, "argv", ["plot_timesteps.py", *words, "--output", str(picture)])
    try:
        code = run_script(main)
    except SystemExit as end:  # argparse's own
        code = end.code
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 2 and told in line and line.startswith("plot_timesteps.py: error: "), line
    assert not picture.exists()
