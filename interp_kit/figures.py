"""Plotly figures from tidy tables. Signed values have a diverging colour scale centred on zero.

Every function escapes the texts of its table, so that no token of a model becomes markup.
"""

import html
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML
from jaxtyping import Float
from plotly.subplots import make_subplots

escape = partial(html.escape, quote=False)  # plotly's text has &lt; &gt; &amp; but not &quot;

# Okabe and Ito (2008): colour-blind readers can tell these apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DIVERGING = "RdBu_r"  # red positive, blue negative
CONTROL = "#8A8A8A"  # grey
BAND_OPACITY = 0.15  # of intervals
SMALLEST_ERROR = 1e-8  # on a logarithmic axis, which has no place for an error of zero
Depth = Literal["layer", "depth", "step"]
DEPTH_TITLES: dict[Depth, str] = {
    "layer": "layer (-1 = embedding)",
    "depth": "relative depth (0 = embedding, 1 = last block)",
    "step": "step of the training",
}
DASHES = ["dot", "dash", "dashdot", "longdash"]  # tell controls apart, which are all grey


def signed_axis(positive: str, negative: str, *, unit: str = "nats") -> str:
    """An axis title with the sign convention: ``decision (nats): > 0 defect, < 0 cooperate``."""
    return f"decision ({unit}): > 0 {escape(positive)}, < 0 {escape(negative)}"


def trajectories(
    table: pd.DataFrame,
    *,
    series: str = "series",
    y_title: str,
    title: str,
    control: Sequence[str] = (),
    x: Depth = "layer",
) -> go.Figure:
    """``value`` by ``layer``: a line with its interval for each value of ``series``.

    Expects ``layer value low high`` and ``series``. Series named in ``control`` are grey.
    With ``x="depth"`` the axis is the column ``depth``, on which models with different numbers of
    layers can be compared; with ``x="step"`` it is ``step``, for checkpoints of one training.
    """
    figure, dashes = go.Figure(), dict(zip(control, DASHES * len(control)))
    for i, (name, own) in enumerate(table.groupby(series, sort=False)):
        color = CONTROL if name in dashes else PALETTE[i % len(PALETTE)]
        dash = dashes.get(str(name), "solid")
        _line_with_band(figure, own, x=x, name=str(name), color=color, dash=dash)
    figure.add_hline(y=0, line={"color": "black", "width": 1})
    ticks = {"depth": 0.25} if x != "layer" else {"layer": _tick(table.layer)}
    figure.update_xaxes(title=DEPTH_TITLES[x], dtick=ticks.get(x))
    figure.update_yaxes(title=y_title)
    return _styled(figure, title)


def growth(
    table: pd.DataFrame, *, series: str, x: str, x_title: str, y_title: str, title: str
) -> go.Figure:
    """``value`` by ``x``: a line for each value of ``series``, and dotted lines at 0 and 1."""
    figure = go.Figure()
    for i, (name, own) in enumerate(table.groupby(series, sort=False)):
        line = {"color": PALETTE[i % len(PALETTE)], "width": 2}
        figure.add_scatter(x=own[x], y=own.value, name=escape(str(name)), mode="lines", line=line)
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": CONTROL, "width": 1, "dash": "dot"})
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return _styled(figure, title)


def against_null(table: pd.DataFrame, *, label: str, title: str, x_title: str) -> go.Figure:
    """``value`` of each ``label`` over the range of chance, ``low expected high``."""
    figure = go.Figure()
    names = [escape(str(name)) for name in table[label]]
    figure.add_scatter(
        x=table.expected, y=names, mode="markers", name="chance, 95 %",
        marker={"color": CONTROL, "symbol": "line-ns-open", "size": 12},
        error_x={"type": "data", "symmetric": False, "array": table.high - table.expected,
                 "arrayminus": table.expected - table.low, "color": CONTROL, "thickness": 6},
    )  # fmt: skip
    figure.add_scatter(
        x=table.value, y=names, mode="markers", name="measured",
        marker={"color": PALETTE[1], "size": 11, "symbol": "diamond"},
    )  # fmt: skip
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(autorange="reversed", type="category")
    height = max(400, 32 * len(table) + 160)
    return _styled(figure, title).update_layout(height=height, margin={"l": 260})


