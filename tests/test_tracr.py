"""Transformers compiled from programs by Tracr: their circuits are known by construction."""

import json

import numpy as np
import pytest
import torch
from einops import rearrange
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.analyses.activation_patching import ablation, activation_patching
from interp_kit.prompts import Prompt

PROGRAMS = ["tracr_reverse", "tracr_hist"]


def load_tracr(folder):
    """The compiled program as a native bridge, checked against its own logits."""
    cfg = json.loads((folder / "cfg.json").read_text())
    state = torch.load(folder / "state.pt", weights_only=True)
    bridge = TransformerBridge.boot_native(cfg)
    weights = {
        "tok_embed.weight": state["embed.W_E"],
        "pos.weight": state["pos_embed.W_pos"],
        "head.weight": state["unembed.W_U"].T,
    }
    for layer in range(cfg["n_layers"]):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        for name in "QKV":
            weight = rearrange(
                state[f"{theirs}.attn.W_{name}"], "head d_model d -> (head d) d_model"
            )
            weights[f"{ours}.attn.{name.lower()}.weight"] = weight
            weights[f"{ours}.attn.{name.lower()}.bias"] = state[f"{theirs}.attn.b_{name}"].flatten()
        output = rearrange(state[f"{theirs}.attn.W_O"], "head d d_model -> d_model (head d)")
        weights[f"{ours}.attn.o.weight"] = output
        weights[f"{ours}.attn.o.bias"] = state[f"{theirs}.attn.b_O"]
        for name, part in (("in", "fc_in"), ("out", "fc_out")):
            weights[f"{ours}.mlp.{part}.weight"] = state[f"{theirs}.mlp.W_{name}"].T
            weights[f"{ours}.mlp.{part}.bias"] = state[f"{theirs}.mlp.b_{name}"]
    with torch.no_grad():
        for name, parameter in bridge.original_model.named_parameters():
            parameter.copy_(weights[name.replace("._original_component", "")])
    evaluation = np.load(folder / "eval.npz", allow_pickle=False)
    bridge.requires_grad_(False)
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
