"""Files for other programs: read back by their own readers, and bad input refused."""

import json

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

from interp_kit.exports import (
    CircuitMember,
    CircuitsFile,
    ExportedCircuit,
    attribution_graph,
    save_control_vector,
    save_directions,
    write_circuits,
)
from interp_kit.specs import InputError

RNG = np.random.default_rng(0)
CIRCUIT = ExportedCircuit(
    source="strategic",
    target="base",
    scenario="trust",
    positions="decision",
    faithfulness=0.9,
    completeness=0.8,
    minimality=0.1,
    components=[
        CircuitMember(component="L2H3", layer=2, head=3, effect=0.5),
        CircuitMember(component="L4_MLP", layer=4, effect=0.4),
    ],
)


def test_directions_are_read_back_as_they_were(tmp_path):
    given = {"difference": RNG.normal(size=(3, 8)), "probe": RNG.normal(size=(3, 8))}
    save_directions(tmp_path / "directions.safetensors", given, model="mine")
    read = load_file(tmp_path / "directions.safetensors")
    assert set(read) == set(given)
    for name, value in given.items():
        np.testing.assert_array_equal(read[name], value.astype(np.float32))


def test_a_control_vector_has_what_llama_cpp_asks_for(tmp_path):
    vector = RNG.normal(size=16)
    save_control_vector(tmp_path / "v.gguf", vector, layer=5, architecture="llama", about="a dose")
    read = GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 1
    (tensor,) = read.tensors
    assert (tensor.name, tensor.tensor_type.name) == ("direction.5", "F32")
    np.testing.assert_array_equal(tensor.data, vector.astype(np.float32))


@pytest.mark.parametrize(
    ("vector", "layer", "expected"),
    [(np.ones(4), 0, "1 or more"), (np.array([1.0, np.nan]), 2, "missing numbers")],
)
def test_a_vector_that_no_program_could_use_is_not_written(tmp_path, vector, layer, expected):
    with pytest.raises(InputError, match=expected):
        save_control_vector(tmp_path / "v.gguf", vector, layer=layer, architecture="llama")
    assert list(tmp_path.iterdir()) == []


def test_circuits_are_written_with_a_graph_each(tmp_path):
    write_circuits(tmp_path, [CIRCUIT], tokens=["Can", " he"])
    read = CircuitsFile.model_validate_json((tmp_path / "circuits.json").read_text())
    assert read.circuits == [CIRCUIT]
    graph = json.loads((tmp_path / "graph_1.json").read_text())
    assert graph == attribution_graph(CIRCUIT, ["Can", " he"])


def test_a_graph_links_every_component_to_the_answer():
    graph = attribution_graph(CIRCUIT, ["Can", " he"])
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])  # no two alike
    (answer,) = [id for id, node in nodes.items() if node["feature_type"] == "logit"]
    assert {(nodes[x["source"]]["clerp"], x["weight"]) for x in graph["links"]} == {
        ("L2H3", 0.5),
        ("L4_MLP", 0.4),
    }
    assert all(link["target"] == answer for link in graph["links"])
    # What circuit-tracer's viewer requires of a node (frontend/graph_models.py).
    needed = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId"}
    assert all(needed <= set(node) for node in nodes.values())
