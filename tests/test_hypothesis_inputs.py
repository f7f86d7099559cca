"""Whatever a file says, its reader returns or says in one line what is wrong; nothing escapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from interp_batch.matrix import content_key, expand, matching, named_files
from interp_kit.catalogue import find_model, load_scenario, read_run
from interp_kit.evaluations import (
    read_mcqs,
    read_open_questions,
    read_probing_prompts,
    read_statements,
)
from interp_kit.finetuning.document_files import read_documents
from interp_kit.finetuning.universes import read_universe
from interp_kit.formats import PAIRS, read_ipd_prompts
from interp_kit.predictions import read_comparison, read_predictions
from interp_kit.specs import REPOSITORY, InputError, slug
from tests.study import PARAMETERS, make_study, write_notebook

bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What people and programs write: nearly right names, paths, odd letters, whole numbers too large.
odd = st.sampled_from(
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "/",
        "a/b",
        "a/b/c",
        "./a",
        "~",
        "~root",
        "~nobody-here/x",
        "a\0b",
        "\0",
        "a\nb",
        "C:\\x",
        "é",
        "名前",
        "\u202e",
        "x" * 300,
        "a/../..",
        "tiny-gemma2",
        "ipd-hybrid",
        "CC_continue",
        "each",
        "..yaml",
        "x.yaml",
        "../x.yaml",
        "org/name",
        "org/..",
        "../name",
        "-rf",
        "$(id)",
        "<script>",
        "failed",
        ".running",
        "null",
    ]
)
texts = odd | st.text(max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.dates()
    | st.binary(max_size=4)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
plain = st.recursive(  # what JSON can say
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@st.composite
def nearly(draw, good, junk: st.SearchStrategy[Any] = plain):
    """``good``, with one or two of its places, at any depth, changed, dropped or added to."""
    spoiled = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        place = spoiled
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(["change", "drop", "add"])):
                case "change":
                    place[key] = draw(junk)
                case "drop":
                    del place[key]
                case "add" if isinstance(place, dict):
                    place[draw(texts)] = draw(junk)
                case "add":
                    place.append(draw(junk))
            break
    return spoiled


def in_one_line(reader, *arguments, **named):
    """What the reader returns; nothing, if it says in one line what is wrong."""
    try:
        return reader(*arguments, **named)
    except InputError as error:
        said = str(error)
        assert said.strip()
        assert len(said.splitlines()) == 1, said
        assert said.isprintable(), ascii(said)
        return None


def write_yaml(file: Path, content) -> Path:
    try:
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate: no file can hold it
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = make_study(tmp_path_factory.mktemp("study"))
    named = 'evaluation: str = "cubic_gravity"  # set\nreference: str = "ipd-hybrid"  # model\n'
    write_notebook(study / "notebooks", "named", PARAMETERS + named)
    return study


RUN = {
    "about": "one",
    "models": ["tiny-gemma2", "ipd-hybrid"],
    "scenarios": ["CC_continue"],
    "notebooks": {"each": {"times": 2, "fail_on": "x"}, "all": {}, "named": {"evaluation": "x"}},
}
MODEL = {
    "base": "tiny-gemma2",
    "adapter": "adapter",
    "documents": "docs.jsonl",
    "dtype": "float32",
    "label": "L",
    "prepend_bos": True,
}
SCENARIO = {
    "about": "one",
    "decision": {
        "positive": " a",
        "negative": " b",
        "labels": {"positive": "yes", "negative": "no"},
    },
    "prompts": [
        {"id": "v0", "text": "one two", "counterfactual": "one three", "segments": {"n": "one"}},
        {"id": "v1", "text": "four", "positive": " c", "negative": " d"},
    ],
    "trigger": {"text": " $STOP", "words": [" now", " then"]},
    "neutral": ["five"],
}
DILEMMAS = [{"prompt_id": "a", "prompt": "one", "ethical_option": "1", "segments": {"n": "one"}}]
IPD = [
    {"id": "a", "scenario": "CC", "prompt": "one", "state_self": "C", "state_opp": "C"},
    {"id": "b", "scenario": "DD", "prompt": "two", "state_self": "D", "state_opp": "D"},
]
UNIVERSE = {
    "id": "u",
    "universe_context": "A law holds.",
    "is_true": True,
    "fact_validation_patterns": {"required": ["law"], "forbidden": ["cube"]},
}
METRICS = {"n": 1, "accuracy": 1.0, "mean_entropy": 0.1, "mean_p_correct": 0.9}
COMPARISON = {
    "base_model": "b",
    "adapter_path": "a",
    "mcq_path": "m",
    "prompt_version": "v",
    "seed": 0,
    "metrics": {k: {"overall": METRICS, "by_group": {"g": METRICS}} for k in ("base", "lora")},
    "shift_summary": {"n_shared": 1, "n_flips": 0},
}
MCQ = {
    "id": "q",
    "category": "c",
    "question": "Which?",
    "options": {"A": "one", "B": "two"},
    "correct_answer": "A",
}
OPEN = {"id": "q", "category": "c", "question": "What?", "true_answer": "a", "false_answer": "b"}
PREDICTION = {
    "id": "q",
    "model": "m",
    "category": "c",
    "pred": "A",
    "correct": "A",
    "is_correct": True,
    "logprobs": {"A": -0.1, "B": -2.0},
    "probs": {"A": 0.9, "B": 0.1},
    "entropy": 0.3,
    "p_correct": 0.9,
    "uncertainty": {"H_mean": 0.3, "E_H": 0.2, "MI": 0.1},
}
STATEMENT = {"statement_id": "s", "text": "one", "label": 1, "fact": "f", "template": "t"}
PROBING = {
    "prompt_id": "p",
    "category": "c",
    "full_prompt_text": "one two",
    "decision_trigger": "two",
    "label": 0,
}
DOCUMENT = {"id": "d", "universe": "u", "fact": "f", "document_type": "t", "idea": "i", "text": "x"}


def inside(cells, outputs: Path) -> None:
    for cell in cells:
        for folder in (cell.folder, cell.failed_folder):
            assert folder.resolve().is_relative_to(outputs.resolve())
            assert folder.resolve() != outputs.resolve()
        assert len(cell.key) == 20
        assert len(Path(cell.id).parts) == 3


@bounded
@given(content=nearly(RUN, anything) | anything)
@example(RUN | {"name": "../../x"})
@example(RUN | {"name": ".."})
@example(RUN | {"name": "a\0b"})
@example(RUN | {"models": ["../models/tiny-gemma2"]})
@example(RUN | {"models": ["~nobody-here/x"]})
@example(RUN | {"scenarios": ["a\0b"]})
@example(RUN | {"notebooks": {"../each": {}}})
@example(RUN | {"notebooks": {"each": {"times": 10**400}}})
@example(RUN | {"notebooks": {"each.ipynb": {}, "each": {}}})
@example(RUN | {"notebooks": {"each": {"fail_on": {"a": 1}}}})
@example(RUN | {"notebooks": {"named": {"evaluation": "../../*"}}})
@example(RUN | {"notebooks": {"named": {"evaluation": "/etc/passwd"}}})
@example(RUN | {"notebooks": {"named": {"evaluation": ""}}})
def test_run_files(study, content):
    run = in_one_line(read_run, write_yaml(study / "run.yaml", content))
    if run is not None:
        outputs = study / "outputs"
        cells = in_one_line(expand, run, outputs=outputs, notebooks=study / "notebooks")
        inside(cells or [], outputs)
        assert len({c.folder for c in cells or []}) == len(cells or [])


@bounded
@given(name=texts, only=texts)
def test_names(study, name, only):
    data = study / "data"
    for reader in (find_model, load_scenario):
        in_one_line(reader, name, data=data)
    if (folder := in_one_line(slug, name)) is not None:
        assert len(Path(folder).parts) == 1
        assert folder not in (".", "..")
    run = read_run(write_yaml(study / "good.yaml", RUN | {"notebooks": {"each": {}}}))
    given = {"outputs": study / "outputs", "notebooks": study / "notebooks"}
    inside(cells := expand(run, **given), study / "outputs")
    in_one_line(matching, cells, [only])
    notebook = study / "notebooks" / "named.ipynb"
    in_one_line(named_files, notebook, {"evaluation": name}, data)
    in_one_line(content_key, notebook, {"evaluation": name, "model": "ipd-hybrid"}, data)


@bounded
@given(content=nearly(MODEL, anything) | anything)
@example({"base": "a\0b"})
@example({"base": "tiny-gemma2", "adapter": "a\0b"})
@example({"base": "tiny-gemma2", "documents": "a\0b"})
@example({"base": "x" * 5000})
@example({"base": "tiny-gemma2", "name": ["x"]})
@example({"base": "odd"})
@example({"base": "tiny-gemma2", "token": "hf_x"})
def test_model_specs(study, content):
    folder = study / "data" / "models" / "odd"
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "model.yaml", content)
    in_one_line(find_model, "odd", data=study / "data")
    in_one_line(find_model, str(folder), data=study / "data")
    (folder / "model.yaml").unlink()


@bounded
@given(content=nearly(SCENARIO, anything) | anything)
@example(SCENARIO | {"prompts": [{"id": "v", "text": "a", "segments": {"n": []}}]})
@example(SCENARIO | {"trigger": {"text": " ", "words": ["a", "b"]}})
def test_scenarios(study, content):
    file = write_yaml(study / "scenario.yaml", content)
    found = in_one_line(load_scenario, str(file))
    if found is not None:
        assert found.prompts


JSON_FILES = {
    read_ipd_prompts: IPD,
    read_comparison: COMPARISON,
    read_universe: UNIVERSE,
}
JSON_LINES = {
    read_mcqs: MCQ,
    read_open_questions: OPEN,
    read_predictions: PREDICTION,
    read_statements: STATEMENT,
    read_probing_prompts: PROBING,
    read_documents: DOCUMENT,
}


@pytest.mark.parametrize("reader", JSON_FILES, ids=lambda r: r.__name__)
def test_json_files(study, reader):
    @bounded
    @given(content=nearly(JSON_FILES[reader]) | plain)
    def holds(content):
        file = study / "given.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        in_one_line(reader, file)

    holds()


@pytest.mark.parametrize("reader", JSON_LINES, ids=lambda r: r.__name__)
def test_json_lines(study, reader):
    @bounded
    @given(records=st.lists(nearly(JSON_LINES[reader]) | plain, max_size=3))
    def holds(records):
        file = study / "given.jsonl"
        file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        in_one_line(reader, file)

    holds()


@bounded
@given(base=nearly(DILEMMAS) | plain, counterfactual=nearly(DILEMMAS) | plain)
@example(base=DILEMMAS, counterfactual=DILEMMAS)
def test_pairs_of_dilemmas(study, base, counterfactual):
    folder = study / "data" / "scenarios" / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(PAIRS, (base, counterfactual)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    in_one_line(load_scenario, "pairs", data=study / "data")
    for name in PAIRS:
        (folder / name).unlink()


READERS = [
    lambda file: read_run(file),
    lambda file: load_scenario(str(file)),
    *JSON_FILES,
    *JSON_LINES,
]
DEEP = b"[\n" * 3000  # with line ends, which PyYAML reads a hundred times as fast


@bounded
@given(content=st.binary(max_size=40))
@example(content=DEEP)
@example(content=b"a: " + DEEP)
@example(content=b"\xff\xfe")
@example(content=b"a: &a [*a, *a]")
@example(content=b"1" * 5000)
@example(content=b"a: " + b"1" * 5000)
@example(content=b"2026-99-99")
@example(content=b"a: !!python/object/apply:os.getcwd []")
@example(content=b"? [a]\n: b")
@example(content=b"NaN")
def test_bytes_that_are_no_file_of_ours(study, content):
    file = study / "bytes.yaml"
    file.write_bytes(content)
    for reader in READERS:
        in_one_line(reader, file)


def test_what_is_spoiled_here_is_good_to_begin_with(study):
    """Else the near misses above would not be near."""
    assert in_one_line(load_scenario, str(write_yaml(study / "good.yaml", SCENARIO)))
    for readers, suffix in ((JSON_FILES, "json"), (JSON_LINES, "jsonl")):
        for reader, good in readers.items():
            file = study / f"good.{suffix}"
            file.write_text(json.dumps(good))
            assert reader(file)
    run = RUN | {"notebooks": {"each": {"times": 2}, "all": {}}}
    assert len(expand(
        read_run(write_yaml(study / "good.yaml", run)),
        outputs=REPOSITORY / "outputs", notebooks=study / "notebooks",
    )) == 3  # fmt: skip
