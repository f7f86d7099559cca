"""Transformers compiled from programs: which nodes do something is known by construction.

``compile_programs`` made them; here they are run, twice. A native bridge is what methods are scored
on. ``logits`` is a plain forward pass in numpy, with any node's output replaced: what an
intervention on one node at a time can see at all, is what moves the answer there. A node may be
live and yet constant on these inputs, so that zeroing it breaks the program while its mean, or
another input's value, changes nothing: each intervention has its own truth.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.numpy import load_file
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.prompts import Prompt

FOLDER = Path(__file__).parent / "programs"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
PROMPTS = 24
SEEN = 1e-3  # a change of the answer, in logits, above the rounding of the compiled weights

Intervention = Literal["zero", "mean", "resample"]
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program, and inputs each with another one whose answer differs.

    ``outputs`` is what the program itself gives at the last position of each prompt, and
    ``answers`` are its possible words; none for a program that gives a number.
    """

    name: str
    cfg: dict[str, Any]
    weights: Weights
    bridge: TransformerBridge
    prompts: list[Prompt]
    outputs: list[str]
    answers: list[str]

    @property
    def inputs(self) -> tuple[list[list[int]], list[str]]:
        """All inputs that the program was run on, and what it gave at the last position."""
        described = json.loads((FOLDER / f"{self.name}.json").read_text(encoding="utf-8"))
        return described["inputs"], described["outputs"]

    @property
    def nodes(self) -> list[str]:
        layers, heads = range(self.cfg["n_layers"]), range(self.cfg["n_heads"])
        return [*(f"L{i}H{h}" for i in layers for h in heads), *(f"L{i}_MLP" for i in layers)]

    @property
    def live(self) -> set[str]:
        """The nodes that were compiled to write anything."""
        found = set()
        for layer in range(self.cfg["n_layers"]):
            here = f"blocks.{layer}"
            for head, weight in enumerate(self.weights[f"{here}.attn.W_O"]):
                found |= {f"L{layer}H{head}"} if weight.any() else set()
            written = (
                self.weights[f"{here}.mlp.W_out"].any() or self.weights[f"{here}.mlp.b_out"].any()
            )
            found |= {f"L{layer}_MLP"} if written else set()
        return found


@cache
def load_program(name: str) -> Program:
    described = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    weights, cfg = load_file(FOLDER / f"{name}.safetensors"), described["cfg"]
    labels = [label.split(":")[-1] for label in described["answers"]]
    answers = labels if len(labels) > 1 else []
    prompts, outputs = _prompts(described["inputs"], described["outputs"], answers)
    return Program(
        name=name,
        cfg=cfg,
        weights=weights,
        bridge=native_bridge(cfg, weights),
        prompts=prompts,
        outputs=outputs,
        answers=answers,
    )


def native_bridge(cfg: dict[str, Any], weights: Weights) -> TransformerBridge:
    """A bridge of TransformerLens' own modules; weights are named as TransformerLens names them."""
    bridge = TransformerBridge.boot_native(cfg)
    state = {key: torch.tensor(value) for key, value in weights.items()}
    own = {
        "tok_embed.weight": state["embed.W_E"],
        "pos.weight": state["pos_embed.W_pos"],
        "head.weight": state["unembed.W_U"].T,
    }
    for layer in range(cfg["n_layers"]):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        for name in "QKV":
            weight = state[f"{theirs}.attn.W_{name}"]
            own[f"{ours}.attn.{name.lower()}.weight"] = rearrange(weight, "head m d -> (head d) m")
            own[f"{ours}.attn.{name.lower()}.bias"] = state[f"{theirs}.attn.b_{name}"].flatten()
        output = rearrange(state[f"{theirs}.attn.W_O"], "head d m -> m (head d)")
        own[f"{ours}.attn.o.weight"] = output
        own[f"{ours}.attn.o.bias"] = state[f"{theirs}.attn.b_O"]
        for name, part in (("in", "fc_in"), ("out", "fc_out")):
            own[f"{ours}.mlp.{part}.weight"] = state[f"{theirs}.mlp.W_{name}"].T
            own[f"{ours}.mlp.{part}.bias"] = state[f"{theirs}.mlp.b_{name}"]
    with torch.no_grad():
        for name, parameter in bridge.original_model.named_parameters():
            parameter.copy_(own[name.replace("._original_component", "")])
    bridge.requires_grad_(False)
    return bridge


