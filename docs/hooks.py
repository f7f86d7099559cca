"""Pages of the documentation that are made from other files as it is built.

README, CONTRIBUTING, CHANGELOG, model cards and notebooks are shown as they are, and a page for each
module lists what its docstrings say: each thing is written once.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

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
KEYS = re.compile(r"^::: keys (\S+)$", re.MULTILINE)


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
    """Replace ``::: keys MODULE.SPEC`` with a table of that spec's keys."""
    return KEYS.sub(lambda match: _table_of_keys(match[1]), markdown)


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
        for file in sorted((ROOT / package).rglob("*.py"))
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
        "Every public function and class, from its docstring. Arrays and tensors carry their shape in",
        'the signature: `Float[Tensor, "prompt layer"]` is a tensor of floats with these two axes.\n',
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
        "Each notebook asks one question. It states the method with its equation, checks an identity",
        "that can fail, compares every effect with a control, and says how to read the figures. The",
        "sections below are the notebooks' own words. `papermill --help-notebook notebooks/NAME.ipynb`",
        "lists a notebook's parameters.",
    ]
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        reading = next(text for text in prose if text.startswith("## Reading"))
        reading = reading.removeprefix("## Reading").strip()
        if reading.endswith(":"):  # the numbers follow in the notebook
            reading = re.sub(r"(?:^|(?<=[.:]\s))[^.:]*:$", "", reading).strip()
        title = prose[0].splitlines()[0].removeprefix("# ")
        lines += ["", f"## {title}", "", f"`{file.stem}`", "", reading]
    return "\n".join(lines) + "\n"


def _models() -> str:
    """The cards of the shipped models."""
    lines = [
        "# Shipped models\n",
        "Small models that ship with the repository. What each of them does is known, so every method",
        "can be checked against it. Below are their model cards; `interp-kit train NAME` makes one",
        "again.",
    ]
    cards = sorted((ROOT / "data" / "models").glob("*/README.md"))
    bases = [card for card in cards if not _adapter(card)]
    for card in bases + [card for card in cards if card not in bases]:
        lines += ["", re.sub(r"^#", "##", card.read_text(encoding="utf-8").strip(), flags=re.M)]
    return "\n".join(lines) + "\n"


def _adapter(card: Path) -> bool:
    return "adapter" in yaml.safe_load((card.parent / "model.yaml").read_text(encoding="utf-8"))


def _table_of_keys(name: str) -> str:
    """The keys of a spec: name, type, default, and the comment behind it in the source."""
    module, _, spec = name.rpartition(".")
    kind = getattr(importlib.import_module(module), spec)
    source = inspect.getsource(kind)
    lines = ["| key | value | if left out | |", "|---|---|---|---|"]
    for field, info in kind.model_fields.items():
        found = re.search(rf"^    {field}: (.+?)(?: = .+?)?(?:  # (.+))?$", source, re.MULTILINE)
        comment = (found[2] or "") if found else ""
        if comment.startswith("filled in"):
            continue
        default = (
            "required"
            if info.is_required()
            else f"`{json.dumps(info.get_default(call_default_factory=True))}`"
        )
        lines.append(
            f"| `{info.alias or field}` | `{_plain(info.annotation)}` | {default} | {comment} |"
        )
    return "\n".join(lines)


def _plain(annotation: object) -> str:
    name = (
        annotation.__name__
        if isinstance(annotation, type) and not getattr(annotation, "__args__", ())
        else str(annotation)
    )
    return name.replace("typing.", "").replace("|", "\\|")
