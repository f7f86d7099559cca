"""Files for other programs: read back by their own readers, and bad input refused."""

import json
from collections import Counter

import numpy as np
import pytest
from gguf import GGUFReader
from pydantic import BaseModel
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
    answer='say "no"\n',
    probability=0.25,
    faithfulness=0.9,
    completeness=0.8,
    minimality=0.1,
    components=[
        CircuitMember(component="L2H3", layer=2, head=3, effect=0.5),
        CircuitMember(component="L4_MLP", layer=4, effect=0.4),
        CircuitMember(component="L4H0", layer=4, head=0, effect=-0.1),
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


class GraphMetadata(BaseModel, extra="forbid", strict=True):
    """What circuit-tracer's viewer and Neuronpedia's schema know of a graph; so the two below."""

    slug: str
    scan: str
    title_prefix: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float


class GraphNode(BaseModel, extra="forbid", strict=True):
    node_id: str
    jsNodeId: str
    feature: int
    layer: str
    ctx_idx: int
    reverse_ctx_idx: int
    run_idx: int
    feature_type: str
    is_target_logit: bool
    token_prob: float
    clerp: str
    influence: float | None = None


class GraphLink(BaseModel, extra="forbid", strict=True):
    source: str
    target: str
    weight: float


class Graph(BaseModel, extra="forbid", strict=True):
    metadata: GraphMetadata
    qParams: dict[str, str | list[str]]
    nodes: list[GraphNode]
    links: list[GraphLink]


@pytest.fixture
def graph() -> Graph:
    return Graph.model_validate(attribution_graph(CIRCUIT, ["Can", " he", "\n"], slug="graph_1"))


def test_circuits_are_written_with_a_graph_each(tmp_path, graph):
    write_circuits(tmp_path, [CIRCUIT, CIRCUIT], tokens=["Can", " he", "\n"])
    read = CircuitsFile.model_validate_json((tmp_path / "circuits.json").read_text())
    assert read.circuits == [CIRCUIT, CIRCUIT]
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [each["slug"] for each in listed] == ["graph_1", "graph_2"]
    for each in listed:  # the viewer opens SLUG.json
        own = json.loads((tmp_path / f"{each['slug']}.json").read_text())
        assert own["metadata"] == each
    first = Graph.model_validate_json((tmp_path / "graph_1.json").read_text())
    assert first == graph


def test_a_graph_links_every_component_to_the_answer(graph):
    nodes = {node.node_id: node for node in graph.nodes}
    assert len(nodes) == len(graph.nodes) == len({node.jsNodeId for node in graph.nodes})
    (answer,) = [node for node in graph.nodes if node.feature_type == "logit"]
    assert answer.is_target_logit
    assert {(nodes[x.source].clerp, nodes[x.target].clerp, x.weight) for x in graph.links} == {
        (member.component, answer.clerp, member.effect) for member in CIRCUIT.components
    }
    members = [node for node in graph.nodes if node.feature_type in ("mlp", "attention head")]
    assert int(answer.layer) == 1 + max(int(node.layer) for node in members)
    assert graph.qParams["clickedId"] == answer.node_id
    assert set(graph.qParams["pinnedIds"]) == {each.node_id for each in [*members, answer]}


def test_the_viewers_read_the_answer_and_its_probability(graph):
    """As their scripts do, which fail on a logit without ``(p=``."""
    (answer,) = [node for node in graph.nodes if node.feature_type == "logit"]
    assert answer.clerp.split('"')[1] == "say 'no'⏎"
    assert float(answer.clerp.split("(p=")[1].split(")")[0]) == answer.token_prob == 0.25


def test_every_token_has_its_place(graph):
    tokens = [node for node in graph.nodes if node.layer == "E"]
    assert [node.clerp for node in tokens] == graph.metadata.prompt_tokens == ["Can", " he", "⏎"]
    assert [node.ctx_idx for node in tokens] == [0, 1, 2]
    assert all(node.feature_type == "embedding" for node in tokens)


def test_influence_prunes_the_weakest_first(graph):
    """It grows to 1 as the viewers mean it: they keep what is at most their threshold."""
    influence = {node.clerp: node.influence for node in graph.nodes if node.influence is not None}
    assert influence == pytest.approx({"L2H3": 0.5, "L4_MLP": 0.9, "L4H0": 1.0})
    assert max(influence.values()) <= graph.metadata.node_threshold
    # No feature may stand at more than two thirds of the tokens: the viewer drops it.
    places = Counter((n.layer, n.feature, n.ctx_idx) for n in graph.nodes)
    assert max(places.values()) == 1


def test_a_circuit_without_any_effect_is_drawn_too():
    still = [m.model_copy(update={"effect": 0.0}) for m in CIRCUIT.components]
    own = attribution_graph(CIRCUIT.model_copy(update={"components": still}), ["a"], slug="s")
    assert {node.influence for node in Graph.model_validate(own).nodes} == {None, 0.0}
