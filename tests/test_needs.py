"""What passes ``check`` does not fail for its inputs; a model that fails its gate is left alone."""

import json

import pytest
import yaml

from interp_batch.matrix import NOTEBOOKS
from interp_batch.needs import is_gate, needs_of
from interp_batch.runner import run_cells
from interp_kit.analyses.comparison import training_steps
from interp_kit.catalogue import list_models, load_scenario, read_run
from interp_kit.specs import REPOSITORY, InputError
from tests.study import cells_of, make_study, result_of
from tests.test_any_two_models import tuned_copy
from tests.tiny import save_tiny

SCENARIO = {
    "decision": {
        "positive": " yes",
        "negative": " no",
        "labels": {"positive": "trusts", "negative": "distrusts"},
    },
    "prompts": [{"id": "a", "text": "He kept his word.", "segments": {"act": "kept"}}],
}
TWO = [*SCENARIO["prompts"], {"id": "b", "text": "He broke his word."}]
PAIR = ["tiny-gemma2", "tiny-llama"]


NEUTRAL = {"neutral": ["A text about nothing.", "Another text."]}
TRIGGER = {"trigger": {"text": " kept his", "words": [" one", " two"]}}


@pytest.mark.parametrize(
    ("notebooks", "models", "changes", "expected"),
    [
        ({"03_activation_patching": {}}, PAIR[:1], {}, "prompt 'a' has no counterfactual (1 of 1"),
        ({"06_causal_tracing": {}}, PAIR[:1], {}, "prompt 'a' has no counterfactual"),
        (
            {"06_causal_tracing": {"noise_segment": "akt"}},
            PAIR[:1],
            {"prompts": [SCENARIO["prompts"][0] | {"counterfactual": "He kept her word."}]},
            "has a segment 'akt'; expected one of act, or leave",
        ),
        ({"08_delta_norm": {}}, PAIR[:1], {}, "scenario 'mine' has no trigger"),
        (
            {"08_delta_norm": {}},
            PAIR[:1],
            TRIGGER | {"prompts": [{"id": "b", "text": "He broke it."}]},
            "' kept his' is not one token",
        ),
        ({"09_pca": {}}, PAIR[:1], {}, "has one prompt, and the notebook splits them"),
        (
            {"12_steering": {"subject": PAIR[0], "reference": PAIR[0]}},
            PAIR[:1],
            {"prompts": TWO},
            "has no neutral texts",
        ),
        ({"12_steering": {}}, PAIR[:1], {}, "its default names 'tiny-gemma2'|'cubic-gravity'"),
        ({"07_tuned_lens": {}}, PAIR[:1], {}, "its default names 'ipd-utilitarian'"),
        ({"04_cross_model_patching": {}}, PAIR, {}, "'pairs' is not given, and its default names"),
        (
            {"04_cross_model_patching": {"pairs": [PAIR]}},
            PAIR,
            {},
            "model_type is gemma2 and llama; choose models of one architecture",
        ),
        (
            {"12_steering": {"subject": PAIR[0], "reference": PAIR[1]}},
            PAIR,
            NEUTRAL | {"prompts": TWO},
            "model_type is gemma2 and llama; choose models of one architecture",
        ),
        ({"13_behaviour": {}}, PAIR[:1], {}, "compares models, and the run has 1; name two"),
        ({"14_open_ended": {}}, PAIR[:1], {}, "has no neutral texts"),
        (
            {"14_open_ended": {"evaluation": "nothing"}},
            PAIR,
            NEUTRAL,
            "unknown evaluation 'nothing'",
        ),
        (
            {"10b_activation_difference_lens": {"subject": "ipd-hybrid"}},
            ["ipd-hybrid"],
            NEUTRAL,
            "model 'ipd-hybrid' names no documents",
        ),
        ({"01_logit_lens": {}}, PAIR[:1], {}, "1 cells, all inputs are good"),
        ({"07_tuned_lens": {"other": ""}}, PAIR[:1], {}, "1 cells, all inputs are good"),
    ],
)
def test_check_names_what_a_notebook_lacks(tmp_path, command, notebooks, models, changes, expected):
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "mine.yaml").write_text(yaml.safe_dump(SCENARIO | changes))
    run = {"models": models, "scenarios": ["mine"], "notebooks": notebooks}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, out, said = command("check", tmp_path / "run.yaml", "--data", tmp_path)
    good = "all inputs are good" in expected
    assert code == (0 if good else 2)
    assert any(part in (out if good else said) for part in expected.split("|")), said
    assert good or len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("file", sorted((REPOSITORY / "papermill_params").glob("*.yaml")))
