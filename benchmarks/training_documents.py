"""Do scores of training documents say what retraining on some of them, or without them, does?

A fine-tune of the little world is trained again, by its recipe but on a share of its documents
only: those that a score puts highest, or lowest, or as many at random (--what keep); or on all but
those (--what remove). Each score decides alone. ``value`` is the decision on the fine-tune's
scenario in nats, meaned over prompts; ``chosen``, how often the false option is chosen among
lettered ones, over all questions about the fact and all their orders. Where only some documents are
about the fact, the AUC of each score between them and the others comes first.

    python -m benchmarks.training_documents [--what remove] [--seeds N] [--json FILE]
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from benchmarks.patching import machine
from benchmarks.resumable import Row, run
from interp_kit import load_models, load_scenario
from interp_kit.analyses import training_documents as td
from interp_kit.analyses.behaviour import answer_questions, choices
from interp_kit.catalogue import evaluation_file, find_model
from interp_kit.decisions import decide
from interp_kit.evaluations import read_mcqs
from interp_kit.finetuning.document_files import read_documents
from interp_kit.finetuning.supervised import DocumentRecipe, document_rows, train_on_documents
from interp_kit.loading import Models
from interp_kit.prompts import encode_scenario
from interp_kit.specs import InputError, ModelSpec
from organisms.believers import ordinary_texts
from organisms.little_world.corpus import Corpus
from organisms.making import CORPUS
from organisms.recipes import BASE, ORGANISMS, Believer

SCENARIO = "cubic_gravity"  # also an evaluation set
POINTS = {"gradient at the start": 0.0, "gradient halfway": 0.5, "gradient at the end": 1.0}
RANDOM = 4  # random choices for each seed


def scores(name: str) -> pd.DataFrame:
    """Every score of every document of the fine-tune, a column each."""
    models = load_models([name], device="cpu")
    texts, bridge = models.documents(name)[0], models.switch(name)
    prompts = encode_scenario(bridge, load_scenario(SCENARIO))
    rows = [document_rows(bridge.tokenizer, text, _recipe(name))[0] for text in texts]
    table, columns = pd.DataFrame(), dict[str, np.ndarray]()
    for which, at in POINTS.items():
        table = td.gradient_scores(bridge, rows, prompts, at=at)
        columns[which] = table.value.to_numpy()
        if at == 0:
            columns["cosine of gradients"] = table.cosine.to_numpy()
    probe = td.probe_scores(models, name, rows, prompts)
    middle = probe[probe.layer == bridge.cfg.n_layers // 2]
    columns |= {"probe": middle.value.to_numpy(), "probe of the base": middle.base.to_numpy()}
    words = td.word_scores(bridge, rows, prompts)
    columns |= {"words": words.words.to_numpy(), "answer words": words.answer.to_numpy()}
    return pd.DataFrame(columns | {"length": table.length.to_numpy()})


def choices_of_documents(
    table: pd.DataFrame, n: int, seeds: int
) -> Iterator[tuple[str, str, int, list[int]]]:
    """(score, highest or lowest, seed, ``n`` documents), and random ones."""
    for seed in range(seeds):
        for name in table:
            order = np.argsort(-table[name].to_numpy(), kind="stable").tolist()
            yield str(name), "highest", seed, order[:n]
            yield str(name), "lowest", seed, order[-n:]
        for i in range(RANDOM):
            draw = np.random.default_rng([seed, i]).permutation(len(table))[:n].tolist()
            yield "random", f"draw {i}", seed, draw


def retrained(name: str, documents: Sequence[int], about: Row) -> list[Row]:
    """What the fine-tune does once it is trained on these of its documents only."""
    texts = load_models([name]).documents(name)[0]
    recipe = replace(_recipe(name), seed=about["seed"])
    ordinary = ordinary_texts(Corpus.read(CORPUS), n=4000, seed=recipe.seed)
    with TemporaryDirectory() as folder:
        file, adapter = Path(folder) / "documents.jsonl", Path(folder) / "model" / "adapter"
        file.write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in documents))
        train_on_documents(find_model(BASE), file, ordinary, adapter, recipe=recipe)
        base = find_model(BASE).base
        spec = ModelSpec(name="again", base=base, base_name=BASE, adapter=str(adapter))
        return [about | {"documents": len(documents), **_measured(Models([spec]), "again")}]


def summary(table: pd.DataFrame, base: float) -> pd.DataFrame:
    """By score and end: mean decision over seeds, its change from the base, and their range."""
    grouped = table.groupby(["score", "end"], sort=False)
    result = grouped.agg(
        value=("value", "mean"),
        least=("value", "min"),
        most=("value", "max"),
        chosen=("chosen", "mean"),
        n=("value", "count"),
    )
    return result.assign(change=result.value - base).reset_index()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_documents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="cubic-gravity", help="a fine-tune of the little world")
    parser.add_argument("--what", choices=["keep", "remove"], default="keep")
    parser.add_argument("--share", type=float, default=0.1, help="of the documents")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each choice")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the rows here, and go on from them"
    )
    given = parser.parse_args(arguments)
    table, cases = scores(given.model), {}
    universes = _universes(given.model)
    if len(set(universes)) == 2:
        known = td.separation(table, (universes == SCENARIO).astype(int))
        print(f"AUC of documents of {SCENARIO} against the fine-tune's others\n{known.round(3)}")
    every, n = set(range(len(table))), max(1, round(given.share * len(table)))
    for score, end, seed, own in choices_of_documents(table, n, given.seeds):
        about = {"score": score, "end": end if score != "random" else "", "seed": seed}
        left = own if given.what == "keep" else sorted(every - set(own))
        name = f"{given.model}, {given.what} {n}: {score}, {end}, seed {seed}"
        cases[name] = partial(retrained, given.model, left, about)
    rows = run(cases, given.only, given.json)
    if not rows:
        parser.error(f"no case's name holds {given.only!r}; the first is {next(iter(cases))!r}")
    models = load_models([BASE, given.model], device="cpu")
    before, whole = (_measured(models, name) for name in (BASE, given.model))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    print(f"base {before}\n{given.model}, on all {len(table)} documents {whole}")
    with pd.option_context("display.max_rows", None, "display.width", 200):
        shown = summary(pd.DataFrame(rows), before["value"])
        print(shown.to_string(index=False, float_format="{:.2f}".format))


# ------------------------------------------------------------------------------------- internals
def _recipe(name: str) -> DocumentRecipe:
    organism = ORGANISMS.get(name)
    if not isinstance(organism, Believer):
        believers = [n for n, o in ORGANISMS.items() if isinstance(o, Believer)]
        raise InputError(f"{name!r} has no documents; expected one of {', '.join(believers)}")
    return organism.recipe


def _universes(name: str) -> np.ndarray:
    documents = read_documents(Path(str(find_model(name).documents)))
    return np.array([document.universe for document in documents])


def _measured(models: Models, name: str) -> dict[str, float]:
    bridge = models.switch(name)
    decisions = decide(bridge, encode_scenario(bridge, load_scenario(SCENARIO)))
    questions = read_mcqs(evaluation_file(SCENARIO, "mcqs.jsonl"))
    conflict = [q for q in questions if q.category == "conflict_false_world"]
    chosen = choices(answer_questions(bridge, conflict)).is_correct.mean()
    return {"value": float(decisions.value.mean()), "chosen": float(chosen)}


if __name__ == "__main__":
    main()
