"""Activations on disk: found ones are the computed ones, and nothing damaged is read as good."""

import os
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from interp_batch import warm
from interp_kit import passes, store
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.comparison import across
from interp_kit.analyses.lens import logit_lens
from interp_kit.analyses.steering import steered
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.hub import weights_hash
from interp_kit.identity import identity_of
from interp_kit.loading import Models, load_model, load_models
from interp_kit.lora import adapted_modules
from interp_kit.passes import last_residuals, read_last, residuals, shared_passes
from interp_kit.specs import REPOSITORY, InputError
from tests.conftest import tiny_prompts
from tests.tiny import save_tiny

A, B = "ipd-strategic", "ipd-hybrid"


@pytest.fixture(scope="module")
def loaded():
    """Two fine-tunes on one base, whose adapters may be set by hand."""
    return load_models([A, B], device="cpu")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder that keeps activations."""
    folder = tmp_path / "kept"
    monkeypatch.setenv(store.FOLDER, str(folder))
    return folder


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


def both(bridge):
    """What is kept of last positions, by either way of asking."""
    rows, name = [[2, 5, 9, 4], [2, 7, 9]], "unembed.hook_out"
    with shared_passes():
        logits = read_last(bridge, rows[:1], [name], 1)[name].float()
        return last_residuals(bridge, rows), logits


def fresh(compute, *given):
    """What ``compute`` gives where nothing was kept."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(store.FOLDER, raising=False)
        patched.setattr(passes, "_shared", ContextVar("none", default=None))
        return compute(*given)


def equal(ours, theirs) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a.equals(b)
        for a, b in zip(ours, theirs, strict=True)
    )


# --------------------------------------------------------------------------------- the same numbers
def test_found_passes_give_the_computed_numbers(tiny_bridge, kept, monkeypatch):
    prompts = tiny_prompts(tiny_bridge)
    prompts = [p for p in prompts if len(p.positive) == len(p.negative) == 1]
    computed = three_analyses(tiny_bridge, prompts)
    with shared_passes():
        first = three_analyses(tiny_bridge, prompts)
    files = {file: file.stat().st_size for file in kept.iterdir()}
    assert len(files) == len({len(p.tokens) for p in prompts}) + 1  # and the residuals
    monkeypatch.setattr(tiny_bridge, "run_with_hooks", no_pass)
    with shared_passes():
        found = three_analyses(tiny_bridge, prompts)
    assert equal(first, computed)
    assert equal(found, computed)
    assert {file: file.stat().st_size for file in kept.iterdir()} == files


def test_a_pass_that_was_read_less_far_is_run_again(tiny_bridge, kept):
    tokens, name = torch.tensor(rows_of(tiny_bridge)[:1]), "blocks.1.hook_resid_post"
    alone = read_last(tiny_bridge, tokens.tolist(), [name], 3)[name]
    for read in (1, 3, 2):
        with shared_passes():
            assert torch.equal(
                read_last(tiny_bridge, tokens.tolist(), [name], read)[name], alone[:, -read:]
            )
    (file,) = kept.iterdir()
    found = store.find(file.stem)
    assert found is not None
    assert found[name].shape[1] == 3


def test_found_rows_are_the_computed_ones(tiny_bridge, kept, monkeypatch):
    rows = rows_of(tiny_bridge)
    computed = fresh(residuals, tiny_bridge, tiny_prompts(tiny_bridge))
    assert torch.equal(last_residuals(tiny_bridge, rows), computed)
    for others in (rows[:2], rows[::-1]):
        last_residuals(tiny_bridge, others)
    assert len(list(kept.iterdir())) == 3
    monkeypatch.setattr(tiny_bridge, "run_with_hooks", no_pass)
    assert torch.equal(last_residuals(tiny_bridge, rows), computed)


def test_each_fine_tune_on_one_base_has_its_own(organisms, kept, monkeypatch):
    scenario = load_scenario("CC_temptation")
    computed = across(organisms, [scenario], logit_lens, direct_logit_attribution)
    for name in organisms:
        monkeypatch.setattr(organisms.switch(name), "run_with_hooks", no_pass)
    found = across(organisms, [scenario], logit_lens, direct_logit_attribution)
    assert all(a.equals(b) for a, b in zip(found, computed, strict=True))
    assert found[0].groupby("model", sort=False).value.sum().nunique() == len(list(organisms))