def scatter(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    label: str,
    title: str,
    x_title: str,
    y_title: str,
    diagonal: bool = False,
) -> go.Figure:
    """One point for each row; hovering shows its ``label``.

    The five most extreme points show it always. ``diagonal`` draws the line y = x.
    """
    extremeness = ((table[[x, y]] - table[[x, y]].mean()) / table[[x, y]].std()).abs().max(axis=1)
    labelled = set(extremeness.nlargest(5).index)
    names = [escape(str(name)) for name in table[label]]
    figure = go.Figure(
        go.Scatter(
            x=table[x],
            y=table[y],
            text=[name if at in labelled else "" for at, name in zip(table.index, names)],
            customdata=names,
            mode="markers+text",
            textposition="bottom left",
            marker={"color": PALETTE[0], "size": 8, "opacity": 0.7},
            hovertemplate="%{customdata}<br>%{x:.3f}, %{y:.3f}<extra></extra>",
        )
    )
    if diagonal:
        ends = [min(table[x].min(), table[y].min()), max(table[x].max(), table[y].max())]
        figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": CONTROL, "dash": "dot"})
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return _styled(figure, title).update_layout(showlegend=False)


def trajectory_grid(
    table: pd.DataFrame, *, panel: str, series: str, y_title: str, title: str, x: Depth = "layer"
) -> go.Figure:
    """A small ``trajectories`` figure for each value of ``panel``, with shared axes."""
    panels = list(table[panel].unique())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows, columns, shared_xaxes=True, shared_yaxes=True, subplot_titles=list(map(str, panels)),
        vertical_spacing=0.12, horizontal_spacing=0.04,
    )  # fmt: skip
    colors = dict(zip(table[series].unique(), PALETTE * 10))
    for i, shown in enumerate(panels):
        at: dict[str, Any] = {"row": i // columns + 1, "col": i % columns + 1}
        here: pd.DataFrame = table.loc[table[panel] == shown]
        for name, own in here.groupby(series, sort=False):
            look = {"name": str(name), "color": colors[name], "dash": "solid", "legend": i == 0}
            _line_with_band(figure, own, x=x, **look, **at)
        figure.add_hline(y=0, line={"color": "black", "width": 1}, **at)
    figure.update_xaxes(title=DEPTH_TITLES[x].partition(" (")[0], row=rows)
    figure.update_yaxes(title=y_title, col=1, row=(rows + 1) // 2)
    return _styled(figure, title).update_layout(height=260 * rows + 120)


def heatmap(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    color_title: str,
    x_labels: Sequence[str] | None = None,
    text: bool = False,
) -> go.Figure:
    """``value`` over ``x`` and ``y``, centred on zero; ``x_labels`` name the x values in order."""
    grid = table.pivot(index=y, columns=x, values="value")
    grid = grid.loc[list(dict.fromkeys(table[y])), list(dict.fromkeys(table[x]))]
    bound = float(grid.abs().max().max() if grid.size else 0) or 1.0
    labels = [escape(str(v)) for v in (grid.columns if x_labels is None else x_labels)]
    ticks = list(range(len(labels)))
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=ticks,
            y=[escape(str(v)) for v in grid.index],
            zmin=-bound,
            zmax=bound,
            colorscale=DIVERGING,
            colorbar={"title": {"text": color_title, "side": "top"}},
            customdata=[labels] * len(grid),
            hovertemplate=f"{y} %{{y}}<br>{x} %{{customdata}}<br>%{{z:.3f}}<extra></extra>",
            texttemplate="%{z:.2f}" if text else None,
        )
    )
    figure.update_xaxes(title=x, tickvals=ticks, ticktext=labels, showgrid=False)
    figure.update_yaxes(title=y, type="category", showgrid=False)
    height = max(320, 26 * len(grid) + 160)
    return _styled(figure, title).update_layout(height=height)


