"""See the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from launch import Scripts  # noqa: E402

from fuzz.cases import KINDS, fuzz  # noqa: E402  (the path first)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=1500, help="how many, shared by the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="these kinds alone, in equal parts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        (Path(name) / "runs").mkdir()
        scripts = Scripts(Path(name) / "runs")
        shares = {kind: KINDS[kind] if set(arguments.only) == set(KINDS) else 1 for kind in arguments.only}
        try:
            tried, problems = fuzz(shares, arguments.cases, arguments.seed, scripts, Path(name), show=True)
        finally:
            scripts.close()
    print(f"{sum(tried.values())} cases ({', '.join(f'{kind} {count}' for kind, count in tried.items())}), seed {arguments.seed}:")
    print(f"{len(problems)} failed", *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