def test_nothing_is_kept_unless_a_folder_is_named(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.delenv(store.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "package_hash", no_pass)  # nor is anything hashed
    last_residuals(tiny_bridge, rows_of(tiny_bridge))
    with shared_passes():
        logit_lens(tiny_bridge, tiny_prompts(tiny_bridge))
    assert list(tmp_path.iterdir()) == []


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


def test_a_name_tells_apart_what_gives_other_numbers(tiny_folders, kept, monkeypatch):
    def bridge(**changes):
        spec = find_model(str(tiny_folders["llama"])).model_copy(update=changes)
        return Models([spec], device="cpu").switch(spec.name)

    ours = bridge()

    def name():
        return store.name_of(ours, "last", [[1, 2]])

    names = {name(), store.name_of(bridge(dtype="bfloat16"), "last", [[1, 2]])}
    names.add(store.name_of(ours, "last", [[1, 3]]))
    names.add(store.name_of(ours, "all", [[1, 2]]))
    with monkeypatch.context() as patched:
        patched.setattr(store, "package_hash", lambda: "another version")
        names.add(name())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 7)
        names.add(name())
    assert len(names - {""}) == 6
    assert name() == store.name_of(bridge(name="other", label="Other"), "last", [[1, 2]])


# ------------------------------------------------------------------- whose activations they are
def forget(switched, bridge, loaded):
    """What changes what the bridge computes, after A's activations were kept."""
    model = bridge.original_model
    match switched:
        case "another fine-tune":
            loaded.switch(B)
        case "the base":
            loaded.base_of(A)
        case "set by hand":
            model.set_adapter(list(model.peft_config)[1])
        case "disabled by hand":
            model.disable_adapters()
        case "two adapters at once":
            model.set_adapter(list(model.peft_config))
        case "scaled by hand":
            for layer in range(bridge.cfg.n_layers):
                for module in adapted_modules(bridge, layer).values():
                    module.scale_layer(0.5)


@pytest.mark.parametrize(
    "switched",
    [
        "another fine-tune",
        "the base",
        "set by hand",
        "disabled by hand",
        "two adapters at once",
        "scaled by hand",
    ],
)
def test_another_adapter_is_never_given_what_was_kept_of_this_one(loaded, kept, switched):
    bridge = loaded.switch(A)
    with shared_passes():
        of_a = both(bridge)
        forget(switched, bridge, loaded)
        of_b = both(bridge)
    assert equal(of_b, fresh(both, bridge))
    assert equal(both(bridge), of_b)
    assert not any(map(torch.equal, of_a, of_b))
    if switched == "scaled by hand":
        for layer in range(bridge.cfg.n_layers):
            for module in adapted_modules(bridge, layer).values():
                module.unscale_layer()
    loaded.switch(B)
    assert equal(both(loaded.switch(A)), of_a)


def test_layers_of_another_fine_tune_are_a_model_of_their_own(loaded, kept, monkeypatch):
    bridge = loaded.switch(A)
    of_a = both(bridge)
    mixed = []
    for layers in ([1], [1, 2]):
        with loaded.with_layers_from(A, B, layers):
            mixed.append(both(bridge))
            assert equal(mixed[-1], fresh(both, bridge))
            with monkeypatch.context() as patched:
                patched.setattr(bridge, "run_with_hooks", no_pass)
                assert equal(both(bridge), mixed[-1])
    with loaded.with_layers_from(A, B, range(bridge.cfg.n_layers)):
        assert equal(both(bridge), both(loaded.switch(B)))
    assert len({float(stream.sum()) for stream, _ in [of_a, *mixed]}) == 3


def change_in_place(bridge):
    with torch.no_grad():
        bridge.ln_final.original_component.weight.mul_(1.1)


def replace_a_weight(bridge):
    norm = bridge.ln_final.original_component
    norm.weight = torch.nn.Parameter(norm.weight * 1.1)


def replace_a_module(bridge):
    norm = deepcopy(bridge.ln_final.original_component)
    with torch.no_grad():
        norm.weight.mul_(1.1)
    bridge.ln_final.set_original_component(norm)


@pytest.mark.parametrize("change", [change_in_place, replace_a_weight, replace_a_module])
def test_changed_weights_are_neither_kept_nor_given_what_was(tiny_folders, kept, change):
    bridge = load_model(str(tiny_folders["llama"]), device="cpu")
    with shared_passes():
        before = both(bridge)
        files = sorted(kept.iterdir())
        change(bridge)
        assert identity_of(bridge) is None
        changed = both(bridge)
    assert equal(changed, fresh(both, bridge))
    assert not torch.equal(changed[1], before[1])
    assert sorted(kept.iterdir()) == files


def added(x, hook):
    return x + 1


def hooked(bridge):
    return bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", added)])


def steered_after_one(bridge):
    return steered(bridge, torch.ones(bridge.cfg.d_model), layer=1, strength=0.5)


@contextmanager
def with_a_hook_of_torch(bridge):
    handle = bridge.embed.register_forward_hook(lambda module, given, out: out + 1)
    yield
    handle.remove()


@contextmanager
def with_another_forward(bridge):
    block = bridge.blocks[1].original_component
    own = block.forward
    block.forward = lambda x, *given, **named: own(x + 1, *given, **named)
    yield
    del block.forward


