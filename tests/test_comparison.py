"""Models side by side: the depth at which three techniques place a decision."""

import pandas as pd

from interp_kit.analyses.causal_tracing import trace_summary
from interp_kit.analyses.comparison import across, where_decided
from interp_kit.analyses.lens import logit_lens
from interp_kit.catalogue import load_scenario
from interp_kit.decisions import decide
from interp_kit.loading import load_models


def rows(model, values, first_layer=0, **more):
    return [
        {"model": model, "prompt": "p", "group": "", "layer": first_layer + i, "value": v} | more
        for i, v in enumerate(values)
    ]


def test_each_technique_places_the_decision_where_it_was_planted():
    lens = pd.DataFrame(
        # -1 is the embedding; of 4 blocks the third is the first to keep half of the decision.
        rows("deep", [9.0, 3.0, 0.1, 1.0, 2.0], first_layer=-1)
        + rows("shallow", [0.0, -1.1, -2.0], first_layer=-1)
    )
    layers = pd.DataFrame(rows("deep", [0.0, 5.0, 1.0, 1.0]) + rows("shallow", [0.1, 0.2]))
    places = {"direction": "noise", "site": "block", "pos": -1, "segment": "", "baseline": 0.0}
    changes = [0.0, 0.1, 0.2, -3.0]
    traces = pd.DataFrame(rows("deep", changes, **places)).assign(change=changes)
    found = where_decided(lens, trace_summary(traces), layers).set_index("model")
    assert found.loc["deep", ["lens", "trace", "attribution"]].tolist() == [3 / 4, 1, 2 / 4]
    assert found.loc["shallow", ["lens", "attribution"]].tolist() == [1 / 2, 1]
    assert pd.isna(found.trace["shallow"])


def test_analyses_across_models_are_those_of_each_alone(tiny_folders):
    models = load_models([str(tiny_folders[a]) for a in ("llama", "gpt2")], device="cpu")
    scenario = load_scenario("CC_continue")
    scenario = scenario.model_copy(
        update={
            "prompts": [
                p.model_copy(update={"text": " ba be bi", "segments": {}, "counterfactual": None})
                for p in scenario.prompts[:1]
            ]
        }
    )
    decisions, lens = across(models, [scenario], decide, logit_lens)
    assert len(decisions) == 2
    assert set(lens.depth) == {0, 1 / 3, 2 / 3, 1}
    last = lens[lens.depth == 1].value.to_numpy()
    assert abs(last - decisions.value.to_numpy()).max() <= 1e-4