def test_the_shipped_runs_have_what_their_notebooks_need(command, request, file):
    if "smollm2" in file.read_text():
        request.getfixturevalue("smollm2")
    code, _, said = command("check", file)
    assert code == 0, said


def test_needs_that_nobody_knows_are_refused(tmp_path):
    study = make_study(tmp_path)
    file = study / "notebooks" / "each.ipynb"
    notebook = json.loads(file.read_text())
    notebook["metadata"]["interp_kit"] = {"needs": ["luck"]}
    file.write_text(json.dumps(notebook))
    with pytest.raises(InputError, match="needs 'luck'; expected one of comparable models"):
        needs_of(file)


# ------------------------------------------------------------------------------------- the gate
def test_the_numerics_gate_is_one():
    assert [f.stem for f in sorted(NOTEBOOKS.glob("*.ipynb")) if is_gate(f)] == ["00_numerics_gate"]


def test_a_model_that_fails_its_gate_is_analysed_nowhere(tmp_path):
    study = make_study(tmp_path)
    file = study / "notebooks" / "logged.ipynb"
    notebook = json.loads(file.read_text())
    notebook["metadata"]["interp_kit"] = {"gate": True}
    notebook["cells"][2]["source"] = "assert model != 'ipd-hybrid', 'too much noise'"
    file.write_text(json.dumps(notebook))
    # The gate comes last in the run file, and is run first all the same.
    cells = cells_of(study, {"each": {}, "all": {}, "logged": {}}, scenarios=["CC_continue"])
    states = {o.cell.id: (o.state, o.error) for o in run_cells(cells, workers=2)}
    assert states["each/tiny-gemma2/CC_continue"] == ("ok", "")
    assert result_of(cells[0]) == "tiny-gemma2"
    gate = "logged/ipd-hybrid/CC_continue"
    assert states[gate][0] == "error"
    for closed in ("each/ipd-hybrid/CC_continue", "all/all-models/all-scenarios"):
        assert states[closed] == (
            "error",
            f"not run: {gate} failed, so numbers of model 'ipd-hybrid' cannot be trusted; look "
            "there first, or leave the model out",
        )
    # Mended, the same command runs what was left out.
    notebook["cells"][2]["source"] = "pass"
    file.write_text(json.dumps(notebook))
    again = cells_of(study, {"each": {}, "all": {}, "logged": {}}, scenarios=["CC_continue"])
    states = {o.cell.id: o.state for o in run_cells(again, workers=2)}
    assert states["each/ipd-hybrid/CC_continue"] == "ok"
    assert "error" not in states.values()


