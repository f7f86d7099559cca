"""Rows in passes: batches of one length, padded ones, and beginnings that are computed once."""

from contextlib import nullcontext

import pytest
import torch

from interp_kit import batching, identity
from interp_kit.analyses import weights
from interp_kit.analyses.weights import layer_swap, nested_layer_swap
from interp_kit.batching import (
    MAX_TOKENS,
    PADDED_ROWS,
    batches,
    padded_batches,
    parts,
    shared_beginnings,
)
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.decisions import continuation_log_probs, decide
from interp_kit.loading import load_model
from interp_kit.passes import last_names, last_residuals, read_last, resumed, shared_passes
from interp_kit.patching.recording import recorded
from interp_kit.pretrained import load_huggingface
from interp_kit.prompts import encode_scenario
from tests.conftest import tiny_prompts
from tests.tiny import ARCHITECTURES

STEM = tuple(range(20, 50))  # longer than the sliding windows of the tiny models


def rows_of(*tails):
    return [(*STEM, *tail) for tail in tails]


def test_batches_cover_every_item_once_and_never_mix_shapes():
    shapes = [(5, "a"), (7, "a"), (5, "a"), (5, "b"), (9000, "a"), (9000, "a")]
    found = list(batches(shapes))
    assert sorted(i for batch in found for i in batch) == list(range(len(shapes)))
    assert all(len({shapes[i] for i in batch}) == 1 for batch in found)
    assert [4] in found
    assert [5] in found


def test_padded_batches_hold_every_row_once_and_pad_little():
    lengths = [5, 90, 7, 6000, 40, 41, 5000, 22, 1, *[12] * 70]
    found = list(padded_batches([range(n) for n in lengths]))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[i] for i in batch]
        assert len(own) <= PADDED_ROWS
        assert len(own) == 1 or max(own) * len(own) <= MAX_TOKENS
        assert max(own) <= 1.25 * min(own) + 16


# ----------------------------------------------------------------------------------- beginnings
def test_rows_stand_together_where_most_tokens_are_spared():
    rows = [
        (1, 2, 3, 4, 5, 6, 7),
        (9, 9, 9, 9, 9, 9),
        (1, 2, 3, 4, 5, 8, 8),
        (1, 2, 3, 4, 5, 6, 9),
        (1, 7, 7, 7, 7, 7, 7),
        (9, 9, 9, 9, 9, 8, 1),
    ]
    found = shared_beginnings(rows, [len(row) - 1 for row in rows], 0)
    assert {(frozenset(index), length) for index, length in found} == {
        (frozenset({0, 2, 3}), 5),
        (frozenset({1, 5}), 5),
    }


def test_a_beginning_ends_before_what_is_read():
    same = [(1, 2, 3, 4, 5)] * 3
    assert shared_beginnings(same, [2, 4, 4], 0) == [([0, 1, 2], 2)]
    assert shared_beginnings(same, [0, 0, 0], 0) == []


def test_what_spares_less_than_it_costs_is_not_apart():
    rows = [(1, 2, 3, 4), (1, 2, 3, 5)]
    assert shared_beginnings(rows, [3, 3], 1) == [([0, 1], 3)]
    assert shared_beginnings(rows, [3, 3], 2) == []


@pytest.fixture
def without_beginnings(monkeypatch):
    """Inside, every row is computed as a whole."""

    def whole(compute):
        with monkeypatch.context() as patched:
            patched.setattr(batching, "resumable", lambda bridge: False)
            return compute()

    return whole


@pytest.fixture
def eager(monkeypatch):
    """Beginnings of tiny models are worth a pass."""
    monkeypatch.setattr(batching, "CALL_FLOPS", {"cpu": 0})


