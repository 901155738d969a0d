"""What ``import immiscible`` gives, and what it needs."""

import ast
import subprocess
import sys

from launch import ENVIRONMENT, ROOT

import immiscible

CORE = {"torch", "numpy", "scipy", "numba", "llvmlite"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_typed():
    """The names that type checkers see are those that run time gives."""
    tree = ast.parse((ROOT / "immiscible" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == immiscible._ROOMS and set(immiscible.__all__) == set(seen)
    assert all(getattr(immiscible, name) is not None for name in immiscible.__all__)
    assert set(immiscible.__all__) <= set(dir(immiscible))


def test_an_unknown_name_lists_the_known_ones():
    try:
        immiscible.Assigment  # noqa: B018
    except AttributeError as error:
        assert "Assigment" in str(error) and "AssignmentCoupling" in str(error)
    else:
        raise AssertionError("no error")


def test_importing_it_loads_nothing_and_all_of_it_no_more_than_the_core():
    code = (
        "import sys; before = set(sys.modules); import immiscible; print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert "torch" not in run(code).split()
    everything = (
        f"import {', '.join(sorted(CORE))}, scipy.optimize, sys; before = set(sys.modules); import immiscible, immiscible.adapters; "
    )
    everything += "[getattr(immiscible, name) for name in immiscible.__all__]; "
    everything += "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    assert set(run(everything).split()) <= CORE | {"immiscible"}
