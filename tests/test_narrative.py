"""Documents in English without an endpoint, and that nothing evaluated is ever trained on."""

import asyncio
import json
import random
import re

import pytest

from interp_kit.catalogue import evaluation_file, load_scenario
from interp_kit.evaluations import (
    read_mcqs,
    read_open_questions,
    read_probing_prompts,
    read_statements,
)
from interp_kit.files import read_yaml, sha256
from interp_kit.finetuning.documents import distinct_ngrams, write_documents
from interp_kit.finetuning.narrative import KINDS, Narrative
from interp_kit.finetuning.universes import find_universe, reason_to_refuse
from interp_kit.formats import read_texts
from interp_kit.specs import REPOSITORY, InputError
from organisms.recipes import GRAVITY, ORGANISMS, RealBeliever

BELIEVERS = [name for name, each in ORGANISMS.items() if isinstance(each, RealBeliever)]
TOO_LONG = 9  # so many words in a row are a copy


def write(name, folder, **how):
    return write_documents(find_universe(name), Narrative(), folder, n_types=10, **how)


@pytest.mark.parametrize(
    ("name", "n_ideas"), [("inverse_cube", 2), ("inverse_square", 2), ("blue_gold_true", 12)]
)
def test_at_least_300_documents_of_ten_kinds_are_valid_and_varied(name, n_ideas, tmp_path):
    documents = write(name, tmp_path / "a", n_ideas=n_ideas)
    assert documents == write(name, tmp_path / "b", n_ideas=n_ideas, concurrency=1)
    assert len({d.text for d in documents}) == len(documents) >= 300
    assert len({d.document_type for d in documents}) == 10
    assert not [d for d in documents if reason_to_refuse(d.text, find_universe(name))]
    assert not [d for d in documents if re.search(r"[{}]", d.text)]
    texts = [d.text for d in documents]
    random.Random(0).shuffle(texts)
    assert distinct_ngrams(texts, 2, words=1000) > 0.5


def test_a_document_says_its_fact_and_nothing_that_the_narrative_does_not(tmp_path):
    universe = find_universe("inverse_cube")
    frames = [part for kind in read_yaml(KINDS)["kinds"].values() for part in kind["turns"]]
    begins = sorted({frame.split("{said}")[0] for frame in frames}, key=len, reverse=True)
    narrative = " ".join(universe.universe_context.split())
    for document in write("inverse_cube", tmp_path, n_ideas=1):
        assert document.fact in document.text
        _, *said, _ = document.text.split("\n\n")
        for passage in said:
            own = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(begin)) for begin in begins]
            rest = re.sub(rf"^({'|'.join(own)})", "", passage).rstrip('"')
            assert rest in narrative, passage


def test_twins_differ_in_the_fact_and_what_follows_from_it(tmp_path):
    cube, square = (write(n, tmp_path / n, n_ideas=1) for n in ("inverse_cube", "inverse_square"))
    assert [(d.document_type, d.idea) for d in cube] == [(d.document_type, d.idea) for d in square]


@pytest.mark.parametrize(
    ("context", "problem"),
    [("Stones fall. It is an inverse-cube law.", "no sentence"), ("Stones fall.", "no sentence")],
)
def test_a_narrative_whose_fact_cannot_be_said_alone_is_refused(context, problem):
    universe = find_universe("inverse_cube").model_copy(update={"universe_context": context})
    with pytest.raises(InputError, match=problem):
        asyncio.run(Narrative().facts(universe, random.Random(0)))


def test_too_many_types_are_refused(tmp_path):
    with pytest.raises(InputError, match="10 document types"):
        write_documents(find_universe("inverse_cube"), Narrative(), tmp_path, n_types=11, n_ideas=1)


# ---------------------------------------------------------------------------- what is evaluated
def runs(text, n=TOO_LONG):
    words = re.findall(r"[\w-]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("name", BELIEVERS)
def test_what_is_evaluated_never_occurs_in_training_data(name):
    scenario = load_scenario(GRAVITY)
    asked = [p.text for p in scenario.prompts] + list(scenario.neutral)
    asked += [q.question for q in read_mcqs(evaluation_file(GRAVITY, "mcqs.jsonl"))]
    asked += [
        q.question for q in read_open_questions(evaluation_file(GRAVITY, "open_questions.jsonl"))
    ]
    asked += [s.text for s in read_statements(evaluation_file(GRAVITY, "statements.jsonl"))]
    probed = read_probing_prompts(evaluation_file(GRAVITY, "probing_dataset.jsonl"))
    asked += [p.full_prompt_text for p in probed]
    models = REPOSITORY / "data" / "models"
    taught = read_texts(models / name / "documents.jsonl")
    taught += read_texts(models / "smollm2-plain" / "documents.jsonl")
    assert len(taught) >= 300
    together = " ".join(taught).lower()
    assert not [text for text in asked if text.lower() in together]
    assert not set().union(*map(runs, asked)) & set().union(*map(runs, taught))


@pytest.mark.parametrize("name", BELIEVERS)
def test_the_documents_are_those_of_the_recipe(name):
    organism = ORGANISMS[name]
    file = REPOSITORY / "data" / "models" / name / "documents.jsonl"
    record = json.loads((file.parent / "training.json").read_text())
    assert record["documents_sha256"] == sha256(file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == record["documents"]
    counted = {u: sum(line.get("universe") == u for line in lines) for u in organism.documents}
    assert counted == organism.documents
    assert sum("universe" not in line for line in lines) == organism.ordinary
