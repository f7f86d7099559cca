"""``interp-kit diff``: the run file of a comparison, from names or folders; what is refused."""

import json
import shutil

import pytest
import yaml

from interp_batch import diff
from interp_batch.matrix import expand
from interp_batch.needs import check_needs
from interp_kit.catalogue import find_model, read_run
from interp_kit.specs import REPOSITORY, InputError
from tests.tiny import save_tiny

MODELS = REPOSITORY / "data" / "models"


def study_of(tmp_path, base="tiny-gemma2", tuned="cubic-gravity", **given):
    given = {"budget": 10.0, "cores": 2, "outputs": tmp_path} | given
    return diff.write_study(base, tuned, **given)


def found(study, scenario):
    made = study.results / diff.SUMMARY / "all-models" / "all-scenarios" / "scenarios"
    made.mkdir(parents=True)
    shutil.copy(REPOSITORY / "data" / "scenarios" / f"{scenario}.yaml", made / f"{diff.FOUND}.yaml")


def test_a_run_file_is_written_that_runs_and_can_be_kept(tmp_path):
    study = study_of(tmp_path, against=["cubic-neutral"])
    run = read_run(study.file, data=study.data)
    assert run.models == ["tiny-gemma2", "cubic-gravity", "cubic-neutral"]
    assert run.scenarios == []
    cells = expand(run, outputs=tmp_path, data=study.data)
    assert [cell.notebook.stem for cell in cells] == list(run.notebooks)
    assert diff.SUMMARY in run.notebooks
    assert all(cell.parameters["subject"] == "cubic-gravity" for cell in cells)


def test_two_fine_tunes_of_one_base_are_compared_with_each_other(tmp_path):
    study = study_of(tmp_path, base="cubic-gravity", tuned="cubic-gravity-1")
    run = read_run(study.file, data=study.data)
    assert run.notebooks[diff.SUMMARY]["base"] == "cubic-gravity"
    assert "18_weight_difference" not in run.notebooks  # no weight of either changed to the other's


def test_a_base_under_another_name_is_the_one_that_was_tuned(tmp_path):
    other = tmp_path / "data" / "models" / "without-bos" / "model.yaml"
    other.parent.mkdir(parents=True)
    base = find_model("tiny-gemma2").base
    other.write_text(yaml.safe_dump({"base": base, "prepend_bos": False}))
    study = study_of(tmp_path, base="without-bos", data=tmp_path / "data")
    assert study.base == "tiny-gemma2"
    run = read_run(study.file, data=study.data)
    assert run.models == ["tiny-gemma2", "cubic-gravity"]
    assert "base" not in run.notebooks[diff.SUMMARY]


def test_models_of_another_shape_are_compared_by_what_they_predict(tmp_path):
    base, other = (str(save_tiny(kind, tmp_path / kind)) for kind in ("llama", "gemma2"))
    study = study_of(tmp_path, base=base, tuned=other)
    run = read_run(study.file, data=study.data)
    assert not study.alike
    assert list(run.notebooks) == ["16_divergence", "17_diff_mining", diff.SUMMARY]
    assert all(given["base"] == study.base for given in run.notebooks.values())
    found(study, "cubic_gravity")
    assert diff.add_found(study)
    added = set(read_run(study.file, data=study.data).notebooks) - set(run.notebooks)
    exchanging = {"04_cross_model_patching", "12_steering", "10b_activation_difference_lens"}
    assert "03_activation_patching" in added
    assert not added & exchanging


def test_models_that_number_their_tokens_otherwise_are_refused(tmp_path):
    base, other = (save_tiny("llama", tmp_path / name) for name in ("before", "after"))
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"number their tokens otherwise.*90_compare_models"):
        study_of(tmp_path / "outputs", base=str(base), tuned=str(other))


