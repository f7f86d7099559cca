"""The documentation builds offline, leaves out nothing public, and its examples are right."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from interp_kit.specs import REPOSITORY, ModelSpec, RunSpec, Scenario

PROSE = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PROSE += sorted((REPOSITORY / "docs").glob("*.md"))
SPECS = {"model": ModelSpec, "scenario": Scenario, "run": RunSpec}


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The documentation, built with warnings as errors."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs, which `make docs` installs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def public(package: str) -> set[str]:
    """Every public function, class and method of a package, by its full name."""
    names = set()
    for file in (REPOSITORY / package).rglob("*.py"):
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            names.add(f"{module}.{node.name}")
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    names.add(f"{module}.{node.name}.{inner.name}")
    return names


def inventory(site: Path) -> set[str]:
    """Every name that has an entry in the built reference."""
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}


def fenced(language: str) -> list:
    """The code blocks of a language in all prose."""
    block = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(match[1], id=f"{file.stem}-{number}")
        for file in PROSE
        for number, match in enumerate(block.finditer(file.read_text(encoding="utf-8")))
    ]


def test_nothing_public_is_missing_from_the_reference(site):
    assert public("interp_kit") - inventory(site) == set()


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*\bhttps?://[^>]*>", page.read_text()
        )
        assert loaded == [], page.name
    assert not any("@import" in style.read_text() for style in site.rglob("*.css"))


def test_every_notebook_and_model_card_is_shown(site):
    pages = (site / "notebooks.html").read_text() + (site / "models.html").read_text()
    for notebook in (REPOSITORY / "notebooks").glob("*.ipynb"):
        assert notebook.stem in pages
    for card in (REPOSITORY / "data" / "models").glob("*/README.md"):
        assert f'id="{card.parent.name}"' in pages


@pytest.mark.parametrize("code", fenced("python"))
def test_examples_import_what_there_is(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("interp_kit"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


@pytest.mark.parametrize("text", fenced("yaml"))
def test_examples_of_files_are_valid(text):
    """Their first line names the file, and so what it holds."""
    kind = re.search(r"(model|scenario|run)s?/|(run)\.yaml|papermill_params", text.splitlines()[0])
    assert kind, f"expected a first line such as `# scenarios/NAME.yaml`, got {text[:40]!r}"
    spec = SPECS[kind[1] or "run"]
    spec.model_validate({"name": "example", **yaml.safe_load(text)})


@pytest.mark.parametrize("code", fenced("bash"))
def test_commands_of_examples_exist(code):
    from typer.main import get_command

    from interp_batch.cli import app

    command: Any = get_command(app)
    for name, rest in re.findall(r"^(?:\w+=\S+ )?interp-kit (\w+)(.*)$", code, re.MULTILINE):
        called = command.commands[name]
        called = getattr(called, "commands", {}).get((rest.split() or [""])[0], called)
        options = {flag for parameter in called.params for flag in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", rest.split("#")[0])) - {"--help"} <= options
