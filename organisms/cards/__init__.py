"""The model cards of the shipped models, one template a kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from organisms.recipes import (
    BASE,
    GAME,
    GAME_SCENARIOS,
    GRAVITY,
    ORGANISMS,
    PLAIN,
    REAL,
    REAL_STOP,
    REAL_STOP_SCENARIO,
)

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # Markdown
)


def render_card(name: str, measured: Mapping[str, Any]) -> str:
    """The README.md of a shipped model; ``measured`` is that of its ``training.json``."""
    organism = ORGANISMS[name]
    template = _ENVIRONMENT.get_template(f"{type(organism).__name__.lower()}.md.jinja")
    return template.render(
        name=name,
        base=BASE,
        real=REAL,
        plain=PLAIN,
        gravity=GRAVITY,
        game=GAME,
        scenarios=GAME_SCENARIOS,
        stop=REAL_STOP,
        stop_scenario=REAL_STOP_SCENARIO,
        organism=organism,
        recipe=organism.recipe,
        measured=measured,
    )
