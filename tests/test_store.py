"""Activations on disk: found ones are the computed ones, and nothing damaged is read as good."""

import os

import pytest
import torch

from interp_kit import store
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.comparison import across
from interp_kit.analyses.lens import logit_lens
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.hub import weights_hash
from interp_kit.passes import last_residuals, read_last, residuals, shared_passes
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder that keeps activations."""
    folder = tmp_path / "kept"
    monkeypatch.setenv(store.FOLDER, str(folder))
    return folder


@pytest.fixture
def spec(request, tiny_folders):
    """The spec of ``tiny_bridge``."""
    return find_model(str(tiny_folders[request.node.callspec.params["tiny_bridge"]]))


def rows_of(bridge) -> list[tuple[int, ...]]:
    return [p.tokens for p in tiny_prompts(bridge)]


def no_pass(*_, **__):
    raise AssertionError("a forward pass was run")


def three_analyses(bridge, prompts):
    return (
        logit_lens(bridge, prompts),
        direct_logit_attribution(bridge, prompts),
        residuals(bridge, prompts),
    )


def equal(ours, theirs) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a.equals(b)
        for a, b in zip(ours, theirs, strict=True)
    )


# --------------------------------------------------------------------------------- the same numbers
def test_found_passes_give_the_computed_numbers(tiny_bridge, spec, kept, monkeypatch):
    prompts = tiny_prompts(tiny_bridge)
    prompts = [p for p in prompts if len(p.positive) == len(p.negative) == 1]
    computed = three_analyses(tiny_bridge, prompts)
    with shared_passes(spec):
        first = three_analyses(tiny_bridge, prompts)
    files = {file: file.stat().st_size for file in kept.iterdir()}
    assert len(files) == len({len(p.tokens) for p in prompts})
    monkeypatch.setattr(tiny_bridge, "run_with_hooks", no_pass)
    with shared_passes(spec):
        found = three_analyses(tiny_bridge, prompts)
    assert equal(first, computed)
    assert equal(found, computed)
    assert {file: file.stat().st_size for file in kept.iterdir()} == files


def test_a_pass_that_was_read_less_far_is_run_again(tiny_bridge, spec, kept):
    tokens, name = torch.tensor(rows_of(tiny_bridge)[:1]), "blocks.1.hook_resid_post"
    alone = read_last(tiny_bridge, tokens, [name], 3)[name]
    for read in (1, 3, 2):
        with shared_passes(spec):
            assert torch.equal(read_last(tiny_bridge, tokens, [name], read)[name], alone[:, -read:])
    (file,) = kept.iterdir()
    found = store.find(file.stem)
    assert found is not None
    assert found[name].shape[1] == 3


def test_found_rows_are_the_computed_ones(tiny_bridge, spec, kept, monkeypatch):
    rows = rows_of(tiny_bridge)
    fresh = residuals(tiny_bridge, tiny_prompts(tiny_bridge))
    assert torch.equal(last_residuals(tiny_bridge, rows, model=spec), fresh)
    for others in (rows[:2], rows[::-1]):
        last_residuals(tiny_bridge, others, model=spec)
    assert len(list(kept.iterdir())) == 3
    monkeypatch.setattr(tiny_bridge, "run_with_hooks", no_pass)
    assert torch.equal(last_residuals(tiny_bridge, rows, model=spec), fresh)
    with pytest.raises(AssertionError, match="a forward pass was run"):
        last_residuals(tiny_bridge, rows)  # nobody said whose they are


def test_each_fine_tune_on_one_base_has_its_own(organisms, kept, monkeypatch):
    scenario = load_scenario("CC_temptation")
    computed = across(organisms, [scenario], logit_lens, direct_logit_attribution)
    for name in organisms:
        monkeypatch.setattr(organisms.switch(name), "run_with_hooks", no_pass)
    found = across(organisms, [scenario], logit_lens, direct_logit_attribution)
    assert all(a.equals(b) for a, b in zip(found, computed, strict=True))
    assert found[0].groupby("model", sort=False).value.sum().nunique() == len(list(organisms))


def test_nothing_is_kept_unless_a_folder_is_named(tiny_bridge, spec, tmp_path, monkeypatch):
    monkeypatch.delenv(store.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "weights_hash", no_pass)  # nor is anything hashed
    last_residuals(tiny_bridge, rows_of(tiny_bridge), model=spec)
    with shared_passes(spec):
        logit_lens(tiny_bridge, tiny_prompts(tiny_bridge))
    assert list(tmp_path.iterdir()) == []


def test_passes_of_another_model_inside_are_that_models(organisms, kept, monkeypatch):
    """Else they would be kept under the outer one's name."""
    scenario = load_scenario("CC_temptation")
    with shared_passes(organisms.specs["tiny-gemma2"]):
        (outer,) = across(organisms, [scenario], logit_lens)
    for name in organisms:
        monkeypatch.setattr(organisms.switch(name), "run_with_hooks", no_pass)
    (found,) = across(organisms, [scenario], logit_lens)
    assert found.equals(outer)
    assert found.groupby("model", sort=False).value.sum().nunique() == len(list(organisms))


