"""``--help`` and usage errors of the scripts that sample and cache come before anything is loaded that they do not need."""

from __future__ import annotations

import sys

import pytest
from launch import ROOT, run_command

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "safetensors"}
LOADED = """
import runpy, sys

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scripts"]
script = sys.argv[1] + "/" + sys.argv[2]
sys.argv = [script, *sys.argv[3:]]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print("code", end.code)
print("loaded", *sys.modules)
"""


@pytest.mark.parametrize("script", ["scripts/sample.py", "scripts/evaluate.py", "scripts/precompute_latents.py"])
@pytest.mark.parametrize(("words", "code", "said"), [(["--help"], 0, "--resolution"), (["--resolutoin", "3"], 2, "error: ")])
def test_nothing_heavy_is_loaded_before_the_flags_are_read(script, words, code, said):
    result = run_command([sys.executable, "-c", LOADED, ROOT, script, *words])
    assert f"code {code}\n" in result.stdout and said in result.stdout + result.stderr, result
    (loaded,) = (line for line in result.stdout.splitlines() if line.startswith("loaded "))
    assert not HEAVY & set(loaded.split())
