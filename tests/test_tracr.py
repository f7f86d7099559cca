"""Transformers compiled from programs by Tracr: their circuits are known by construction."""

import json

import numpy as np
import pytest
import torch

from benchmarks.validity.programs import native_bridge
from interp_kit.analyses.activation_patching import ablation, activation_patching
from interp_kit.prompts import Prompt

PROGRAMS = ["tracr_reverse", "tracr_hist"]


def load_tracr(folder):
    """The compiled program as a native bridge, checked against its own logits."""
    cfg = json.loads((folder / "cfg.json").read_text())
    state = torch.load(folder / "state.pt", weights_only=True)
    bridge = native_bridge(cfg, {name: weight.numpy() for name, weight in state.items()})
    evaluation = np.load(folder / "eval.npz", allow_pickle=False)
    difference = bridge(torch.tensor(evaluation["toks"])) - torch.tensor(evaluation["logits"])
    assert float(difference.abs().max()) <= 1e-5
    return bridge, evaluation


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request, shared):
    """A bridge, prompts whose counterfactual has another label at the end, and the reference."""
    folder = shared / "toy" / request.param
    bridge, evaluation = load_tracr(folder)
    tokens, labels = evaluation["toks"], evaluation["labels"][:, -1]
    prompts = []
    for i in range(8):
        other = next(j for j in range(len(labels)) if j > i and labels[j] != labels[i])
        prompts.append(
            Prompt(
                id=str(i),
                text="",
                tokens=tuple(tokens[i].tolist()),
                positive=(int(labels[i]),),
                negative=(int(labels[other]),),
                counterfactual=tuple(tokens[other].tolist()),
            )
        )
    return bridge, prompts, json.loads((folder / "reference.json").read_text())


def circuit(reference):
    heads = {"L{}H{}".format(*name.split(".")) for name in reference["live"]["heads"]}
    return heads | {f"L{name.removeprefix('mlp')}_MLP" for name in reference["live"]["mlps"]}


def effects(table):
    return table.change.abs().groupby(table.component).max()


@pytest.mark.parametrize("positions", ["all", "each", "decision"])
def test_nothing_outside_the_circuit_has_any_effect(program, positions):
    bridge, prompts, reference = program
    effect = effects(activation_patching(bridge, prompts, positions=positions))
    outside = effect[~effect.index.isin(circuit(reference))]
    assert (outside == 0).all()  # exactly, not nearly
    assert effect.max() > 0.5  # while the circuit does move the answer


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_ablation_hits_what_the_reference_says(program, replacement):
    bridge, prompts, reference = program
    effect = effects(ablation(bridge, prompts, replacement=replacement))
    assert (effect[~effect.index.isin(circuit(reference))] == 0).all()
    for name, lost in reference[f"accuracy_delta_{replacement}_ablation"].items():
        is_mlp = name.startswith("mlp")
        component = f"L{name[3:]}_MLP" if is_mlp else "L{}H{}".format(*name.split("."))
        if lost < 0:  # accuracy was lost: the decision must have moved
            assert effect[component] > 0.5, component