# ------------------------------------------------------------------- what a run file may name
def test_one_prompt_of_unequal_length_and_whole_weights_through_the_notebooks(tmp_path, command):
    """The notebooks that patch, on a random base and its full fine-tune; one prompt, no control."""
    base = save_tiny("llama", tmp_path / "models" / "base" / "weights")
    (base.parent / "model.yaml").write_text("base: weights\n")
    tuned_copy(base, tmp_path / "models" / "tuned")
    scenario = {
        "decision": SCENARIO["decision"] | {"positive": " ba", "negative": " ku"},
        "prompts": [
            {"id": "one", "text": " ba be bi ka", "counterfactual": " ba be bi ka ke ki",
             "segments": {"start": "ba be"}}
        ],
    }  # fmt: skip
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "mine.yaml").write_text(yaml.safe_dump(scenario))
    run = {
        "models": ["base", "tuned"],
        "scenarios": ["mine"],
        "notebooks": {
            "03_activation_patching": {},
            "04_cross_model_patching": {"pairs": [["base", "tuned"]]},
            "05_circuits": {"pairs": [["tuned", "base"]], "n_random": 5},
            "06_causal_tracing": {},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    where = ["--data", tmp_path, "--outputs", tmp_path / "out", "--workers", 2]
    code, _, said = command("run", tmp_path / "run.yaml", *where)
    assert code == 0, said[-3000:]
    summaries = [json.loads(f.read_text()) for f in (tmp_path / "out").rglob("summary.json")]
    assert len(summaries) == 2 + 1 + 1 + 2
    for summary in summaries:
        mass = next(name for name in summary["answers"] if name.startswith("Does the model give"))
        assert summary["answers"][mass].startswith(("yes", "no"))
    (between,) = [s for s in summaries if any("carry" in question for question in s["answers"])
                  and any("single" in question for question in s["answers"])]  # fmt: skip
    answer = next(a for question, a in between["answers"].items() if "single" in question)
    assert answer.startswith("cannot tell")  # one prompt shows nothing


GAME = [
    {"id": f"{name}_{i}", "scenario": name, "state_self": "c", "state_opp": "d",
     "prompt": f"{name}: say action1 or action2. Round {i}. Answer: "}
    for name in ("CC_start", "DC_end") for i in range(2)
]  # fmt: skip


def test_a_file_of_game_prompts_stands_for_its_scenarios(tmp_path, command):
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "game.json").write_text(json.dumps(GAME))
    run = {"models": ["tiny-gemma2"], "notebooks": {"01_logit_lens": {}}}
    for scenarios, names in (
        (["game.json"], ["CC_start", "DC_end"]),
        ([str(tmp_path / "scenarios" / "game.json") + "#DC_end"], ["DC_end"]),
    ):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run | {"scenarios": scenarios}))
        spec = read_run(file, data=tmp_path)
        assert [load_scenario(s, data=tmp_path).name for s in spec.scenarios] == names
        code, out, said = command("check", file, "--data", tmp_path)
        assert code == 0, said
        assert f"{len(names)} cells" in out
    with pytest.raises(InputError, match=r"unknown scenario 'CC_ends?': did you mean"):
        load_scenario("game.json#CC_end", data=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_scenario("nobody.json#CC", data=tmp_path)


def test_the_seeds_own_game_file_is_named_in_a_run_file(tmp_path, shared):
    file = tmp_path / "run.yaml"
    game = str(shared / "seed_formats" / "ipd_eval_prompts.json")
    run = {"models": ["tiny-gemma2"], "scenarios": [game], "notebooks": {"01_logit_lens": {}}}
    file.write_text(yaml.safe_dump(run))
    scenarios = read_run(file).scenarios
    assert scenarios
    assert all(load_scenario(name).prompts for name in scenarios)


def test_checkpoints_are_models_in_the_order_of_their_training(tmp_path):
    study = make_study(tmp_path)
    names = [spec.name for spec in list_models() if spec.name.startswith("cubic-gravity")]
    file = study / "trial.yaml"
    run = {"models": ["tiny-gemma2"], "checkpoints": names, "scenarios": ["CC_continue"]}
    file.write_text(yaml.safe_dump(run | {"notebooks": {"90_compare_models": {}}}))
    from interp_batch.matrix import expand

    (cell,) = expand(read_run(file), outputs=study / "outputs")
    assert cell.parameters["models"] == ["tiny-gemma2", *names]
    assert cell.parameters["checkpoints"] == names
    assert training_steps(["run/step-5", "run/step-10", "run/step-400"]) == [5, 10, 400]
    assert training_steps(["a-10", "b-2"]) == [1, 2]
    assert training_steps(["first", "b-2", "c"]) == [1, 2, 3]
