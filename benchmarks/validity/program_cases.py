"""Compiled programs as cases: each method against the nodes that its own intervention can see.

*AUROC*, *average precision* and *hit@1* of these nodes, where the truth is what a plain forward
pass in numpy says; *forbidden effect*: the largest share of nodes that were compiled to write
nothing.
"""

from collections.abc import Iterator

from benchmarks.validity.methods import IN_PROGRAMS
from benchmarks.validity.plant_cases import component_rows
from benchmarks.validity.programs import load_program, seen
from benchmarks.validity.rows import Row
from benchmarks.validity.scores import check_truth


def program(name: str) -> Iterator[Row]:
    compiled = load_program(name)
    dead = set(compiled.nodes) - compiled.live
    for method, (rank, intervention) in IN_PROGRAMS.items():
        found, truth = rank(compiled.bridge, compiled.prompts), seen(name, intervention)
        check_truth(compiled.nodes, truth, case=name)
        kind = f"{len(truth)} of {len(compiled.nodes)} by {intervention}"
        yield from component_rows(method, found, truth, dead, kind=kind)
