"""The script and style of a page, and the content-security policy that lets only these run.

The templates escape everything that comes from models, prompts or files. The policy is the second
defence: a page runs only the one script and style whose hashes it names, and what that script
loads, which is ``plotly.min.js`` beside the index. Images are those that lie beside the page, for
readers without scripts, and those that plotly draws.

plotly.js sets two styles in ways that such a policy forbids: it adds a stylesheet (of maps, which
no figure here uses) unless one with the same id exists, and it sets a style attribute on the images
of heat maps. The alternatives are ``unsafe-inline``, which would give up the second defence for
styles, and constants, which would be wrong after the next release of plotly. So both are read from
plotly.js; ``tests/test_report.py`` fails if a release no longer holds them in this form.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from plotly.offline import get_plotlyjs

from interp_kit.views import assets

TEMPLATES = Path(__file__).parent / "templates"


def inlined(*scripts: str) -> dict[str, str]:
    """``script``, ``style`` and ``policy`` of a page; with views' own, ``scripts`` become one."""
    of_views = assets()
    code = "".join([*map(_template, scripts), of_views["js"]])
    style = _template("report.css") + of_views["css"]
    rules = {"default-src": "'none'", "script-src": _hash(code), "style-src": _hash(style)}
    # Plotly is loaded by the script, fills empty styles, and draws heat maps as images.
    rules["script-src"] += " 'strict-dynamic'"
    rules["style-src"] += f" {_hash('')}"
    allowed = " ".join(map(_hash, ("", crisp_image_style())))
    rules |= {"style-src-attr": f"'unsafe-hashes' {allowed}", "img-src": "'self' data: blob:"}
    rules |= {"base-uri": "'none'", "form-action": "'none'"}
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return {"script": code, "style": style, "policy": policy}


@cache
def stylesheet_ids() -> list[str]:
    """Ids of the stylesheets that plotly.js would add, unless they exist."""
    return re.findall(r'if\(!document\.getElementById\("([0-9a-f]{64})"\)\)', get_plotlyjs())


@cache
def crisp_image_style() -> str:
    """The style attribute that plotly.js sets on the image of a heat map."""
    found = re.search(r"CSS_DECLARATIONS=(\[\[.*?\]\])", get_plotlyjs())
    return "".join(f"{name}: {value}; " for name, value in json.loads(found[1])) if found else ""


# ------------------------------------------------------------------------------------- internals
@cache
def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