@pytest.mark.usefixtures("eager")
def test_rows_with_a_shared_beginning_are_computed_as_whole_ones(tiny_bridge, without_beginnings):
    rows = rows_of((3, 4, 5), (3, 4, 6, 7, 8), (9,), (11, 12)) + [(5, 6, 7), (5, 8)]
    found = list(parts(tiny_bridge, rows, read=[1] * len(rows)))
    assert sorted(i for part in found for i in part.index) == list(range(len(rows)))
    assert sum(bool(part.before) for part in found) >= 1
    asked = [(row, said) for row in rows for said in ((4, 5), (4, 6), (7,))]
    together = continuation_log_probs(tiny_bridge, asked)
    torch.testing.assert_close(
        together,
        without_beginnings(lambda: continuation_log_probs(tiny_bridge, asked)),
        rtol=1e-5,
        atol=2e-5,
    )
    torch.testing.assert_close(
        last_residuals(tiny_bridge, rows),
        without_beginnings(lambda: last_residuals(tiny_bridge, rows)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_with_a_shared_beginning_are_what_hugging_face_computes(architecture, tiny_folders):
    folder = str(tiny_folders[architecture])
    bridge = load_model(folder, device="cpu")
    reference = load_huggingface(find_model(folder), device="cpu")
    rows = rows_of((3, 4, 5), (3, 4, 6, 7, 8), (9,))
    assert any(part.before for part in parts(bridge, rows, read=[1] * len(rows)))
    found = continuation_log_probs(bridge, [(row, (4,)) for row in rows])
    for row, log_p in zip(rows, found, strict=True):
        plain = reference(torch.tensor([row])).logits[0, -1].log_softmax(-1)[4]
        assert float(log_p) == pytest.approx(float(plain), abs=2e-5)


@pytest.mark.usefixtures("eager")
def test_what_is_read_at_last_positions_is_that_of_whole_rows(tiny_bridge, without_beginnings):
    tokens = torch.tensor(rows_of((3, 4, 5), (6, 7, 8), (3, 4, 9)))
    tokens = torch.cat([tokens, tokens.flip(1)])[[0, 3, 1, 4, 2]]
    names = last_names(tiny_bridge)
    whole = without_beginnings(lambda: read_last(tiny_bridge, tokens.tolist(), names, 2))
    for name, found in read_last(tiny_bridge, tokens.tolist(), names, 2).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("eager")
def test_a_hook_may_treat_positions_differently_so_rows_are_whole(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)

    def first_position(x, hook):
        x = x.clone()
        x[:, 0] += 3.0
        return x

    alone = []
    with tiny_bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", first_position)]):
        rows = [p.tokens for p in prompts]
        assert not any(part.before for part in parts(tiny_bridge, rows, read=[1] * len(rows)))
        together = decide(tiny_bridge, prompts).value.tolist()
        for prompt in prompts:
            alone += decide(tiny_bridge, [prompt]).value.tolist()
    assert together == pytest.approx(alone, abs=2e-5)


@pytest.mark.usefixtures("eager")
def test_a_recording_begins_as_the_one_most_like_it(tiny_bridge):
    first, second, third = rows_of((3, 4, 5), (3, 4, 6), (8, 9))
    places = [("attn_out", 0), ("mlp_out", tiny_bridge.cfg.n_layers - 1), ("z", 1)]
    alone = recorded(tiny_bridge, third, places)
    with shared_passes():
        begun = [recorded(tiny_bridge, row, places) for row in (first, second)]
        found = recorded(tiny_bridge, third, places)
    for place in places:
        whole = alone.activations[place]
        torch.testing.assert_close(found.activations[place], whole, rtol=1e-4, atol=1e-4)
        shared = begun[1].activations[place][: len(STEM)]
        assert torch.equal(found.activations[place][: len(STEM)], shared)
    torch.testing.assert_close(found.logits, alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("eager")
def test_rows_resume_behind_the_beginning_that_is_theirs(tiny_bridge, without_beginnings):
    """The same ends after two beginnings of one length: what enters the first block is the same."""
    ends = [(3, 4), (3, 5), (6, 7)]
    rows = [(*stem, *end) for stem in (STEM, STEM[::-1]) for end in ends]
    assert sum(bool(part.before) for part in parts(tiny_bridge, rows, read=[1] * 6)) == 2
    asked = [(row, (8,)) for row in rows]
    whole = without_beginnings(lambda: continuation_log_probs(tiny_bridge, asked))
    kept = {}
    for layer in range(-2, tiny_bridge.cfg.n_layers):
        with resumed(tiny_bridge, layer, kept=kept):
            for _ in range(2):
                found = continuation_log_probs(tiny_bridge, asked)
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=2e-5)


def test_a_layer_swap_computes_no_block_below_the_layer_again(organisms, monkeypatch):
    source, target = "ipd-strategic", "ipd-utilitarian"
    scenario = load_scenario("CC_temptation")
    prompts = encode_scenario(organisms.switch(target), scenario)
    ran = []
    bridge = organisms.switch(target)
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args, at=at: ran.append(at))
        for at, block in enumerate(bridge.blocks)
    ]
    monkeypatch.setattr(identity._Watched, "_disturbed", lambda self: False)  # these only count
    swapped = layer_swap(organisms, source, target, prompts)
    nested = nested_layer_swap(organisms, source, target, prompts, order=[6, 5, 0, 3])
    few = ran.count(0)
    ran.clear()
    monkeypatch.setattr(weights, "resumed", lambda *given, **named: nullcontext())
    plain = layer_swap(organisms, source, target, prompts)
    one_by_one = nested_layer_swap(organisms, source, target, prompts, order=[6, 5, 0, 3])
    for handle in handles:
        handle.remove()
    assert swapped.value.tolist() == pytest.approx(plain.value.tolist(), abs=2e-5)
    assert nested.decision.tolist() == pytest.approx(one_by_one.decision.tolist(), abs=2e-5)
    assert swapped.change.abs().max() > 0.1
    assert ran.count(0) >= len(bridge.blocks) + 5
    # Without exchange, exchanged alone, to begin the others; then as nested sets hold it or not.
    assert few <= 3 + 2 + 4
