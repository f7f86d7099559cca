"""Results as files that other programs read: directions, control vectors, circuits.

- ``directions.safetensors``: directions of the residual stream, one tensor [layer, d_model] each.
- ``*.gguf``: one direction as a control vector for llama.cpp (``--control-vector-scaled FILE 1``).
- ``circuits.json``: ``CircuitsFile``; and ``graph_N.json``, a circuit as an attribution graph in
  the format of circuit-tracer's viewer, which Neuronpedia's graphs share; ``graph-metadata.json``
  lists them for the viewer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFWriter
from jaxtyping import Float
from pydantic import BaseModel
from safetensors.numpy import save_file

from interp_kit.files import dump_json, replacing, write_atomically
from interp_kit.specs import InputError


class CircuitMember(BaseModel):
    """A head or MLP; ``effect``: the fraction of the effect that it recovers when moved alone."""

    component: str
    layer: int
    head: int | None = None
    effect: float


class ExportedCircuit(BaseModel):
    """Components of ``source`` that make ``target`` decide alike when they are moved together.

    The scores are fractions of the effect (``interp_kit.analyses.circuits``). ``answer`` is what
    the source answers; ``probability``, that of the target's giving it before anything is moved, of
    the two answers.
    """

    source: str
    target: str
    scenario: str
    positions: str
    answer: str
    probability: float
    faithfulness: float
    completeness: float
    minimality: float
    components: list[CircuitMember]


class CircuitsFile(BaseModel):
    """What ``circuits.json`` holds."""

    schema_version: Literal[1] = 1
    circuits: list[ExportedCircuit]


def save_directions(
    file: Path, directions: Mapping[str, Float[np.ndarray, "layer d_model"]], **about: str
) -> None:
    """Write the directions, by name, as safetensors; ``about`` becomes the file's metadata.

    Row l belongs to the residual stream after block l. Lengths are kept as they are.
    """
    tensors = {name: np.ascontiguousarray(v, np.float32) for name, v in directions.items()}
    with replacing(file) as beside:
        save_file(tensors, beside, metadata=about)


def save_control_vector(
    file: Path,
    vector: Float[np.ndarray, "d_model"],
    *,
    layer: int,
    architecture: str,
    about: str = "",
) -> None:
    """Write the vector as a GGUF control vector that llama.cpp adds after block ``layer``.

    llama.cpp adds it as it is, times a scale, at every position. ``architecture`` is a hint for
    people and programs (``llama``). Raises ``InputError`` for layer 0, which llama.cpp refuses, and
    for a vector that is not finite.
    """
    if layer < 1:
        raise InputError(
            f"a control vector's layer is 1 or more, as llama.cpp reads it; got {layer}"
        )
    if not np.isfinite(vector).all():
        raise InputError("the vector holds infinite or missing numbers; check how it was made")
    with replacing(file) as beside:
        writer = GGUFWriter(beside, "controlvector")
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_int32("controlvector.layer_count", 1)
        writer.add_description(about)
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_circuits(
    folder: Path, circuits: Sequence[ExportedCircuit], *, tokens: Sequence[str]
) -> None:
    """Write ``circuits.json``, and ``graph_1.json`` and so on, one for each circuit.

    ``tokens`` are those of a prompt on which the circuits were found; the graphs show them.
    ``graph-metadata.json`` lists the graphs: circuit-tracer's viewer opens the folder by it.
    """
    content = CircuitsFile(circuits=list(circuits)).model_dump()
    write_atomically(folder / "circuits.json", dump_json(content))
    graphs = [attribution_graph(c, tokens, slug=f"graph_{i}") for i, c in enumerate(circuits, 1)]
    for graph in graphs:  # the viewer finds a graph's file by its slug
        write_atomically(folder / f"{graph['metadata']['slug']}.json", dump_json(graph))
    listed = {"graphs": [graph["metadata"] for graph in graphs]}
    write_atomically(folder / "graph-metadata.json", dump_json(listed))


def attribution_graph(
    circuit: ExportedCircuit, tokens: Sequence[str], *, slug: str
) -> dict[str, Any]:
    """The circuit in the format of circuit-tracer: a node for each component, linked to the answer.

    A link's weight is the component's effect alone. Links between components are not measured, so
    there are none. Components stand at the last token. ``influence`` is what the format means by
    it, a cumulative share: of the effects' sizes, in this component and all stronger ones.
    """
    last, shown = len(tokens) - 1, [_visible(token) for token in tokens]
    nodes = [_node("E", i, at=i, kind="embedding", name=token) for i, token in enumerate(shown)]
    shares = _cumulative_shares([member.effect for member in circuit.components])
    members = [
        _node(
            member.layer,
            -1 if member.head is None else member.head,  # the format's number of what has none
            at=last,
            kind="mlp" if member.head is None else "attention head",
            name=member.component,
        )
        | {"influence": share}
        for member, share in zip(circuit.components, shares)
    ]
    answer = _answer(circuit, at=last)
    links = [
        {"source": node["node_id"], "target": answer["node_id"], "weight": member.effect}
        for node, member in zip(members, circuit.components)
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.target,
            "title_prefix": f"{circuit.source} -> {circuit.target}, {circuit.scenario}:",
            "transcoder_list": [],
            "prompt_tokens": shown,
            "prompt": "".join(shown),
            "node_threshold": 1.0,  # shows all; the viewers' slider then prunes by influence
        },
        "qParams": {
            "pinnedIds": [node["node_id"] for node in [*members, answer]],
            "supernodes": [],
            "linkType": "both",
            "clickedId": answer["node_id"],
            "sg_pos": "",
        },
        "nodes": [*nodes, *members, answer],
        "links": links,
    }


# ------------------------------------------------------------------------------------- internals
def _answer(circuit: ExportedCircuit, *, at: int) -> dict[str, Any]:
    """The node of what the source answers.

    The viewers read its token between the quotes and its probability after ``(p=``, and fail
    without the latter.
    """
    token = _visible(circuit.answer).replace('"', "'")
    layer = max((member.layer for member in circuit.components), default=0) + 1
    name = f'Output "{token}" (p={circuit.probability:.3f})'
    more = {"is_target_logit": True, "token_prob": circuit.probability}
    return _node(layer, 0, at=at, kind="logit", name=name) | more


def _node(layer: int | str, feature: int, *, at: int, kind: str, name: str) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{feature}_{at}",
        "jsNodeId": f"{layer}_{feature}-{at}",
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": at,
        "reverse_ctx_idx": 0,
        "run_idx": 0,
        "feature_type": kind,
        "is_target_logit": False,
        "token_prob": 0.0,
        "clerp": name,
    }


def _cumulative_shares(effects: Sequence[float]) -> list[float]:
    sizes = np.abs(np.array(effects, dtype=float))
    order = np.argsort(-sizes, kind="stable")
    shares = np.empty_like(sizes)
    shares[order] = np.cumsum(sizes[order]) / (sizes.sum() or 1.0)
    return np.minimum(shares, 1.0).tolist()  # rounding would prune the last one


def _visible(token: str) -> str:
    """The token on one line, in the characters that circuit-tracer writes for white space."""
    return token.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")
