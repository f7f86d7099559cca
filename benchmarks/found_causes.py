"""Do contexts that were found lead to the components that a hand-written scenario names?

For each fine-tune: the texts that it writes, the contexts in which it differs most from its base, a
scenario of those (as ``94_what_changed`` makes it), and cross-model patching from fine-tune into
base where the answers part, on the found scenario and on the hand-written ones. Compared are the
components' mean changes by size: *rank* (Spearman over all components) and *shared* (of the ten
largest). *other*: the same between the hand-written scenarios and what was found in the fine-tune
named there, which was taught something else; that much is alike whatever was taught.

    python -m benchmarks.found_causes [--only TEXT] [--json FILE]
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.discovery.cases import LENGTH, REAL_LENGTH, REAL_TEXTS, TEXTS
from benchmarks.patching import machine
from benchmarks.resumable import Row, check_complete, run
from interp_kit.analyses.activation_patching import cross_model_patching
from interp_kit.analyses.divergence import top_contexts
from interp_kit.analyses.found_contexts import found_scenario
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.loading import Models, load_models
from interp_kit.prompts import Prompt, encode_scenario
from interp_kit.texts import written_texts
from interp_kit.token_differences import reader, token_differences

GAMES = ["CC_temptation", "CD_punished", "DC_exploited"]
# A fine-tune, its hand-written scenarios, and a fine-tune of the same base that learned otherwise.
CASES = {
    "cubic-gravity": (["cubic_gravity"], "ipd-strategic"),
    "ipd-strategic": (GAMES, "cubic-gravity"),
    "ipd-deontological": (GAMES, "cubic-gravity"),
    "ipd-utilitarian": (GAMES, "cubic-gravity"),
    "smollm2-cubic": (["gravity_english"], "smollm2-gold"),
    "smollm2-strategic": (GAMES, "smollm2-hybrid"),
}
FIRST = 10  # largest components that are compared
PROMPTS = 8  # of each scenario, at most


def measure(name: str) -> Iterator[Row]:
    """Found and hand-written, compared; and what another fine-tune's contexts name."""
    scenarios, other = CASES[name]
    base = find_model(name).origin
    models = load_models([base, name, other], device="cpu")
    written = [
        prompt
        for scenario in scenarios
        for prompt in encode_scenario(models.switch(name), load_scenario(scenario))[:PROMPTS]
    ]
    by_hand = _sizes(models, name, base, written)
    for which, of in (("found", name), ("other", other)):
        prompts = _found(models, of, base)
        yield {"of": of, "which": which, "score": "prompts", "value": float(len(prompts))}
        if prompts:
            both = pd.DataFrame({"found": _sizes(models, of, base, prompts), "hand": by_hand})
            both = both.fillna(0.0)  # below the first layer that a fine-tune changes
            rank = np.corrcoef(both.rank().to_numpy().T)[0, 1]
            first = [set(both.index[np.argsort(-both[c].to_numpy())[:FIRST]]) for c in both]
            shared = float(len(first[0] & first[1]))
            about = {"of": of, "which": which, "first": " ".join(sorted(first[0] & first[1]))}
            yield about | {"score": "rank", "value": float(rank)}
            yield about | {"score": f"shared of {FIRST}", "value": shared}
            chance = FIRST**2 / len(both)
            yield about | {"score": "shared by chance", "value": chance}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.found_causes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here, and go on")
    parser.add_argument("--only", default="", metavar="TEXT", help="fine-tunes with this name")
    given = parser.parse_args(arguments)
    cases = {name: partial(_rows, name) for name in CASES}
    table = pd.DataFrame(run(cases, given.only, given.json))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    wide = table.pivot_table(index=["case", "which", "of"], columns="score", values="value")
    print(wide.round(2).to_string())
    check_complete(cases, given.only, set(table.case))


# ------------------------------------------------------------------------------------- internals
def _rows(name: str) -> list[Row]:
    return [*measure(name)]


def _found(models: Models, name: str, base: str) -> list[Prompt]:
    """Prompts of the scenario that the fine-tune's own texts give; none, if they give none."""
    n, length = (REAL_TEXTS, REAL_LENGTH) if "smollm2" in base else (TEXTS, LENGTH)
    own = written_texts(models.switch(name), n=n, length=length, seed=1)
    contexts = top_contexts(token_differences(models, name, own), n=4 * PROMPTS)
    reads = [reader(models, "", of=name), lambda: models.switch(name)]
    scenario = found_scenario(reads, own, contexts, name="found", most=PROMPTS)
    return encode_scenario(models.switch(name), scenario) if scenario else []


def _sizes(models: Models, name: str, base: str, prompts: Sequence[Prompt]) -> pd.Series:
    """By component: how far it alone moves the base's decision, on the mean."""
    table = cross_model_patching(models, name, base, prompts, positions="decision")
    return table.groupby("component").change.mean().abs()


if __name__ == "__main__":
    main()
