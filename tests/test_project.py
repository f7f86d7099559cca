"""What keeps the project in one piece: pins, contracts, notebooks as documents."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from typing import cast

import nbformat
import pytest
import yaml

from interp_batch.needs import OR_NONE, needs_of
from interp_kit.specs import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {canonical(n): v for n, v in (line.split("==") for line in lines if line)}


def test_conda_and_pip_install_the_same_thing():
    """environment.yml installs this project under constraints.txt, and so does the Makefile."""
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert conda == ["python=3.11", "pip"]  # every package comes from the pinned list
    assert PROJECT["requires-python"] == ">=3.11"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert 'install -q -c constraints.txt -e ".[dev]"' in makefile


def test_every_dependency_is_pinned_and_the_pins_are_what_runs_here():
    from importlib.metadata import version

    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in wanted:
        name = canonical(re.split(r"[<>=!~ ]", requirement)[0])
        assert name in pins(), f"{name} has no pin: run `make lock`"
        assert version(name).split("+")[0] == pins()[name]


def test_the_batch_never_imports_torch(tmp_path):
    """Nor do its modules, but for the check of models, nor the commands that run no model."""
    file = REPOSITORY / "papermill_params" / "demo.yaml"
    summary = tmp_path / "demo" / "01_logit_lens" / "ipd-strategic" / "CC_temptation"
    summary.mkdir(parents=True)
    commands = [
        ["--help"],
        ["list"],
        ["run", str(file), "--dry-run", "--outputs", str(tmp_path)],
        ["report", str(file), "--outputs", str(tmp_path)],
    ]
    code = f"""
import importlib, pkgutil, sys
import interp_batch
from interp_batch.cli import app
for module in pkgutil.walk_packages(interp_batch.__path__, "interp_batch."):
    if module.name != "interp_batch.preflight":
        importlib.import_module(module.name)
for command in {commands}:
    app(command, standalone_mode=False)
heavy = {{"torch", "transformers", "transformer_lens", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "index.html").is_file()


def test_no_path_of_one_machine_is_committed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".json")):
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            assert not re.search(r"[\"' ]/(home|root|Users|tmp)/\w", text), name


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_grid_has_rows_and_columns_in_order(file):
    """A sweep over one position by mistake looks like a result, and so do shuffled layers."""
    for cell in nbformat.read(file, 4).cells:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get("application/vnd.plotly.v1+json", {"data": []})
            for z in [trace["z"] for trace in figure["data"] if trace["type"] == "heatmap"]:
                shape = z["shape"].split(",") if isinstance(z, dict) else (len(z), len(z[0]))
                assert min(int(n) for n in shape) > 1, figure["layout"]["title"]
                ticks = figure["layout"].get("xaxis", {}).get("ticktext", [])
                if all(re.fullmatch(r"-?[\d.]+", tick) for tick in ticks):
                    assert ticks == sorted(ticks, key=float), figure["layout"]["title"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_document(file):
    notebook = nbformat.read(file, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.splitlines()[0].endswith("?"), "the title is a question"
    tags = [tag for c in notebook.cells for tag in c.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 12, cell.source
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Try}, cell.source
        assert "sys.path" not in cell.source
    headings = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown").lower()
    for part in ("check", "control", "## reading", "## limits"):
        assert part in headings, f"no {part} in {file.name}"


NAMED_NEEDS = {  # in a notebook's metadata, and in the line that it opens with
    "counterfactuals": "counterfactuals",
    "two prompts": "two prompts or more",
    "two models": "two models or more",
    "trigger": "a trigger",
    "neutral texts": "neutral texts",
    "documents": "documents",
    "comparable models": "of one architecture and vocabulary",
}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_what_it_needs_and_how_long_it_takes(file):
    line = nbformat.read(file, 4).cells[0].source.splitlines()[2]
    said = re.fullmatch(r"\*Needs (.+?)\. Takes (\d+ (?:min|s)\b.*), on two CPU cores\.\*", line)
    assert said is not None, line
    for need in needs_of(file):
        assert NAMED_NEEDS.get(need, f"`{need.removesuffix(OR_NONE)}`") in said[1]
        assert "(or none)" in said[1] or OR_NONE not in need


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_answers_its_question(file):
    """It promises yes, no or cannot tell; it prints one of them, and the report gets it."""
    notebook = nbformat.read(file, 4)
    prose = "".join(c.source for c in notebook.cells if c.cell_type == "markdown").lower()
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert re.search(r"\bno\b", prose)
    assert re.search(r"""answers(=|": )(answers|decisions)\b""", code), "not recorded"
    assert re.search(r"\? (yes|no|cannot tell)[,:] ", printed), "no answer is printed"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_typed_literals_with_help(file):
    (cell,) = [
        c
        for c in json.loads(file.read_text())["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    ]
    source = "".join(cell["source"])
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.AnnAssign)
        assert statement.value is not None
        ast.literal_eval(statement.value)
        line = source.splitlines()[cast(int, statement.end_lineno) - 1]
        assert "  # " in line, f"no help in: {line}"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_names_figures_for_the_first_page_that_it_draws(file):
    code = "\n".join(c.source for c in nbformat.read(file, 4).cells if c.cell_type == "code")
    drawn = [
        re.escape(name).replace(re.escape("{i}"), r"\d+")
        for name in re.findall(r"f?\"(\d\w*_[a-z_{}0-9]+)\"(?!: \"[A-Z])", code)
    ]
    shown = [
        ast.literal_eval(key)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "headline"
        for key in node.value.keys
    ]
    assert shown or file.stem == "00_numerics_gate"
    assert [name for name in shown if not any(re.fullmatch(d, name) for d in drawn)] == []
