"""Figures that are text: tokens coloured by a value, and texts side by side or dose by dose.

A view is data. ``to_json`` is what a notebook records and a report reads again; ``fragment`` is its
HTML, which Jupyter shows and the report takes over as it is. Markup escapes every text of a model,
colours are the classes of ``views.css``, and without ``views.js`` all doses are shown.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

STEPS = 10  # colours on either side of zero
ANOTHER_TEXT = 1 / 3  # of two texts' words in common, below which they are not compared
# Control characters, and those that turn the direction of text: they are shown as their escapes.
INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
BREAK, TAB, SPACE = "↵\n", "⇥\t", "␣"
WORD = re.compile(r"\s*\S+|\s+$")


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColouredRow(_Data):
    """One text: its tokens, and a value for each, or ``None`` where it has none."""

    label: str
    tokens: tuple[str, ...]
    values: tuple[Annotated[float, Field(allow_inf_nan=False)] | None, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> "ColouredRow":
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.values)} values")
        return self


class TextRow(_Data):
    """Texts to compare, one for each column of a ``SideBySide``."""

    label: str
    texts: tuple[str, ...]


class _View(_Data):
    title: str
    slider: str = ""

    def to_json(self) -> str:
        """The data alone; ``read_view`` makes a view of it again."""
        return self.model_dump_json(indent=1)

    def words(self) -> str:
        """What the view shows, in a sentence, for a caption."""
        raise NotImplementedError

    def fragment(self) -> Markup:
        """The view as HTML without styles of its own."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return in_jupyter(self.fragment())


class ColouredText(_View):
    """Rows of tokens coloured by a value, or one row at a time, chosen by a slider."""

    view: Literal["coloured_text"] = "coloured_text"
    value_title: str
    rows: tuple[ColouredRow, ...]

    def words(self) -> str:
        labels = ", ".join(row.label for row in self.rows)
        which = (self.slider or "shown").capitalize()
        return f"{self.title}. Colour: {self.value_title}. {which}: {labels}."

    def fragment(self) -> Markup:
        values = [value for row in self.rows for value in row.values if value is not None]
        bound = max(map(abs, values), default=0.0) or 1.0
        sides = [-1 for v in values if v < 0][:1] + [1 for v in values if v > 0][:1]
        largest = [max((abs(v) for v in row.values if v is not None), default=0.0)
                   for row in self.rows]  # fmt: skip
        start = largest.index(max(largest)) if largest else 0
        parts = [_legend(self.value_title, bound, sides)]
        parts += [_slider(self.slider, len(self.rows), start)] if self.slider else []
        for i, row in enumerate(self.rows):
            step = _step(i, row.label) if self.slider else Markup("")
            tokens = Markup("").join(
                coloured(token, value, bound) for token, value in zip(row.tokens, row.values)
            )
            parts.append(
                Markup('<div class="ik-row"{}><p class="ik-label">{}</p>{}</div>').format(
                    step, visible(row.label), text_block(tokens)
                )
            )
        return view_block(self.title, parts)

    def __repr__(self) -> str:
        return f"<coloured text, {len(self.rows)} rows: {self.title}>"


