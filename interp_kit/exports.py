"""Results as files that other programs read: directions, control vectors, circuits.

- ``directions.safetensors``: directions of the residual stream, one tensor [layer, d_model] each.
- ``*.gguf``: one direction as a control vector for llama.cpp (``--control-vector-scaled FILE 1``).
- ``circuits.json``: ``CircuitsFile``; and ``graph_N.json``, a circuit as an attribution graph in
  the format of circuit-tracer's viewer, which Neuronpedia's graphs share.
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

    The scores are fractions of the effect (``interp_kit.analyses.circuits``).
    """

    source: str
    target: str
    scenario: str
    positions: str
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
    """
    content = CircuitsFile(circuits=list(circuits)).model_dump()
    write_atomically(folder / "circuits.json", dump_json(content))
    for i, circuit in enumerate(circuits, 1):
        graph = attribution_graph(circuit, tokens)
        write_atomically(folder / f"graph_{i}.json", dump_json(graph))


def attribution_graph(circuit: ExportedCircuit, tokens: Sequence[str]) -> dict[str, Any]:
    """The circuit in the format of circuit-tracer: a node for each component, linked to the answer.

    A link's weight is the component's effect alone. Links between components are not measured, so
    there are none. Components stand at the last token.
    """
    last = len(tokens) - 1
    answer = f"{max((m.layer for m in circuit.components), default=0) + 1}_0_{last}"

    def node(member: CircuitMember) -> dict[str, Any]:
        unit = -1 if member.head is None else member.head
        return _node(
            f"{member.layer}_{unit}_{last}",
            feature=unit,
            layer=member.layer,
            at=last,
            kind="mlp" if member.head is None else "attention head",
            name=member.component,
        ) | {"influence": member.effect}

    nodes = [node(member) for member in circuit.components]
    given = [
        _node(f"E_{i}_{i}", feature=i, layer="E", at=i, kind="embedding", name=token)
        for i, token in enumerate(tokens)
    ]
    name = f"decision of {circuit.target}, towards {circuit.source}"
    target = _node(answer, feature=0, layer=answer.split("_")[0], at=last, kind="logit", name=name)
    return {
        "metadata": {
            "slug": f"{circuit.source}-{circuit.target}-{circuit.scenario}",
            "scan": circuit.target,
            "transcoder_list": [],
            "prompt_tokens": list(tokens),
            "prompt": "".join(tokens),
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [each["node_id"] for each in nodes],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [*given, *nodes, target | {"is_target_logit": True}],
        "links": [
            {"source": each["node_id"], "target": answer, "weight": each["influence"]}
            for each in nodes
        ],
    }


# ------------------------------------------------------------------------------------- internals
def _node(
    id: str, *, feature: int, layer: int | str, at: int, kind: str, name: str
) -> dict[str, Any]:
    return {
        "node_id": id,
        "jsNodeId": id,
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": at,
        "feature_type": kind,
        "clerp": name,
    }
