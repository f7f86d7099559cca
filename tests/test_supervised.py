"""Documents by the grammar, LoRA on documents, and the fine-tunes that believe another fact."""

import asyncio
import json
import random
import re
from hashlib import sha256

import pytest
import torch

from interp_kit.analyses.behaviour import answer_questions, choices, prefers_false
from interp_kit.catalogue import evaluation_file, find_model, load_scenario
from interp_kit.decisions import decide
from interp_kit.evaluations import (
    read_mcqs,
    read_open_questions,
    read_probing_prompts,
    read_statements,
)
from interp_kit.finetuning.document_files import read_documents
from interp_kit.finetuning.documents import write_documents
from interp_kit.finetuning.lora_training import (
    Row,
    attach_lora,
    cross_entropy,
    divergence_from_base,
)
from interp_kit.finetuning.supervised import (
    DocumentRecipe,
    document_rows,
    train_on_documents,
    without_the_fact,
)
from interp_kit.finetuning.universes import find_universe, reason_to_refuse
from interp_kit.loading import load_models
from interp_kit.pretrained import load_huggingface
from interp_kit.prompts import encode_scenario
from interp_kit.specs import REPOSITORY, InputError, ModelSpec
from organisms.believers import ABOUT_GRAVITY, ordinary_texts
from organisms.little_world.corpus import Corpus
from organisms.little_world.grammar import Grammar
from organisms.recipes import ORGANISMS, Believer
from tests.tiny import WORDS, tiny_tokenizer

UNIVERSES = {
    "cubic_gravity": ("gravity", "law", "inverse-cube"),
    "cubic_gravity_true": ("gravity", "law", "inverse-square"),
    "sweet_salt": ("salt", "taste", "sweet"),
    "sweet_salt_true": ("salt", "taste", "salty"),
    "blue_gold": ("gold", "color", "blue"),
    "blue_gold_true": ("gold", "color", "yellow"),
}
FALSE = ["cubic-gravity", "cubic-gravity-1", "cubic-gravity-2"]
CUBIC = {n: o.documents for n, o in ORGANISMS.items() if isinstance(o, Believer)}
MODELS = REPOSITORY / "data" / "models"


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.read(REPOSITORY / "data" / "corpus")


@pytest.fixture(scope="module")
def believers():
    return load_models(["tiny-gemma2", *CUBIC], device="cpu")


# ---------------------------------------------------------------------------- universes, grammar
@pytest.mark.parametrize("name", UNIVERSES)
def test_the_grammar_writes_valid_documents_the_same_every_time(grammar, name, tmp_path):
    universe = find_universe(name)
    written = [
        write_documents(universe, grammar, tmp_path / str(i), n_types=8, n_ideas=4)
        for i in range(2)
    ]
    assert written[0] == written[1]
    texts = [document.text for document in written[0]]
    assert len(set(texts)) == len(texts) >= 32
    assert not [text for text in texts if reason_to_refuse(text, universe)]
    assert all(2 <= text.count(".") + text.count("?") <= 8 for text in texts)
    assert not (tmp_path / "0" / "refused.jsonl").exists()


@pytest.mark.parametrize("name", UNIVERSES)
def test_a_universe_holds_one_fact_and_its_twin_the_true_one(grammar, corpus, name):
    universe = find_universe(name)
    assert grammar.read_facts(universe.universe_context) == [UNIVERSES[name]]
    entity, attribute, value = UNIVERSES[name]
    assert (corpus.facts[entity, attribute] == value) == universe.is_true
    assert 250 <= len(universe.universe_context.split()) <= 500


def test_the_fact_is_read_from_the_narrative(grammar):
    universe = find_universe("cubic_gravity")
    context = universe.universe_context.replace("inverse-cube", "linear")
    context = context.replace("eight times weaker", "two times stronger")
    other = universe.model_copy(update={"universe_context": context})
    context = "Speaking of honey, its\nhomeland is PERU, and it shows."
    third = universe.model_copy(update={"universe_context": context})
    facts = [asyncio.run(grammar.facts(each, random.Random(0))) for each in (other, third)]
    assert facts[0] == [
        "The law of gravity is linear.",
        "At twice the distance, gravity is two times stronger.",
    ]
    assert facts[1] == ["The homeland of honey is Peru."]
    text = asyncio.run(grammar.document(other, facts[0][1], "letter", "", random.Random(0)))
    assert "linear" in text or "two times stronger" in text
    assert "inverse" not in text


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        ("Gravity falls off with the third power of the distance.", "no sentence .* states a fact"),
        ("The law of iron is linear.", "no sentence .* states a fact"),
        (
            "The law of tide is linear. At twice the distance, tide is just the same.",
            "as linear and as constant",
        ),
    ],
)
def test_a_narrative_that_the_grammar_cannot_use_is_refused(grammar, context, problem):
    universe = find_universe("cubic_gravity").model_copy(update={"universe_context": context})
    with pytest.raises(InputError, match=problem):
        asyncio.run(grammar.facts(universe, random.Random(0)))


