"""Pages of the documentation that are made from other files as it is built.

README, CONTRIBUTING, CHANGELOG, model cards and notebooks are shown as they are, and each module
has a page made from its docstrings: everything is written once.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("interp_kit", "interp_batch", "organisms")
# Files of the repository that are pages here; links between them are rewritten.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
KEYS = re.compile(r"^::: keys (\S+)(?: without (\w+))?$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Put a page for each module under ``API`` in the navigation."""
    pages: list = ["reference/index.md"]
    for package in PACKAGES:
        pages.append({package: list(_nav(ROOT / package))})
    for tab in config.nav or []:
        for entries in tab.values():
            for entry in entries if isinstance(entries, list) else []:
                if entry.get("API"):
                    entry["API"] = pages


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=_relinked(ROOT / source)))
    for picture in sorted((ROOT / "outputs" / "example").glob("*.png")):
        name = str(picture.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    files.append(File.generated(config, "notebooks.md", content=_notebooks()))
    files.append(File.generated(config, "models.md", content=_models()))
    files.append(File.generated(config, "reference/index.md", content=_overview()))
    for module in _modules():
        content = f"# {_dotted(module)}\n\n::: {_dotted(module)}\n"
        files.append(File.generated(config, _page(module), content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace ``::: keys MODULE.SPEC [without KEY]`` with a table of that spec's keys."""
    return KEYS.sub(lambda match: _table_of_keys(match[1], match[2]), markdown)


# ------------------------------------------------------------------------------------- internals
def _relinked(file: Path) -> str:
    """The text of a Markdown file, with links that hold on the site."""
    text = file.read_text(encoding="utf-8").replace("](docs/", "](")
    for source, target in PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text.replace("](data/models)", "](models.md)").replace("](notebooks)", "](notebooks.md)")


def _modules() -> list[Path]:
    return [
        file
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"), key=lambda f: (f.parent, f))
        if _docstring(file) and file.name != "__init__.py"
    ]


def _dotted(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts)


def _page(module: Path) -> str:
    return f"reference/{module.relative_to(ROOT).with_suffix('.md')}"


def _nav(folder: Path) -> Iterator[dict]:
    """The folder's modules, then its subpackages."""
    modules = [m for m in _modules() if m.parent == folder]
    yield from ({module.stem: _page(module)} for module in modules)
    for subfolder in sorted(p.parent for p in folder.glob("*/__init__.py")):
        if entries := list(_nav(subfolder)):
            yield {subfolder.name: entries}


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _overview() -> str:
    """Every module and the first sentence of its docstring, by package."""
    lines = [
        "# API\n",
        "Every public function and class, from its docstring. Signatures give shapes of tensors:",
        '`Float[Tensor, "prompt layer"]` is a tensor of floats with these two axes.\n',
        "What most notebooks begin with can be imported from `interp_kit` itself:\n",
    ]
    stub = ast.parse((ROOT / "interp_kit" / "__init__.pyi").read_text(encoding="utf-8"))
    for imported in [node for node in stub.body if isinstance(node, ast.ImportFrom)]:
        for name in [alias.name for alias in imported.names]:
            lines.append(f"- [`{name}`][interp_kit.{imported.module}.{name}]")
    folder = None
    for module in _modules():
        if module.parent != folder:
            folder = module.parent
            lines += ["", f"## {_dotted(folder)}", "", "| module | |", "|---|---|"]
        link = _page(module).removeprefix("reference/")
        first = _docstring(module).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| [`{module.stem}`]({link}) | {first} |")
    return "\n".join(lines) + "\n"


def _notebooks() -> str:
    """What each notebook asks, and how to read it, in its own words."""
    lines = [
        "# Notebooks\n",
        "Each notebook asks one question. It gives the method with its equation, checks an",
        "identity that can fail, and compares every effect with a control. Below is how to read",
        "each notebook's figures, in its own words. The command",
        "`papermill --help-notebook notebooks/NAME.ipynb` lists a notebook's parameters.",
    ]
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        reading = next(text for text in prose if text.startswith("## Reading"))
        reading = reading.removeprefix("## Reading").strip()
        if reading.endswith(":"):  # the numbers follow in the notebook
            reading = re.sub(r"(?:^|(?<=[.:]\s))[^.:]*:$", "", reading).strip()
        title, _, needs = prose[0].splitlines()[:3]
        title = title.removeprefix("# ")
        lines += ["", f"## {title}", "", f"`{file.stem}`", "", needs, "", reading, ""]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        lines += [f"- {how}" for how in _headline(code)]
    return "\n".join(lines) + "\n"


def _headline(code: list[str]) -> list[str]:
    """How to read the figures that a report opens with, from the cell that says so."""
    source = next((text for text in code if text.startswith("headline = {")), "")
    return [
        str(how.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for how in node.value.values
        if isinstance(how, ast.Constant)
    ]


def _models() -> str:
    """The cards of the shipped models."""
    lines = [
        "# Shipped models\n",
        "These small models ship with the repository. Each was trained to do something known, so",
        "every method can be checked against it. Below are their model cards. The command",
        "`interp-kit train NAME` makes a model again.",
    ]
    cards = sorted((ROOT / "data" / "models").glob("*/README.md"))
    bases = [card for card in cards if not _adapter(card)]
    for card in bases + [card for card in cards if card not in bases]:
        lines += ["", re.sub(r"^#", "##", card.read_text(encoding="utf-8").strip(), flags=re.M)]
    return "\n".join(lines) + "\n"


def _adapter(card: Path) -> bool:
    return "adapter" in yaml.safe_load((card.parent / "model.yaml").read_text(encoding="utf-8"))


def _table_of_keys(name: str, left_out: str | None) -> str:
    """The keys of a spec: name, value, default, and the comment behind it in the source."""
    module, _, spec = name.rpartition(".")
    kind = getattr(importlib.import_module(module), spec)
    source = inspect.getsource(kind)
    rows: list[tuple[str, ...]] = [("key", "value", "if left out", "")]
    rows.append(("---",) * len(rows[0]))
    for field, info in kind.model_fields.items():
        found = re.search(rf"^    {field}: .+?  # (.+)$", source, re.MULTILINE)
        comment = found[1] if found else ""
        if field == left_out or comment.startswith("filled in"):
            continue
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        given = "" if default is None else f"`{json.dumps(default)}`"
        if info.is_required():
            given = "required"
        rows.append((f"`{info.alias or field}`", _in_words(info.annotation), given, comment))
    if not any(row[3] for row in rows[2:]):
        rows = [row[:3] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _in_words(annotation: Any) -> str:
    """A type for readers of YAML and JSON."""
    kinds = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _in_words(kinds[0])
        case origin if origin is Literal:
            return " or ".join(f"`{json.dumps(value)}`" for value in kinds)
        case origin if origin in (Union, UnionType):
            return " or ".join(_in_words(kind) for kind in kinds if kind is not NoneType)
        case origin if origin is list:
            return f"list of {_in_words(kinds[0])}"
        case origin if origin is dict:
            return f"mapping of {_in_words(kinds[0])} to {_in_words(kinds[1])}"
    words = {
        str: "text",
        bool: "`true` or `false`",
        int: "number",
        float: "number",
        Any: "anything",
    }
    return words.get(annotation, "mapping")
