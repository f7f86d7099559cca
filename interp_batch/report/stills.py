"""The table that stands for a figure where no script draws it and no picture lies beside it."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

CELLS = 150  # of a table, at most: a larger figure is told in words


def small_table(data: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The numbers of a figure's traces (lines, bars, one grid), the first row as the head.

    Empty where there are more than ``CELLS``, or traces of another kind. Texts are as plotly has
    them: escaped for HTML.
    """
    shown = [trace for trace in data if trace.get("hoverinfo") != "skip"]  # a band around a line
    kinds = {trace.get("type") for trace in shown}
    if kinds == {"heatmap"} and len(shown) == 1:
        rows = _grid(shown[0])
    elif kinds and kinds <= {"scatter", "bar"}:
        rows = [["series", "across", "up"]]
        for trace in shown:
            x, y = _values(trace.get("x")), _values(trace.get("y"))
            rows += [[_text(trace.get("name") or ""), _text(a), _text(b)] for a, b in zip(x, y)]
    else:
        return []
    return rows if len(rows) > 1 and sum(map(len, rows)) <= CELLS else []


# ------------------------------------------------------------------------------------- internals
def _grid(trace: dict[str, Any]) -> list[list[str]]:
    x, y, z = (_values(trace.get(axis)) for axis in "xyz")
    labels = trace.get("customdata")  # where ``figures.heatmap`` keeps the names of columns
    named = labels[0] if isinstance(labels, list) and labels else x
    named = named if isinstance(named, list) and len(named) == len(x) else x
    lines = zip(y, z) if len(y) else enumerate(z)
    head = ["", *map(_text, named)]
    return [head, *([_text(name), *map(_text, _values(line))] for name, line in lines)]


def _values(values: Any) -> Sequence[Any]:
    """A list, or an array that plotly packed: ``{"dtype": "f8", "bdata": ..., "shape": "2, 3"}``.

    Empty for anything else.
    """
    if isinstance(values, list | np.ndarray):
        return list(values)
    try:
        packed = base64.b64decode(values["bdata"])
        array = np.frombuffer(packed, dtype=np.dtype(values["dtype"]).newbyteorder("<"))
        shape = [int(n) for n in str(values.get("shape", len(array))).split(",")]
        return list(array.reshape(shape))
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error):
        return []


def _text(value: Any) -> str:
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)