class SideBySide(_View):
    """Texts in columns; what differs from the first column is marked.

    With a ``slider`` the first column stays, and the others are shown one at a time.
    """

    view: Literal["side_by_side"] = "side_by_side"
    columns: tuple[str, ...] = Field(min_length=1)
    rows: tuple[TextRow, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> "SideBySide":
        for row in self.rows:
            if len(row.texts) != len(self.columns):
                raise ValueError(
                    f"row {row.label!r} has {len(row.texts)} texts for {len(self.columns)} columns"
                )
        return self

    def words(self) -> str:
        columns = ", ".join(self.columns)
        return f"{self.title}. Columns: {columns}; marked: what differs from {self.columns[0]}."

    def fragment(self) -> Markup:
        dosed = bool(self.slider) and len(self.columns) > 1
        others = range(1, len(self.columns))
        differ = (i for i in others if any(row.texts[i] != row.texts[0] for row in self.rows))
        start = next(differ, 1) - 1  # the first dose that does something
        parts = [_slider(self.slider, len(others), start)] if dosed else []
        for row in self.rows:
            cells = []
            for i, (column, text) in enumerate(zip(self.columns, row.texts)):
                shown = visible(text) if i == 0 else marked(row.texts[0], text)
                cells.append(
                    Markup('<div class="ik-cell"{}><p class="ik-head">{}</p>{}</div>').format(
                        _step(i - 1, column) if dosed and i else "",
                        visible(column),
                        text_block(shown),
                    )
                )
            label = Markup('<p class="ik-label">{}</p>').format(visible(row.label))
            row_class = "ik-columns ik-pair" if dosed else "ik-columns"
            parts.append(
                Markup('<div class="ik-row">{}<div class="{}">{}</div></div>').format(
                    label, row_class, Markup("").join(cells)
                )
            )
        return view_block(self.title, parts)

    def __repr__(self) -> str:
        return f"<texts side by side, {len(self.rows)} rows: {self.title}>"


View = ColouredText | SideBySide
_VIEWS: TypeAdapter[View] = TypeAdapter(Annotated[View, Field(discriminator="view")])


def coloured_text(
    table: pd.DataFrame,
    *,
    row: str,
    title: str,
    value_title: str,
    words: Sequence[str] | None = None,
    slider: str = "",
) -> ColouredText:
    """A text for each value of ``row``, its tokens coloured by ``value``.

    Expects ``row token value``, the tokens in order; or, of the tokens ``words`` of one text,
    ``row pos value``, which may leave out positions. A value that is no finite number counts as
    none. Red is positive, blue negative; ``value_title`` gives unit and sign. ``slider`` names what
    the rows are (a layer, a strength): then one is shown at a time, the strongest first.
    """
    rows = []
    for label, own in table.groupby(row, sort=False):
        if words is None:
            tokens, values = own.token, own.value
        else:
            tokens, values = words, own.set_index("pos").value.reindex(range(len(words)))
        finite = [float(v) if abs(v) < float("inf") else None for v in values]
        rows.append(ColouredRow(label=str(label), tokens=tuple(tokens), values=tuple(finite)))
    return ColouredText(title=title, value_title=value_title, rows=tuple(rows), slider=slider)


def side_by_side(
    table: pd.DataFrame, *, row: str, column: str, title: str, slider: str = ""
) -> SideBySide:
    """``text`` in a grid of the values of ``row`` and ``column``, both in the table's order.

    What differs from the first column is marked, word by word. ``slider`` names what the other
    columns are doses of: then the first column stays and one of them at a time is shown beside it.
    A text that is not in the table is empty.
    """
    columns = list(dict.fromkeys(table[column]))
    grid = table.pivot(index=row, columns=column, values="text").fillna("")
    rows = tuple(
        TextRow(label=str(label), texts=tuple(str(grid.loc[label, name]) for name in columns))
        for label in dict.fromkeys(table[row])
    )
    return SideBySide(title=title, columns=tuple(map(str, columns)), rows=rows, slider=slider)


def read_view(text: str) -> View:
    """The view of what ``to_json`` wrote; pydantic's ``ValidationError`` for anything else."""
    return _VIEWS.validate_json(text)


# ------------------------------------------------------------------------------ pieces of markup
def coloured(token: str, value: float | None, bound: float) -> Markup:
    """A token in the colour of its value, which is shown on hover and focus, and read aloud."""
    if value is None:
        return visible(token)
    return Markup(
        '<span class="ik-token {}" tabindex="0">{}<span class="ik-value"> {}</span></span>'
    ).format(_colour(value / bound), visible(token, spaces=True), number(value))


def visible(text: str, *, spaces: bool = False) -> Markup:
    """The text, escaped, with escapes for what would be invisible or turn the text around.

    With ``spaces`` a text of spaces, tabs or line breaks alone is visible, too.
    """
    shown = INVISIBLE.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
    if spaces:
        shown = shown.replace("\t", TAB).replace("\n", BREAK)
        shown = shown.replace(" ", SPACE) if not shown.strip(" ") else shown
    return Markup("{}").format(shown)


def marked(reference: str, text: str) -> Markup:
    """The text; words that do not stand in the reference at that place are marked.

    The space before them is not. All of it is marked where the two share fewer than a third of
    their words.
    """
    ours, theirs = WORD.findall(text), WORD.findall(reference)
    matcher = SequenceMatcher(a=theirs, b=ours, autojunk=False)
    parts = []
    if matcher.ratio() < ANOTHER_TEXT:  # a word that both happen to have is no agreement
        return Markup("<mark>{}</mark>").format(visible(text)) if text else Markup("")
    for kind, _, _, first, last in matcher.get_opcodes():
        part = "".join(ours[first:last])
        if kind == "equal" or not part:
            parts.append(visible(part))
        else:
            words = part.lstrip() or part
            space = part.removesuffix(words)
            parts.append(Markup("{}<mark>{}</mark>").format(visible(space), visible(words)))
    return Markup("").join(parts)


def text_block(inside: Markup) -> Markup:
    """A paragraph that keeps spaces and line breaks."""
    return Markup('<p class="ik-text" dir="auto">{}</p>').format(inside)


def view_block(title: str, parts: Sequence[Markup]) -> Markup:
    """A whole view, with its title."""
    return Markup(
        '<div class="ik-view" role="group" aria-label="{}"><p class="ik-title">{}</p>{}</div>'
    ).format(visible(title), visible(title), Markup("").join(parts))


def in_jupyter(fragment: Markup) -> str:
    """The fragment with the style and the script that it needs, for one output of a notebook."""
    style, script = Markup(assets()["css"]), Markup(assets()["js"])
    return str(Markup("<style>{}</style>{}<script>{}</script>").format(style, fragment, script))


@cache
def assets() -> Mapping[str, str]:
    """The style (``css``) and the script (``js``) that fragments need."""
    here = Path(__file__)
    return {kind: here.with_suffix(f".{kind}").read_text("utf-8") for kind in ("css", "js")}


def number(value: float) -> str:
    """Three significant digits, or so: ``0.123``, ``-12.3``, ``1e-05``."""
    return "0" if value == 0 else f"{value:.3f}" if 0.01 <= abs(value) < 1e4 else f"{value:.2g}"


# ------------------------------------------------------------------------------------- internals
def _colour(share: float) -> str:
    """The class of a value, as a share of the largest one: -1 to 1."""
    step = round(STEPS * share)
    return f"ik-{'n' if step < 0 else 'p'}{abs(step)}" if step else "ik-0"


def _legend(title: str, bound: float, sides: Sequence[int]) -> Markup:
    """The colours from the smallest to the largest value, with numbers; zero is neutral."""
    low, high = min([0, *sides]), max([0, *sides])
    swatches = [
        Markup('<span class="ik-swatch {}"></span>').format(_colour(step / STEPS))
        for step in range(low * STEPS, high * STEPS + 1)
    ]
    middle = Markup('<span class="ik-zero">0</span>') if low < 0 < high else Markup("")
    half = STEPS if middle else len(swatches)
    return Markup(
        '<p class="ik-legend"><span>{}:</span> <span class="ik-ends"><span>{}</span> '
        '<span class="ik-scale">{}</span>{}<span class="ik-scale">{}</span> <span>{}</span>'
        "</span></p>"
    ).format(
        visible(title), number(low * bound), Markup("").join(swatches[:half]), middle,
        Markup("").join(swatches[half:]), number(high * bound),
    )  # fmt: skip


def _slider(label: str, steps: int, start: int) -> Markup:
    """A slider over ``steps``; hidden until the script shows it."""
    return Markup(
        '<label class="ik-slider" hidden>{} <input type="range" min="0" max="{}" step="1"'
        ' value="{}"> <output></output></label>'
    ).format(visible(label), max(steps - 1, 0), start)


def _step(i: int, label: str) -> Markup:
    return Markup(' data-step="{}" data-label="{}"').format(i, visible(label))
