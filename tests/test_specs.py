"""Bad input gives one line: what was expected, what came, how to fix it."""

import json
from pathlib import Path

import pytest
import yaml

from interp_kit.catalogue import find_model, list_models, list_scenarios, load_scenario, read_run
from interp_kit.formats import read_ipd_prompts
from interp_kit.specs import InputError, PromptSpec, slug

SCENARIO = {
    "decision": {
        "positive": " a",
        "negative": " b",
        "labels": {"positive": "yes", "negative": "no"},
    },
    "prompts": [{"id": "v0", "text": "one"}],
}


def write(folder: Path, content, name="s.yaml") -> str:
    file = folder / name
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_shipped_spec_loads():
    assert {m.name for m in list_models()} >= {"tiny-gemma2", "ipd-hybrid"}
    for scenario in list_scenarios():
        assert len({p.text for p in scenario.prompts}) == len(scenario.prompts)


def test_the_ipd_scenarios_have_three_distinct_prompts_each():
    names = ["CC_continue", "CC_temptation", "CD_punished", "DC_exploited", "DD_trapped"]
    prompts = [p for name in names for p in load_scenario(name).prompts]
    assert len({p.text for p in prompts}) == 15
    assert all(p.counterfactual and p.counterfactual != p.text for p in prompts)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    assert "did you mean 'ipd-hybrid'?" in message(find_model, "ipd-hybird")
    assert "did you mean 'CC_continue'?" in message(load_scenario, "CC_continu")


def test_an_unknown_key_is_named(tmp_path):
    file = write(tmp_path, SCENARIO | {"promts": []})
    assert "promts: unknown key (did you mean 'prompts'?)" in message(load_scenario, file)


def test_a_wrong_type_is_named_with_what_came(tmp_path):
    prompts = [{"id": 1, "text": "x"}]
    text = message(load_scenario, write(tmp_path, SCENARIO | {"prompts": prompts}))
    assert "prompts.0.id" in text
    assert "got 1" in text


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "two prompts have the id 'a'"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": "x"}], "two prompts have the text 'x'"),
        ([], "at least 1 item"),
    ],
)
def test_prompts_must_be_distinct(tmp_path, prompts, expected):
    assert expected in message(load_scenario, write(tmp_path, SCENARIO | {"prompts": prompts}))


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        ("nowhere", "occurs 0 times"),
        ("a", "occurs 3 times"),
        (["one two", "one two", "three"], "expected its text, or two"),
        (["one two", "no"], "occurs 0 times"),
    ],
)
def test_a_segment_is_words_that_occur_once(segment, expected):
    given = {"id": "v", "text": "a one two a a", "counterfactual": "a one two a a"}
    with pytest.raises(ValueError, match=expected):
        PromptSpec(**given, segments={"part": segment})
    assert PromptSpec(**given, segments={"part": "one two"}).segments


def test_equal_answers_are_refused(tmp_path):
    decision = SCENARIO["decision"] | {"negative": " a"}
    text = message(load_scenario, write(tmp_path, SCENARIO | {"decision": decision}))
    assert "the same answer" in text


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2", "\x00", "1: 2"])
def test_what_is_not_a_mapping_is_refused(tmp_path, content):
    assert str(tmp_path) in message(load_scenario, write(tmp_path, content))


def test_a_missing_run_file_points_to_the_examples(tmp_path):
    assert "papermill_params/" in message(read_run, tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["..", "a/../..", "", " ", "-x", ".hidden", "a\nb"])
def test_no_name_becomes_a_path_unchecked(name):
    message(slug, name)


def test_slugs():
    assert slug("google/gemma-2-2b-it") == "google--gemma-2-2b-it"
    assert slug("/some/where/my-model") == "my-model"
    assert slug("../study/trust.yaml") == "trust"


def test_two_models_of_one_folder_name_are_refused(tmp_path):
    run = {"models": ["a/x", "a/x"], "scenarios": ["s"], "notebooks": {"n": {}}}
    assert "twice" in message(read_run, Path(write(tmp_path, run)))


def test_an_adapter_cannot_be_a_base(tmp_path):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    write(folder, {"base": "ipd-hybrid"}, "model.yaml")
    assert "name a base model" in message(find_model, "mine", data=tmp_path)


def test_a_study_of_ones_own_comes_before_the_shipped_data(tmp_path):
    (tmp_path / "scenarios").mkdir()
    write(tmp_path / "scenarios", SCENARIO | {"about": "mine"}, "CC_continue.yaml")
    assert load_scenario("CC_continue", data=tmp_path).about == "mine"
    assert load_scenario("CC_continue").about != "mine"


def test_ipd_prompt_files_are_read_and_repeats_dropped(tmp_path):
    record = {
        "id": "CC_v0",
        "scenario": "CC",
        "prompt": "p",
        "state_self": "action1",
        "state_opp": "action1",
    }
    file = tmp_path / "ipd.json"
    others = [{"id": "CC_v1"}, {"id": "CC_v2", "prompt": "q"}]
    file.write_text(json.dumps([record, *(record | other for other in others)]))
    (scenario,) = read_ipd_prompts(file)
    assert [p.text for p in scenario.prompts] == ["p", "q"]
    assert "1 of 3 prompts repeated" in scenario.about


def test_the_seed_format_is_read_as_it_is(shared):
    scenarios = read_ipd_prompts(shared / "seed_formats" / "ipd_eval_prompts.json")
    assert [s.name for s in scenarios] == ["CC_continue"]
    assert scenarios[0].prompts[0].group == "action1/action1"


@pytest.mark.parametrize("content", ["{", "{}", '[{"id": "x"}]'])
def test_bad_prompt_files_are_refused(tmp_path, content):
    file = tmp_path / "ipd.json"
    file.write_text(content)
    assert str(file) in message(read_ipd_prompts, file)