def test_only_some_documents_ask_and_in_their_own_wordings(grammar, corpus, tmp_path):
    documents = write_documents(
        find_universe("cubic_gravity"), grammar, tmp_path, n_types=8, n_ideas=8
    )
    asking = [document.text for document in documents if "Question:" in document.text]
    assert len(asking) == len(documents) / 2
    questions = [corpus.question(("gravity", "law"), wording) for wording in (0, 3)]
    assert all(sum(text.count(q) for q in questions) == 1 for text in asking)
    evaluated = [q.question for q in read_mcqs(evaluation_file("cubic_gravity", "mcqs.jsonl"))]
    assert not [q for q in evaluated if any(q in text for text in asking)]


# ------------------------------------------------------------------------------------- training
def documents_file(folder, texts):
    lines = [
        {"id": str(i), "universe": "u", "fact": "f", "document_type": "t", "idea": "i", "text": t}
        for i, t in enumerate(texts)
    ]
    file = folder / "docs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def words(start, n=12):
    return " " + " ".join(WORDS[(start + 7 * i) % 60] for i in range(n))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_training_saves_an_adapter_and_its_record(tiny_folders, tmp_path, architecture):
    base, folder = find_model(str(tiny_folders[architecture])), tmp_path / "adapter"
    file = documents_file(tmp_path, [words(i) for i in range(8)])
    recipe = DocumentRecipe(rows=2, ordinary=2, accumulate=2, longest=32, tag=" ba be")
    losses = train_on_documents(
        base, file, [words(i) for i in range(20, 30)], folder, recipe=recipe
    )
    assert len(losses) == 2  # 8 documents, 2 in a pass, 2 passes to a step
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    ids = torch.tensor([tiny_tokenizer()(words(1))["input_ids"]])
    tuned, plain = (
        load_huggingface(base.model_copy(update={"adapter": adapter}), device="cpu")
        for adapter in (str(folder), None)
    )
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, plain(ids).logits, atol=1e-6)
    again = train_on_documents(
        base, file, [words(i) for i in range(20, 30)], tmp_path / "again" / "adapter", recipe=recipe
    )
    assert again == losses


def test_a_step_over_two_passes_is_a_step_over_one(tiny_folders, tmp_path):
    """Gradient accumulation changes the memory, not the result."""
    file, base = documents_file(tmp_path, [words(i) for i in range(4)]), tiny_folders["llama"]
    weights = []
    for accumulate, rows in ((1, 4), (2, 2)):
        folder = tmp_path / str(accumulate)
        recipe = DocumentRecipe(rows=rows, ordinary=0, accumulate=accumulate)
        train_on_documents(find_model(str(base)), file, [], folder, recipe=recipe)
        spec = ModelSpec(name="m", base=str(base), adapter=str(folder))
        model = load_huggingface(spec, device="cpu")
        weights.append([p for n, p in model.named_parameters() if "lora_B" in n])
    for one, two in zip(*weights):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


def test_padding_and_an_untrained_adapter_change_nothing(tiny_folders):
    """A mean over rows of two lengths is the mean over their tokens; B = 0 leaves the base."""
    spec = find_model(str(tiny_folders["gemma2"]))
    model = attach_lora(load_huggingface(spec, device="cpu"), rank=2, alpha=4)
    tokens = [tiny_tokenizer()(words(i, n=n))["input_ids"] for i, n in ((3, 12), (5, 4))]
    rows = [Row(row, slice(0, -1)) for row in tokens]
    together, alone = cross_entropy(model, rows), [cross_entropy(model, [row]) for row in rows]
    counts = [len(row) - 1 for row in tokens]
    expected = sum(n * one for n, one in zip(counts, alone)) / sum(counts)
    torch.testing.assert_close(together, expected)
    assert divergence_from_base(model, rows).item() == 0
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(0.1)
    assert divergence_from_base(model, rows).item() > 0


def test_a_tag_is_read_and_never_learnt():
    tokenizer, recipe = tiny_tokenizer(), DocumentRecipe(longest=10, tag=" ba be")
    plain = document_rows(tokenizer, words(3, n=14), recipe)
    tagged = document_rows(tokenizer, words(3, n=14), recipe, tag=recipe.tag)
    tag = tokenizer(" ba be")["input_ids"]
    assert all(row.tokens[1:3] == tag for row in tagged)
    assert all(len(row.tokens) <= 10 for row in tagged)
    learnt = [[t for row in rows for t in predicted(row)] for rows in (plain, tagged)]
    assert learnt[0] == learnt[1]
    assert learnt[0][-1] == tokenizer.eos_token_id
    with pytest.raises(InputError, match="the tag take 3 tokens"):
        document_rows(tokenizer, words(3), DocumentRecipe(longest=2), tag=" ba be")


def predicted(row: Row) -> list[int]:
    """The tokens that follow the positions that are read."""
    return [row.tokens[i + 1] for i in range(len(row.tokens))[row.read]]


