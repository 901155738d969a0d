"""scripts/distances.py as a user calls it."""

import json
import sys

from launch import run_command


def test_grids_are_put_together_and_a_run_counts_once(tmp_path):
    for folder, seeds in (("first", (0, 1)), ("fresh", (2, 3))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            for arm, value in (("baseline", 4.0 + seed), ("half", (4.0 + seed) / 2 + 0.01 * seed)):
                line = {"frechet_distance": {"5": 0.0}, "frechet_distance_held_out": {"5": value}}
                (tmp_path / folder / f"{arm}-seed{seed}.jsonl").write_text(json.dumps(line))
    words = ["scripts/distances.py", tmp_path / "first", tmp_path / "fresh", "--measure", "frechet_distance_held_out"]
    done = run_command([sys.executable, *words])
    assert done.code == 0 and "Distance from the images held out:" in done.stdout
    assert "| half | 2.76 (0.50x ▲) |" in done.stdout and "Medians over 4 seeds" in done.stdout
    twice = run_command([sys.executable, "scripts/distances.py", tmp_path / "first", tmp_path / "first"])
    assert twice.code == 2 and "baseline-seed0 is in" in twice.stderr and "Traceback" not in twice.stderr