def bars(
    table: pd.DataFrame, *, label: str, title: str, x_title: str, series: str | None = None
) -> go.Figure:
    """Horizontal bars of ``value`` with intervals, from top to bottom in the table's order."""
    figure = go.Figure()
    groups = [("", table)] if series is None else list(table.groupby(series, sort=False))
    for i, (name, own) in enumerate(groups):
        error = None
        if {"low", "high"} <= set(own) and own.high.notna().any():
            error = {
                "type": "data",
                "symmetric": False,
                "array": own.high - own.value,
                "arrayminus": own.value - own.low,
                "color": "black",
                "thickness": 1,
            }
        color = (
            [PALETTE[1] if v > 0 else PALETTE[0] for v in own.value]
            if series is None
            else PALETTE[i % len(PALETTE)]
        )
        figure.add_bar(
            x=own.value,
            y=[escape(str(v)) for v in own[label]],
            error_x=error,
            name=escape(str(name)),
            marker_color=color,
            orientation="h",
            showlegend=series is not None,
        )
    figure.add_vline(x=0, line={"color": "black", "width": 1})
    figure.update_yaxes(autorange="reversed", type="category", title=label)
    figure.update_xaxes(title=x_title)
    height = max(320, 22 * table[label].nunique() * max(1, len(groups) // 2) + 160)
    return _styled(figure, title).update_layout(height=height)


def token_grid(table: pd.DataFrame, *, title: str) -> go.Figure:
    """The most likely tokens (``layer rank token p``): probability as colour, the token as text."""
    grid = table.pivot(index="layer", columns="rank", values="p")
    tokens = table.pivot(index="layer", columns="rank", values="token")
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=[f"rank {rank}" for rank in grid.columns],
            y=list(grid.index),
            text=[[escape(repr(token)[1:-1]) for token in row] for row in tokens.to_numpy()],
            texttemplate="%{text}",
            colorscale="Blues",
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "p", "side": "top"}},
        )
    )
    figure.update_yaxes(title="layer (-1 = embedding)", dtick=1, showgrid=False)
    return _styled(figure, title).update_layout(height=26 * len(grid) + 160)


def attention_view(words: Sequence[str], patterns: Float[np.ndarray, "head pos pos"]) -> HTML:
    """Interactive attention patterns by circuitsvis, ``[head, destination, source]``.

    It works offline: circuitsvis' own display asks the network first, its bundled source does not.
    A word cannot end the script element that holds it.
    """
    safe = [word.replace("</", "<\u2060/").replace("<!", "<\u2060!") for word in words]
    from circuitsvis.attention import attention_heads  # imports torch, so only when it is used

    return HTML(attention_heads(attention=patterns, tokens=safe).local_src)


def limits(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Measured errors with their limits (``name value limit``), on a logarithmic axis."""
    figure = go.Figure()
    figure.add_scatter(
        x=table.value.clip(lower=SMALLEST_ERROR), y=table.name, mode="markers", name="measured",
        marker={"size": 12, "color": PALETTE[0]},
    )  # fmt: skip
    figure.add_scatter(
        x=table.limit, y=table.name, mode="markers", name="limit",
        marker={"size": 16, "symbol": "line-ns-open", "color": PALETTE[1], "line": {"width": 3}},
    )  # fmt: skip
    figure.update_xaxes(
        type="log",
        title=f"largest error ({SMALLEST_ERROR:.0e} stands for less)",
        exponentformat="e",
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return _styled(figure, title).update_layout(margin={"l": 260})


# ------------------------------------------------------------------------------------- internals
def _line_with_band(
    figure: go.Figure,
    own: pd.DataFrame,
    *,
    x: Depth,
    name: str,
    color: str,
    dash: str,
    legend: bool = True,
    **at: int,
) -> None:
    own, name = own.sort_values(x), escape(name)
    if own.low.notna().all():
        figure.add_scatter(
            x=[*own[x], *own[x][::-1]], y=[*own.high, *own.low[::-1]],
            fill="toself", fillcolor=color, opacity=BAND_OPACITY, line={"width": 0}, mode="lines",
            hoverinfo="skip", showlegend=False,
            legendgroup=name, **at,
        )  # fmt: skip
    figure.add_scatter(
        x=own[x], y=own.value, name=name, legendgroup=name, showlegend=legend,
        line={"color": color, "dash": dash, "width": 2}, mode="lines+markers", **at,
    )  # fmt: skip


def _tick(layers: pd.Series) -> int:
    return max(1, int(layers.max() - layers.min()) // 12) if len(layers) else 1


def _styled(figure: go.Figure, title: str) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        title=escape(title),
        font={"size": 13},
        margin={"l": 80, "r": 30, "t": 60, "b": 60},
        legend={"orientation": "h", "y": -0.2},
    )
