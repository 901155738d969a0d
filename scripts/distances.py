#!/usr/bin/env python
"""Tables of a grid's last distances or other metrics, arm by arm, each tested against one arm over the seeds.

python scripts/distances.py docs/results/digits_classes
python scripts/distances.py docs/results/digits_classes --baseline epoch --measure frechet_distance_held_out
python scripts/distances.py docs/results/digits_classes docs/results/digits_classes_fresh     # seeds put together
python scripts/distances.py runs/mine --measure kid                                           # of runs with --eval_metrics kid

A folder is --output_dir of scripts/compare.py, or what scripts/results.sh keeps of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from immiscible.errors import UserError, run_script
from immiscible.flags import Names, Parser, plain_text, text_path


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folders", type=text_path, nargs="+", metavar="DIR", help="of grids; runs of one arm and seed may be in one alone")
    parser.add_argument(
        "--baseline", type=plain_text, metavar="NAME", help="the arm to test against (default: baseline)", default="baseline"
    )
    parser.add_argument(
        "--measure",
        choices=Names("immiscible.reports.paired", "MEASURES"),
        default="frechet_distance",
        help="what is told (default frechet_distance)",
    )
    arguments = parser.parse_args(argv)
    print(tables(arguments.folders, arguments.baseline, arguments.measure))


def tables(folders: Sequence[Path], baseline: str, measure: str) -> str:
    """The grids put together, as Markdown.

    Raises:
        UserError: a run is in two of them, or one cannot be read.
    """
    from immiscible.reports.paired import MEASURES, Arms, paired_tables, read_grid

    arms: Arms = {}
    for folder in folders:
        for name, seeds in read_grid(folder, measure).items():
            twice = arms.get(name, {}).keys() & seeds.keys()
            if twice:
                raise UserError(f"{name}-seed{min(twice)} is in {folder} and in another of the folders")
            arms.setdefault(name, {}).update(seeds)
    words = MEASURES[measure].words
    return f"{words[:1].upper()}{words[1:]}:\n\n{paired_tables(arms, baseline, measure)}"


if __name__ == "__main__":
    sys.exit(run_script(main))