def logits(
    program: Program,
    tokens: Sequence[int],
    replaced: Mapping[str, Float[np.ndarray, "pos _"]] | None = None,
    *,
    outputs: dict[str, Float[np.ndarray, "pos _"]] | None = None,
) -> Float[np.ndarray, "answer"]:
    """At the last position, with nodes' outputs replaced; ``outputs`` collects what nodes gave.

    A head's output is its z, before the output projection; an MLP's is what it adds to the stream.
    """
    weights, given = program.weights, {} if outputs is None else outputs
    instead: dict[str, Any] = dict(replaced or {})
    stream = weights["embed.W_E"][list(tokens)] + weights["pos_embed.W_pos"][: len(tokens)]
    for layer in range(program.cfg["n_layers"]):
        here, added = f"blocks.{layer}", np.zeros_like(stream)
        for head in range(program.cfg["n_heads"]):
            q, k, v = (
                stream @ weights[f"{here}.attn.W_{x}"][head] + weights[f"{here}.attn.b_{x}"][head]
                for x in "QKV"
            )
            scores = q @ k.T / np.sqrt(program.cfg["d_head"])
            if program.cfg["attention_dir"] == "causal":
                scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
            pattern = np.exp(scores - scores.max(-1, keepdims=True))
            z = pattern / pattern.sum(-1, keepdims=True) @ v
            node = f"L{layer}H{head}"
            given[node] = instead.get(node, z)
            added = added + given[node] @ weights[f"{here}.attn.W_O"][head]
        stream = stream + added + weights[f"{here}.attn.b_O"]
        hidden = stream @ weights[f"{here}.mlp.W_in"] + weights[f"{here}.mlp.b_in"]
        written = hidden.clip(0) @ weights[f"{here}.mlp.W_out"] + weights[f"{here}.mlp.b_out"]
        node = f"L{layer}_MLP"
        given[node] = instead.get(node, written)
        stream = stream + given[node]
    return (stream @ weights["unembed.W_U"])[-1]


@cache
def effects(name: str, intervention: Intervention) -> dict[str, float]:
    """By node, the largest change of any prompt's decision, one node replaced at a time."""
    program = load_program(name)
    asked = program.prompts
    runs = [_run(program, p.tokens) for p in asked]
    others = [_run(program, p.counterfactual or p.tokens) for p in asked]
    largest = dict.fromkeys(program.nodes, 0.0)
    for node in program.nodes:
        mean = np.concatenate([run[node][1:] for run in runs]).mean(0)
        for prompt, own, other in zip(asked, runs, others):
            instead = {
                "zero": np.zeros_like(own[node]),
                "mean": np.broadcast_to(mean, own[node].shape),
                "resample": other[node],
            }[intervention]
            change = _decision(prompt, logits(program, prompt.tokens, {node: instead}))
            change -= _decision(prompt, logits(program, prompt.tokens))
            largest[node] = max(largest[node], abs(float(change)))
    return largest


def seen(name: str, intervention: Intervention) -> set[str]:
    """The nodes on which the intervention moves an answer: its truth."""
    return {node for node, change in effects(name, intervention).items() if change > SEEN}


# ------------------------------------------------------------------------------------- internals
def _prompts(
    inputs: Sequence[Sequence[int]], outputs: Sequence[str], answers: list[str]
) -> tuple[list[Prompt], list[str]]:
    """Inputs in turn with the next one whose answer is another."""
    prompts, given = [], []
    for i, row in enumerate(inputs):
        other = next((j for j in _after(i, len(inputs)) if outputs[j] != outputs[i]), None)
        if other is None or len(prompts) == PROMPTS:
            continue
        ids = [answers.index(outputs[k]) for k in (i, other)] if answers else [0, 1]
        prompts.append(
            Prompt(
                id=str(i),
                text="",
                tokens=tuple(row),
                positive=(ids[0],),
                negative=(ids[1],),
                counterfactual=tuple(inputs[other]),
            )
        )
        given.append(outputs[i])
    return prompts, given


def _after(i: int, n: int) -> list[int]:
    return [*range(i + 1, n), *range(i)]


def _run(program: Program, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    logits(program, tokens, outputs=outputs)
    return outputs


def _decision(prompt: Prompt, of: Float[np.ndarray, "answer"]) -> float:
    return float(of[prompt.positive[0]] - of[prompt.negative[0]])