# -------------------------------------------------------------------------------------------- names
def test_the_identity_of_weights_is_their_files_content(tiny_folders, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_folders["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    copied = weights_hash(find_model(str(folder)))
    assert copied == weights_hash(find_model(str(tiny_folders["llama"])))
    assert copied != weights_hash(find_model(str(tiny_folders["gpt2"])))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert weights_hash(find_model(str(folder))) != copied
    assert weights_hash(find_model("org/name")) != weights_hash(find_model("org/other"))


def test_a_name_tells_apart_what_gives_other_numbers(tiny_bridge, spec, kept, monkeypatch):
    def name(**changes):
        return store.name_of(tiny_bridge, spec.model_copy(update=changes), "last", [[1, 2]])

    names = {name(), name(dtype="bfloat16"), name(quantization="8bit")}
    names.add(store.name_of(tiny_bridge, spec, "last", [[1, 3]]))
    names.add(store.name_of(tiny_bridge, spec, "all", [[1, 2]]))
    with monkeypatch.context() as patched:
        patched.setattr(store, "package_hash", lambda: "another version")
        names.add(name())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 7)
        names.add(name())
    assert len(names) == 7
    assert name() == name(name="other", title="Other")


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "empty", "another's", "renamed"])
def test_a_damaged_file_is_computed_again(organisms, kept, damage):
    bridge, model = organisms.switch("tiny-gemma2"), organisms.specs["tiny-gemma2"]
    rows = [[2, 5, 9, 4], [2, 7, 9]]
    fresh = last_residuals(bridge, rows, model=model)
    (file,) = kept.iterdir()
    intact = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(intact[: len(intact) // 2])
        case "a bit flipped":
            file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        case "empty":
            file.write_bytes(b"")
        case "another's":
            last_residuals(bridge, rows[::-1], model=model)
            (other,) = (f for f in kept.iterdir() if f != file)
            file.write_bytes(other.read_bytes())
        case _:
            file.write_bytes(intact.replace(b'"stream"', b'"strean"'))
    with pytest.warns(UserWarning, match="damaged .* computed again"):
        again = last_residuals(bridge, rows, model=model)
    assert torch.equal(again, fresh)
    assert file.read_bytes() == intact


def test_what_was_used_least_recently_goes_first(kept, monkeypatch):
    size = 100_000
    monkeypatch.setenv(store.SIZE, str(3.5 * size / 2**30))
    for hour, name in enumerate("abc"):
        store.keep(name, {"x": torch.zeros(size // 4)})
        os.utime(kept / f"{name}.safetensors", (3600 * hour, 3600 * hour))
    assert store.find("a") is not None  # used just now
    store.keep("d", {"x": torch.ones(size // 4)})
    assert {file.stem for file in kept.iterdir()} == {"a", "c", "d"}
    store.keep("too large", {"x": torch.zeros(size)})
    assert {file.stem for file in kept.iterdir()} == {"a", "c", "d"}
    assert sum(file.stat().st_size for file in kept.iterdir()) <= 3.5 * size


def test_what_a_killed_run_left_is_removed_in_its_turn(kept, monkeypatch):
    monkeypatch.setenv(store.SIZE, str(3000 / 2**30))
    kept.mkdir()
    (kept / ".half.123").write_bytes(b"x" * 2000)
    os.utime(kept / ".half.123", (0, 0))
    store.keep("a", {"x": torch.zeros(500)})
    assert [file.name for file in kept.iterdir()] == ["a.safetensors"]


def test_numbers_are_there_though_nothing_can_be_kept(organisms, kept):
    kept.write_text("a file where the folder should be")
    bridge, model = organisms.switch("tiny-gemma2"), organisms.specs["tiny-gemma2"]
    with pytest.warns(UserWarning, match="not kept"):
        found = last_residuals(bridge, [[2, 5, 9]], model=model)
    assert torch.equal(found, last_residuals(bridge, [[2, 5, 9]]))


def test_a_size_that_is_no_number_is_refused(kept, monkeypatch):
    monkeypatch.setenv(store.SIZE, "many")
    with pytest.raises(InputError, match="expected a number of GiB, got 'many'"):
        store.keep("a", {"x": torch.zeros(2)})