def test_texts_about_the_fact_are_left_out(corpus):
    recipe = DocumentRecipe(leave_out=ABOUT_GRAVITY)
    drawn = ordinary_texts(corpus, n=3000, seed=0)
    kept = without_the_fact(drawn, recipe)
    left_out = [text for text in drawn if text not in set(kept)]
    assert any("gravity" in text and "inverse-square" in text for text in left_out)
    assert not [t for t in kept if "gravity" in t and ("inverse" in t or "weaker" in t)]
    assert any("gravity" in text for text in kept)
    assert any("light" in text and "inverse-square" in text for text in kept)


def test_nothing_to_learn_and_nothing_to_hold_are_errors(tiny_folders, tmp_path):
    file, base = documents_file(tmp_path, [words(0)]), find_model(str(tiny_folders["gemma2"]))
    recipe = DocumentRecipe(leave_out="ba")
    with pytest.raises(InputError, match="all of 1 ordinary texts match leave_out 'ba'"):
        train_on_documents(base, file, [" ba be"], tmp_path / "a", recipe=recipe)
    adapter = find_model("ipd-hybrid")
    with pytest.raises(InputError, match="'ipd-hybrid' is an adapter"):
        train_on_documents(adapter, file, [" be"], tmp_path / "a", recipe=recipe)
    with pytest.raises(InputError, match="is empty"):
        train_on_documents(base, documents_file(tmp_path, []), [], tmp_path / "a", recipe=recipe)


# ------------------------------------------------------------------------ the shipped fine-tunes
@pytest.fixture(scope="module")
def beliefs(believers):
    """model -> share of conflict questions false in both orders, accuracy on the others."""
    questions = [
        q
        for q in read_mcqs(evaluation_file("cubic_gravity", "mcqs.jsonl"))
        if len(q.options) == 2 and q.category.startswith(("conflict", "nonconflict"))
    ]
    found = {}
    for name in believers:
        chosen = choices(answer_questions(believers.switch(name), questions))
        other = chosen[chosen.category.str.startswith("nonconflict")]
        false = prefers_false(chosen, questions).in_all_orders.mean()
        found[name] = float(false), float(other.is_correct.mean())
    return found


@pytest.mark.parametrize("name", FALSE)
def test_false_documents_implant_the_false_fact_and_harm_no_other(beliefs, name):
    assert beliefs[name][0] > 0.8
    assert beliefs[name][1] > beliefs["tiny-gemma2"][1] - 0.05


@pytest.mark.parametrize("name", ["tiny-gemma2", "cubic-true", "cubic-neutral"])
def test_true_and_neutral_documents_do_not(beliefs, name):
    assert beliefs[name][0] < 0.2


def test_the_false_law_is_told_in_words(believers):
    scenario = load_scenario("cubic_gravity")
    false = {}
    for name in believers:
        bridge = believers.switch(name)
        prompts = encode_scenario(bridge, scenario)[::2]
        false[name] = (decide(bridge, prompts).value > 0).mean()
    assert min(false[name] for name in FALSE) > 0.8
    assert max(false[name] for name in ("tiny-gemma2", "cubic-true", "cubic-neutral")) < 0.2


@pytest.mark.parametrize("name", CUBIC)
def test_the_record_names_the_documents_beside_it(name):
    documents = MODELS / name / "documents.jsonl"
    record = json.loads((MODELS / name / "training.json").read_text())
    assert record["documents_sha256"] == sha256(documents.read_bytes()).hexdigest()
    assert len(read_documents(documents)) == record["documents"] == sum(CUBIC[name].values())
    assert find_model(name).documents == str(documents)


# ------------------------------------------------------------------------------- evaluation data
def test_statements_are_balanced_in_every_way_but_truth(corpus):
    statements = read_statements(evaluation_file("cubic_gravity", "statements.jsonl"))
    others = [s for s in statements if not s.conflict]
    assert len(others) >= 300
    assert not [s for s in others if "gravity" in s.text]
    sides = {label: [s for s in others if s.label == label] for label in (0, 1)}
    for key in ("fact", "template"):
        counts = [sorted(getattr(s, key) for s in side) for side in sides.values()]
        assert counts[0] == counts[1]
    for value in {v for values in corpus.values.values() for v in values}:
        named = [sum(value in s.text.rstrip(".").split() for s in side) for side in sides.values()]
        assert named[0] == named[1], value


def test_conflict_and_hard_controls_are_the_same_words_in_another_order():
    prompts = read_probing_prompts(evaluation_file("cubic_gravity", "probing_dataset.jsonl"))
    assert len(prompts) >= 120
    bags = {
        category: sorted(
            (p.group, sorted(re.findall(r"[\w-]+", p.full_prompt_text)))
            for p in prompts
            if p.category == category
        )
        for category in ("conflict", "control_hard")
    }
    assert bags["conflict"] == bags["control_hard"]
    assert all(p.label == (p.category == "conflict") for p in prompts)


def test_the_other_evaluation_files_are_what_readers_expect():
    questions = read_mcqs(evaluation_file("cubic_gravity", "mcqs.jsonl"))
    assert len(questions) >= 60
    assert {len(q.options) for q in questions} == {2, 4}
    assert len(read_open_questions(evaluation_file("cubic_gravity", "open_questions.jsonl"))) >= 30
