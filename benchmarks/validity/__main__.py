"""How often does a method name the right thing, and how often something where there is nothing?

Cases whose truth is known, and every method of the suite on them. Each module of
``benchmarks.validity`` says what its cases are; ``rows`` how scores are summed up.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.patching import machine
from benchmarks.resumable import check_complete, run
from benchmarks.validity.cases import CASES
from benchmarks.validity.rows import summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases: " + ", ".join(CASES),
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the rows of each case here as it ends, and go on from what stands there",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument(
        "--scorecard", type=Path, metavar="FILE", help="write the summary here, as CSV"
    )
    given = parser.parse_args(arguments)
    table = summary(run(CASES, given.only, given.json))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(table.to_string(index=False, float_format="{:.3f}".format))
    if given.scorecard:
        table.round(4).to_csv(given.scorecard, index=False)
    check_complete(CASES, given.only, set(table.case))


if __name__ == "__main__":
    main()
