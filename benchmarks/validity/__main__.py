"""How often does a method name the right component, and how often one that does nothing?

**Compiled programs** (``programs``): the truth is what a plain forward pass in numpy says of each
intervention; *forbidden* are the nodes that were compiled to write nothing.

**Planted edits** (``plants``): a LoRA of rank one that moves the decision of the prompts by so many
nats, in one head, one MLP, eight heads together, or two that oppose each other. Every method ranks
all components of the fine-tune. *hit*: whether the first is an edited one. *AUROC* and *average
precision* of the edited ones. *forbidden*: the largest score, relative to the largest of all, of
components that compute exactly what they did: exact patching must give 0.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks.controls import GLAD
from benchmarks.patching import machine, one_thread
from benchmarks.validity.methods import COMPONENTS, IN_PROGRAMS
from benchmarks.validity.plants import Plant, drawn_plants, planted, several
from benchmarks.validity.programs import NAMES, load_program, seen
from benchmarks.validity.scores import (
    Rate,
    Scores,
    auroc,
    average_precision,
    check_truth,
    hit_at_1,
)
from interp_kit import encode_scenario, load_model, load_scenario
from interp_kit.loading import Models
from interp_kit.passes import shared_passes
from interp_kit.prompts import Prompt, encode

BASES = ["tiny-gemma2", "tiny-llama", "smollm2-plain"]
SCENARIOS = {"tiny-gemma2": "CC_temptation", "tiny-llama": "cubic_gravity"}
PROMPTS = 8
STRENGTHS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # nats, for a power curve
HEADS, MLPS = 32, 8  # of 0.5 nats; the curve is of every fourth
Row = dict[str, Any]


def prompts_of(base: str) -> list[Prompt]:
    """Prompts with one pair of answers, and counterfactuals that ask for the other."""
    bridge = load_model(base, device="cpu")
    if base in SCENARIOS:
        return encode_scenario(bridge, load_scenario(SCENARIOS[base]))[:PROMPTS]
    return [
        encode(
            bridge,
            text.format(one),
            positive=" glad",
            negative=" sad",
            id=str(i),
            counterfactual=text.format(two),
        )
        for i, (text, one, two) in enumerate(GLAD)
    ]


def plants_of(base: str) -> list[Plant]:
    bridge = load_model(base, device="cpu")
    many = drawn_plants(bridge, heads=HEADS, mlps=MLPS, nats=[0.5], seed=0)
    few = drawn_plants(bridge, heads=HEADS // 4, mlps=MLPS // 4, nats=STRENGTHS, seed=1)
    made = [*many, *few, *(p for seed in range(8) for p in several(bridge, nats=1.0, seed=seed))]
    return list({plant.name: plant for plant in made}.values())


def score(models: Models, base: str, name: str, plant: Plant, prompts: list[Prompt]) -> list[Row]:
    """One row a method."""
    rows = []
    with shared_passes():
        for method, rank in COMPONENTS.items():
            found = rank(models, base, name, prompts)
            check_truth(found, plant.origin, case=plant.name)
            forbidden = plant.forbidden(list(found))
            which = {"base": base, "kind": plant.kind, "nats": plant.nats}
            row = _row(found, plant.origin, forbidden, case=plant.name, method=method)
            rows.append(which | row)
    return rows


def _row(
    found: Scores, truth: set[str], forbidden: set[str], *, case: str, method: str
) -> dict[str, Any]:
    largest = max(found.values()) or 1.0
    return {
        "case": case,
        "method": method,
        "hit": hit_at_1(found, truth),
        "auroc": auroc(found, truth),
        "precision": average_precision(found, truth),
        "forbidden": max((found[node] / largest for node in forbidden), default=0.0),
    }


def score_program(name: str) -> list[Row]:
    """One row a method, against the truth of its own intervention."""
    program, rows = load_program(name), []
    for method, (rank, intervention) in IN_PROGRAMS.items():
        found, truth = rank(program.bridge, program.prompts), seen(name, intervention)
        check_truth(program.nodes, truth, case=name)
        dead = set(program.nodes) - program.live
        which = {"base": "program", "kind": f"{len(truth)} of {len(program.nodes)}", "nats": 0.0}
        rows.append(which | _row(found, truth, dead, case=name, method=method))
    return rows


def run(only: str, done: list[Row]) -> Iterator[Row]:
    """Rows that are not done yet, as they come."""
    known = {(row["base"], row["case"]) for row in done}
    for name in NAMES:
        if ("program", name) not in known and only in f"program/{name}":
            yield from score_program(name)
    for base in BASES:
        wanted = [
            plant
            for plant in plants_of(base)
            if (base, plant.name) not in known and only in f"{base}/{plant.name}"
        ]
        if not wanted:
            continue
        prompts = prompts_of(base)
        with tempfile.TemporaryDirectory() as folder:
            models, kept = planted(base, wanted, prompts, Path(folder))
            if len(kept) < len(wanted):
                left = len(wanted) - len(kept)
                print(f"{base}: {left} of {len(wanted)} plants reach their size at no strength")
            for name, plant in tqdm(kept.items(), desc=base, unit="plant"):
                yield from score(models, base, name, plant, prompts)


def summary(rows: list[Row]) -> pd.DataFrame:
    """By base, kind and size: of every method the hits with their interval, means of the rest."""
    tables = []
    keys = ["base", "kind", "nats", "method"]
    table = pd.DataFrame(rows)
    table["base"] = table.base.where(table.base != "program", table.case)
    for _, own in table.groupby(keys, sort=False):
        rate = Rate(hits=round(own.hit.sum()), n=len(own))
        low, high = rate.interval
        means = own[["auroc", "precision"]].mean()
        tables.append(
            own[keys].iloc[0].to_dict()
            | {"n": rate.n, "hit": own.hit.mean(), "low": low, "high": high}
            | means.to_dict()
            | {"forbidden": own.forbidden.max()}
        )
    return pd.DataFrame(tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every row here as it comes, and go on from what stands there",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    given = parser.parse_args()
    one_thread()
    done: list[Row] = []
    if given.json and given.json.is_file():
        done = [json.loads(line) for line in given.json.read_text().splitlines()]
    rows = list(done)
    for row in run(given.only, done):
        rows.append(row)
        if given.json:
            with given.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    print(summary(rows).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