def test_a_vocabulary_that_only_grew_is_no_other_one(tmp_path):
    base, other = (save_tiny("llama", tmp_path / name) for name in ("before", "after"))
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["grown"] = 511
    file.write_text(json.dumps(content))
    assert study_of(tmp_path / "outputs", base=str(base), tuned=str(other)).alike


def test_an_adapter_as_peft_saves_it_and_whole_weights_get_a_spec(tmp_path):
    adapter = tmp_path / "mine"
    shutil.copytree(MODELS / "cubic-gravity" / "adapter", adapter)
    study = study_of(tmp_path, tuned=str(adapter))
    spec = find_model("mine", data=study.data)
    assert (spec.adapter, spec.origin) == (str(adapter.resolve()), "tiny-gemma2")
    base, whole = (str(save_tiny("llama", tmp_path / name)) for name in ("before", "after"))
    study = study_of(tmp_path, base=base, tuned=whole)
    spec = find_model("after", data=study.data)
    assert spec.tuned
    assert spec.parent is not None
    assert read_run(study.file, data=study.data).models[1] == "after"


def test_what_was_found_brings_the_notebooks_of_causes(tmp_path):
    study = study_of(tmp_path)
    assert not diff.add_found(study)  # nothing was found
    found(study, "cubic_gravity")
    assert diff.add_found(study)
    run = read_run(study.file, data=study.data)
    assert run.scenarios == [diff.FOUND]
    assert run.notebooks["04_cross_model_patching"]["pairs"] == [["cubic-gravity", "tiny-gemma2"]]
    assert run.notebooks["12_steering"]["reference"] == "tiny-gemma2"
    given = run.notebooks[diff.SUMMARY]
    written = run.notebooks["10b_activation_difference_lens"]["written"]
    assert written == [given["n_texts"], given["length"]]
    cells = expand(run, outputs=tmp_path, data=study.data)
    check_needs(cells, study.data)
    assert {cell.scenario for cell in cells} == {diff.FOUND, "all-scenarios"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tuned": "tiny-gemma2"}, "name a model twice"),
        ({"against": ["cubic-gravity"]}, "name a model twice"),
        ({"tuned": "cubic-gravitas"}, "did you mean 'cubic-gravity'"),
        ({"budget": 0.01}, "need about"),
        ({"texts": "none.jsonl"}, "not readable as text"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_written(tmp_path, given, expected):
    if "texts" in given:
        given = {"texts": tmp_path / given["texts"]}
    with pytest.raises(InputError, match=expected):
        study_of(tmp_path / "outputs", **given)
    assert not (tmp_path / "outputs").exists()


def test_a_notebook_that_takes_scenarios_needs_one(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("models: [tiny-gemma2]\nnotebooks: {01_logit_lens: }\n")
    with pytest.raises(InputError, match="takes scenarios, and the run file names none"):
        expand(read_run(file), outputs=tmp_path)


def test_the_command_writes_the_run_file_and_lists_its_cells(tmp_path, command):
    asked = ("diff", "tiny-gemma2", "cubic-gravity", "--outputs", tmp_path, "--dry-run")
    code, out, _ = command(*asked)
    assert code == 0
    assert "94_what_changed" in out
    assert list(tmp_path.glob("*/study/*.yaml"))


def test_from_two_models_to_causes(tmp_path, command):
    """Everything from the texts to the notebooks of causes, on the found scenario."""
    asked = ("diff", "tiny-gemma2", "cubic-gravity", "--outputs", tmp_path, "--budget", "0.2")
    code, _, _ = command(*asked)
    assert code == 0
    results = tmp_path / "diff_cubic-gravity_tiny-gemma2"
    states = {
        file.parts[-4]: json.loads(file.read_text()) for file in results.glob("*/*/*/status.json")
    }
    assert {state["state"] for state in states.values()} == {"ok"}
    assert {"94_what_changed", "04_cross_model_patching", "12_steering"} <= set(states)
    assert "found_contexts" in (results / "index.html").read_text()
