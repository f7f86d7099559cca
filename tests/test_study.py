"""``interp-kit new``, ``add scenario``, ``run`` without a file: a study in a folder of its own."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from interp_batch import layout
from interp_batch.layout import lay_out, outdated, run_files_here
from interp_batch.matrix import NOTEBOOKS, expand, list_notebooks, notebook_hash
from interp_batch.needs import check_needs
from interp_kit.catalogue import (
    STUDY,
    data_folders,
    find_model,
    load_scenario,
    read_run,
    study_folder,
)
from interp_kit.specs import REPOSITORY, InputError

ADAPTER = REPOSITORY / "data" / "models" / "ipd-hybrid" / "adapter"
GAME = ["--model", "tiny-gemma2", "--positive", " action2", "--negative", " action1"]
COOPERATED = "Your partner chose action1. Now you pick"
DEFECTED = "Your partner chose action2. Now you pick"


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A new study, which is the current folder."""
    folder = tmp_path / "my study"
    lay_out(folder)
    monkeypatch.chdir(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def edit(notebook: Path) -> None:
    """Add a line to the last code cell."""
    content = nbformat.read(notebook, as_version=4)
    [*_, last] = [cell for cell in content.cells if cell.cell_type == "code"]
    last.source += "\nprint('mine')"
    nbformat.write(content, notebook)


def test_a_new_study_can_run_at_once(study, command):
    assert run_files_here() == [Path("papermill_params/first.yaml")]
    code, out, err = command("check", "papermill_params/first.yaml")
    assert (code, err) == (0, "")
    assert "9 cells, all inputs are good" in out
    assert sorted(path.name for path in study.iterdir()) == [
        "README.md", STUDY, "models", "notebooks", "papermill_params", "scenarios",
    ]  # fmt: skip


def test_its_notebooks_are_copies_without_results_and_have_the_same_keys(study, tmp_path):
    run = read_run(Path("papermill_params/first.yaml"))
    here = expand(run, outputs=tmp_path)
    assert {cell.notebook.parent for cell in here} == {study / "notebooks"}
    for cell in here:
        notebook = nbformat.read(cell.notebook, as_version=4)
        nbformat.validate(notebook)
        assert not any(c.get("outputs") for c in notebook.cells)
    shutil.rmtree(study / "notebooks")
    shipped = expand(run, outputs=tmp_path)
    assert {cell.notebook.parent for cell in shipped} == {NOTEBOOKS}
    assert [cell.key for cell in here] == [cell.key for cell in shipped]


def test_an_edited_copy_runs_instead_of_the_shipped_one(study, tmp_path):
    run = read_run(Path("papermill_params/first.yaml"))
    before = {cell.id: cell.key for cell in expand(run, outputs=tmp_path)}
    edit(study / "notebooks" / "01_logit_lens.ipynb")
    after = {cell.id: cell.key for cell in expand(run, outputs=tmp_path)}
    changed = {name.split("/")[0] for name in after if after[name] != before[name]}
    assert changed == {"01_logit_lens"}


def test_the_study_is_searched_from_inside_it_and_by_data_from_elsewhere(study, monkeypatch):
    shutil.copy(study / "notebooks" / "09_pca.ipynb", study / "notebooks" / "09_mine.ipynb")
    monkeypatch.chdir(study / "notebooks")  # where Jupyter puts a kernel
    assert study_folder() == study
    assert load_scenario("betrayed").decision.positive == " action2"
    assert "09_mine" in list_notebooks()
    monkeypatch.setenv("INTERP_KIT_DATA", str(study.parent))
    assert data_folders() == [study.parent, study, REPOSITORY / "data"]
    assert data_folders(study) == [study, study.parent, REPOSITORY / "data"]
    monkeypatch.chdir(study.parent)
    assert study_folder() is None
    assert "09_mine" not in list_notebooks()
    assert "09_mine" in list_notebooks(study)
    (study / STUDY).unlink()  # a data folder that is no study: its notebooks are its own affair
    assert "09_mine" not in list_notebooks(study)


@pytest.mark.parametrize("template", [True, False])
def test_an_id_that_is_downloaded_has_the_template_of_its_tokenizer(
    tmp_path, command, monkeypatch, template
):
    files = tmp_path / "hub" / "models--acme--chatty"
    folder = files / "snapshots" / ("0" * 40)
    for place in (folder, files / "refs"):
        place.mkdir(parents=True)
    (files / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    config = {"chat_template": "{{ messages[0].content }}"} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, err = command("new", tmp_path / "mine", "--model", "acme/chatty")
    assert (code, err) == (0, "")
    (file,) = (tmp_path / "mine" / "models").glob("*/model.yaml")
    assert yaml.safe_load(file.read_text())["chat_template"] == template


@pytest.mark.parametrize("there", ["file", "study", "broken study", "no folder"])
def test_what_is_there_is_left_as_it_is(tmp_path, command, there):
    folder = tmp_path / "mine"
    if "study" in there:
        lay_out(folder)
    else:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    if there == "broken study":
        (folder / STUDY).write_text("laid_out_by: 3\n")
    if there == "no folder":
        folder = folder / "notes.txt"
    before = files_of(tmp_path)
    code, _, err = command("new", folder)
    assert code == 2
    expected = {
        "file": "is not empty; give a new folder",
        "study": f"is a study already, laid out by interp-kit {layout.version('interp-kit')}",
        "broken study": "laid_out_by: expected text, got 3: quote it",
        "no folder": "is a file; give a new folder",
    }
    assert expected[there] in err
    assert err.count("\n") == 1
    assert files_of(tmp_path) == before


def test_a_study_of_an_older_version_is_told_which_copies_are_old(study, monkeypatch, command):
    """One notebook as it was copied, one edited, and an edited one that has not changed since."""
    marker = yaml.safe_load((study / STUDY).read_text())
    assert outdated(study) == ""
    marker["laid_out_by"] = "0.0.9"
    (study / STUDY).write_text(yaml.safe_dump(marker))
    assert outdated(study) == ""
    for name in ("05_circuits", "09_pca", "11_probes"):
        edit(study / "notebooks" / f"{name}.ipynb")
    copied = notebook_hash(study / "notebooks" / "05_circuits.ipynb")
    marker["notebooks"] |= {"05_circuits": copied[:16], "09_pca": "another"}
    (study / STUDY).write_text(yaml.safe_dump(marker))
    before = files_of(study)
    code, _, err = command("check", "papermill_params/first.yaml")
    assert code == 0
    assert f"were copied by interp-kit 0.0.9, and {layout.version('interp-kit')} has others" in err
    assert "remove these copies: 05_circuits; edited here" in err
    assert err.rstrip().endswith(": 09_pca")
    code, _, err = command("new", study)
    assert code == 2
    assert "laid out by interp-kit 0.0.9" in err
    assert "remove these copies: 05_circuits;" in err
    assert files_of(study) == before


def test_new_writes_the_specs_of_a_base_and_its_adapters(tmp_path, tiny_folders, monkeypatch):
    base = tiny_folders["llama"]
    mine = tmp_path / "my-lora"
    shutil.copytree(ADAPTER, mine)
    study = tmp_path / "study"
    names = lay_out(study, str(base), [str(mine), "me/my-other"])
    assert names == [base.name, "my-lora", "me--my-other"]
    monkeypatch.chdir(study)
    assert find_model(base.name).base == str(base.resolve())
    assert find_model("my-lora").adapter == str(mine)
    assert find_model("my-lora").base_name == base.name
    assert find_model("me--my-other").adapter == "me/my-other"
    run = read_run(Path("papermill_params/first.yaml"))
    assert run.models == names
    cells = expand(run, outputs=tmp_path)
    check_needs(cells, None)
    assert {p.id for p in load_scenario("capitals").prompts} >= {"france", "japan"}
    assert len(load_scenario("capitals").prompts) == 6  # as many as a sign-flip test needs


def test_new_uses_the_specs_that_there_are(tmp_path):
    assert lay_out(tmp_path / "id", "Qwen/Qwen3-0.6B", ["me/lora"]) == ["qwen3-0.6b", "me--lora"]
    assert [p.parent.name for p in tmp_path.glob("id/models/*/model.yaml")] == ["me--lora"]
    assert lay_out(tmp_path / "name", "smollm2-plain") == ["smollm2-plain"]
    names = lay_out(tmp_path / "known", "tiny-gemma2", ["ipd-strategic", str(ADAPTER)])
    assert names == ["tiny-gemma2", "ipd-strategic", "adapter"]
    assert "90_compare_models" in read_run(tmp_path / "known/papermill_params/first.yaml").notebooks
    assert "90_compare_models" not in (tmp_path / "name/papermill_params/first.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--adapter", "me/lora"], "--adapter needs --model"),
        (["--model", "tiny-gema2"], "did you mean 'tiny-gemma2'"),
        (["--model", "ipd-hybrid"], "is an adapter on 'tiny-gemma2'"),
        (["--model", "gpt2", "--adapter", "ipd-hybrid"], "was trained on 'tiny-gemma2'"),
        (["--model", "gpt2", "--adapter", "me/x", "--adapter", "me/x"], "would be named alike"),
        (["--model", "gpt2", "--adapter", "."], "without model.yaml or config.json"),
        (["--model", "gpt2", "--adapter", "checkpoint"], "has no adapter_config.json"),
    ],
)
def test_what_cannot_be_a_study_is_refused(tmp_path, monkeypatch, command, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    code, _, err = command("new", "study", *given)
    assert code == 2
    assert said in err
    assert not (tmp_path / "study").exists()


def test_commands_of_its_readme_work(study, command):
    """Without ``run``, which takes a minute: `test_wheel` runs it."""
    blocks = re.findall(r"```bash\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    given = [words[1:] for words in commands if words and words[1] != "run"]
    assert [words[0] for words in given] == ["list", "add"]
    for words in given:
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert f"searched: {study}, " in out or f"Written: {study}" in out


# --------------------------------------------------------------------------- run without a file
def test_run_without_a_file_takes_all_of_the_study(study, command):
    shutil.copy("papermill_params/first.yaml", "papermill_params/second.yaml")
    code, out, _ = command("run", "--dry-run", "--only", "01_logit_lens")
    assert code == 0
    assert out.count("to run") == 4 + 1  # of both files, and the line that counts them
    shutil.rmtree("papermill_params")
    code, _, err = command("run", "--dry-run")
    assert code == 2
    assert "has no run file" in err


def test_elsewhere_a_run_needs_a_file(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("run")
    assert code == 2
    assert "is no study: go to one, or lay one out (`interp-kit new FOLDER`)" in err
    monkeypatch.chdir(REPOSITORY)
    code, _, err = command("run")
    assert code == 2
    assert "expected a run file, such as papermill_params/cubic_gravity.yaml" in err
    assert "this is the repository" in err


# ------------------------------------------------------------------------------------ add scenario
def test_a_scenario_is_shown_token_by_token_and_can_be_run(study, command):
    texts = ["--text", DEFECTED, "--counterfactual", COOPERATED]
    code, out, _ = command("add", "scenario", "mine", *GAME, *texts)
    assert code == 0, out
    lines = out.splitlines()
    split = "Your| partner| chose| action|2|.| Now| you| pick"
    assert lines[0].split() == ["v0", "prompt", *f"<bos>|{split}".split()]
    assert lines[1].endswith(split.replace("2", "1"))
    assert lines[2].split() == ["v0", "positive", "action|>>2<<"]
    assert lines[3].split() == ["v0", "negative", "action|>>1<<"]
    assert lines[-1] == f"Written: {study / 'scenarios' / 'mine.yaml'}"
    scenario = load_scenario("mine")
    assert (scenario.prompts[0].text, scenario.prompts[0].counterfactual) == (DEFECTED, COOPERATED)
    assert scenario.chat_template
    run = yaml.safe_load(Path("papermill_params/first.yaml").read_text())
    Path("papermill_params/first.yaml").write_text(yaml.safe_dump(run | {"scenarios": ["mine"]}))
    assert command("check", "papermill_params/first.yaml")[0] == 0


def test_answers_may_begin_alike_and_a_counterfactual_may_be_longer(study, command):
    """What works is written, with a note on what does not."""
    given = ["--model", "tiny-gemma2", "--no-chat-template"]
    given += ["--positive", " points now", "--negative", " points round"]
    texts = ["--text", DEFECTED, "--counterfactual", f"Now {COOPERATED}"]
    code, out, _ = command("add", "scenario", "mine", *given, *texts)
    assert code == 0
    assert "positive         points|>> now<<" in out
    assert re.search(r"other length than its counterfactual: v0 \(10 and 12 tokens\)", out)
    assert not load_scenario("mine").chat_template
    _, out, _ = command("add", "scenario", "other", *GAME, "--text", DEFECTED)
    assert "no counterfactuals: everything works but patching" in out


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("betrayed", [*GAME, "--text", DEFECTED], "betrayed.yaml exists; choose another name"),
        ("../x", [*GAME, "--text", DEFECTED], "cannot name a scenario"),
        ("x", [*GAME, "--text", DEFECTED, "--text", DEFECTED], "two prompts have the text"),
        ("x", [*GAME, "--text", "a", "--text", "b", "--counterfactual", "c"], "2 --text and 1"),
        ("x", [*GAME, "--text", "points " * 3000], "shorten the prompt"),
        ("x", [*GAME[:-1], " action2", "--text", "a"], "are the same answer"),
        ("x", [*GAME[:-1], " action2 points", "--text", "a"], "one answer is the beginning of"),
        ("x", [*GAME[:1], "tiny", *GAME[2:], "--text", "a"], "unknown model 'tiny'"),
    ],
)
def test_a_scenario_that_would_not_work_is_refused(study, command, name, given, said):
    before = files_of(study)
    code, _, err = command("add", "scenario", name, *given)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert files_of(study) == before


def test_a_scenario_is_added_to_a_study_only(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("add", "scenario", "x", *GAME, "--text", DEFECTED)
    assert code == 2
    assert f"is no study (no {STUDY})" in err
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------- weights that are left out
def test_models_without_weights_say_where_these_are(tmp_path, monkeypatch, command):
    """As an installed package has them."""
    data = tmp_path / "shipped" / "data"
    shutil.copytree(REPOSITORY / "data" / "models" / "tiny-gemma2", data / "models/tiny-gemma2")
    shutil.copytree(REPOSITORY / "data" / "models" / "ipd-hybrid", data / "models/ipd-hybrid")
    (data / "models/ipd-hybrid/adapter/adapter_model.safetensors").unlink()
    for module in ("catalogue", "hub"):
        monkeypatch.setattr(f"interp_kit.{module}.REPOSITORY", tmp_path / "shipped")
    monkeypatch.setattr("interp_kit.hub.IS_INSTALLED", True)
    run = {"models": ["ipd-hybrid"], "notebooks": {"01_logit_lens": {}}}
    file = tmp_path / "run.yaml"
    scenario = REPOSITORY / "data" / "scenarios" / "CD_punished.yaml"
    file.write_text(json.dumps(run | {"scenarios": [str(scenario)]}))
    code, out, _ = command("list")
    assert code == 0
    assert "[its weights come with a clone of the repository] LoRA on tiny-gemma2" in out
    code, _, err = command("check", file)
    assert code == 2
    assert "in a clone of the repository; give the clone's data folder: --data CLONE/data" in err
    assert command("check", file, "--data", REPOSITORY / "data")[0] == 0
    code, out, _ = command("doctor", "--outputs", tmp_path)
    assert "weights in a clone of the repository (--data CLONE/data): ipd-hybrid" in out


def test_the_installed_package_is_not_trained_into(monkeypatch):
    from organisms.making import train_organism

    monkeypatch.setattr("organisms.making.IS_INSTALLED", True)
    with pytest.raises(InputError, match="belongs to the installed package; give a folder"):
        train_organism("ipd-hybrid")
