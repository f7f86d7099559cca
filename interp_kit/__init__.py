"""What did fine-tuning change inside this model, and which parts cause the behaviour?

The names below load torch when they are first used, so that checking a run file stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_kit.activations import shared_passes
    from interp_kit.decisions import decide, encode, encode_scenario
    from interp_kit.loading import load_model, load_models
    from interp_kit.specs import find_model
    from interp_kit.specs import find_scenario as load_scenario

_HOME = {
    "decide": "interp_kit.decisions",
    "encode": "interp_kit.decisions",
    "encode_scenario": "interp_kit.decisions",
    "find_model": "interp_kit.specs",
    "load_model": "interp_kit.loading",
    "load_models": "interp_kit.loading",
    "load_scenario": "interp_kit.specs",
    "shared_passes": "interp_kit.activations",
}

__all__ = [
    "decide",
    "encode",
    "encode_scenario",
    "find_model",
    "load_model",
    "load_models",
    "load_scenario",
    "shared_passes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'interp_kit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), "find_scenario" if name == "load_scenario" else name)
