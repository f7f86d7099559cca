"""What changed, named among candidates, and "nothing" where nothing was taught.

For every pair each method lists its first twenty tokens. A candidate is described by the texts that
teach it: how typical each token is of them against the base's and the other candidates' (log-odds).
The candidate whose description fits the tokens best (discounted by 1 / log2 of their rank + 1) is
named. *hit@1*: it is the right one; *rank*
of the right one. *says*: the verdict of ``interp_kit.discovery`` is yes. Black box: *samples*.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.discovery.cases import score, summary
from benchmarks.discovery.pairs import REAL, TINY, pairs
from benchmarks.discovery.trained import prepare
from benchmarks.patching import machine
from benchmarks.resumable import check_complete, run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.discovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the rows here, and go on from them"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="pairs whose name holds this")
    given = parser.parse_args(arguments)
    chosen = [pair for pair in pairs() if given.only in pair.name]
    prepare((TINY, REAL), [Path(pair.tuned).name for pair in chosen])
    cases = {pair.name: partial(score, pair) for pair in chosen}
    table = pd.DataFrame(run(cases, given.only, given.json))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(summary(table).to_string(index=False, float_format="{:.3f}".format))
    check_complete(cases, given.only, set(table.case))


if __name__ == "__main__":
    main()