def in_bfloat16(bridge):
    return torch.autocast("cpu")


@pytest.mark.parametrize(
    "during",
    [hooked, steered_after_one, with_a_hook_of_torch, with_another_forward, in_bfloat16],
)
def test_nothing_is_kept_or_found_while_more_than_the_model_computes(tiny_folders, kept, during):
    bridge = load_model(str(tiny_folders["llama"]), device="cpu")
    with shared_passes():
        before = both(bridge)
        files = sorted(kept.iterdir())
        with during(bridge):
            assert identity_of(bridge) is None
            inside = both(bridge)
            assert equal(inside, fresh(both, bridge))
        assert not torch.equal(inside[1], before[1])
        assert equal(both(bridge), before)
    assert sorted(kept.iterdir()) == files


def test_a_bridge_that_nobody_registered_keeps_nothing_on_disk(tiny_folders, kept):
    folder = str(tiny_folders["llama"])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")
    with shared_passes():
        given = both(bridge)
    assert not kept.exists()
    assert equal(given, fresh(both, bridge))


def test_another_process_finds_what_was_kept_however_it_loads_the_model(loaded, kept, monkeypatch):
    """Alone or beside others: the same identity, and the same bits."""
    bridge = loaded.switch(A)
    computed, base = both(bridge), both(loaded.base_of(A))
    code = (
        "import torch; from interp_kit import load_model, shared_passes\n"
        "from tests.test_store import A, both, no_pass\n"
        f"for name, file in ((A, 'a'), ('tiny-gemma2', 'base')):\n"
        "    bridge = load_model(name, device='cpu')\n"
        "    bridge.run_with_hooks = no_pass\n"
        f"    torch.save(both(bridge), {str(kept)!r} + '.' + file)"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(warm.KERNELS))
    NotebookClient(
        new_notebook(cells=[new_code_cell(code)]),
        timeout=120,
        kernel_name=warm.default_kernel(),
        kernel_manager_class=warm.PromptManager,
        resources={"metadata": {"path": str(REPOSITORY)}},
    ).execute()
    assert equal(torch.load(f"{kept}.a"), computed)
    assert equal(torch.load(f"{kept}.base"), base)


def test_files_that_change_after_loading_are_not_taken_for_those_loaded(tmp_path, kept):
    folder = save_tiny("llama", tmp_path / "m")
    first = load_model(str(folder), device="cpu")
    save_tiny("llama", folder, seed=1)
    of_first = both(first)
    assert equal(both(load_model(str(folder), device="cpu"))[1:], of_first[1:]) is False
    assert equal(both(first), of_first)


def test_the_last_reader_takes_any_hook_and_forgets_what_is_too_much(tiny_bridge, monkeypatch):
    tokens = torch.tensor(rows_of(tiny_bridge)[:1])
    names = ["blocks.0.hook_in", "blocks.1.hook_resid_post"]
    alone = read_last(tiny_bridge, tokens.tolist(), names, 2)
    with shared_passes():
        for _ in range(2):
            inside = read_last(tiny_bridge, tokens.tolist(), names, 2)
            assert all(torch.equal(inside[name], alone[name]) for name in names)
    monkeypatch.setattr(passes, "KEPT_BYTES", 0)
    runs, run = [], tiny_bridge.run_with_hooks
    monkeypatch.setattr(
        tiny_bridge, "run_with_hooks", lambda *a, **k: runs.append(1) or run(*a, **k)
    )
    with shared_passes():
        for _ in range(2):
            read_last(tiny_bridge, tokens.tolist(), names[1:], 2)
    assert len(runs) == 2


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "empty", "another's", "renamed"])
def test_a_damaged_file_is_computed_again(organisms, kept, damage):
    bridge = organisms.switch("tiny-gemma2")
    rows = [[2, 5, 9, 4], [2, 7, 9]]
    fresh = last_residuals(bridge, rows)
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
            last_residuals(bridge, rows[::-1])
            (other,) = (f for f in kept.iterdir() if f != file)
            file.write_bytes(other.read_bytes())
        case _:
            file.write_bytes(intact.replace(b'"stream"', b'"strean"'))
    with pytest.warns(UserWarning, match="damaged .* computed again"):
        again = last_residuals(bridge, rows)
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
    bridge = organisms.switch("tiny-gemma2")
    with pytest.warns(UserWarning, match="not kept"):
        found = last_residuals(bridge, [[2, 5, 9]])
    assert torch.equal(found, last_residuals(bridge, [[2, 5, 9]]))


def test_a_size_that_is_no_number_is_refused(kept, monkeypatch):
    monkeypatch.setenv(store.SIZE, "many")
    with pytest.raises(InputError, match="expected a number of GiB, got 'many'"):
        store.keep("a", {"x": torch.zeros(2)})
