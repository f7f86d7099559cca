"""A first look at one prompt: the decision, where it is made, and by which components.

``look`` calls the analyses with their defaults and puts what they return side by side; a study with
intervals and controls over many prompts is what the notebooks are for.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.analyses.activation_patching import activation_patching, evenly
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.lens import logit_lens
from interp_kit.decisions import answer_log_probs, decide
from interp_kit.figures import heatmap, signed_axis, trajectories
from interp_kit.loading import load_model
from interp_kit.passes import shared_passes
from interp_kit.patching.positions import corresponding
from interp_kit.prompts import encode
from interp_kit.specs import InputError
from interp_kit.tokenized import Prompt, prompt_fragment
from interp_kit.views import ColouredText, coloured_text, in_jupyter, view_block

LAYERS = 8  # before which the stream is patched word by word, at most
STRONGEST = 6  # components that are listed


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """What ``look`` found: tables of the analyses, and ``figures`` of them.

    ``decision`` is a row of ``decide``; ``probabilities`` are p(answer | prompt) by label; ``lens``
    is the table of ``logit_lens``, ``attribution`` that of ``direct_logit_attribution``,
    ``patching`` that of ``activation_patching`` and ``by_position`` that of the residual stream at
    each position, denoising. The last two are empty without a counterfactual.
    """

    prompt: Prompt
    decision: pd.DataFrame
    probabilities: dict[str, float]
    lens: pd.DataFrame
    attribution: pd.DataFrame
    patching: pd.DataFrame
    by_position: pd.DataFrame

    @property
    def strongest(self) -> pd.DataFrame:
        """The components that move the decision most, or write most of it if none was patched.

        ``component``; ``attribution``, what it writes towards the decision; ``denoise`` and
        ``noise``, the change when it alone is patched: all in nats.
        """
        table = self.attribution.rename(columns={"value": "attribution"})
        columns, by = ["component", "attribution"], "attribution"
        if len(self.patching):
            changes = self.patching.pivot(index="component", columns="direction", values="change")
            table = changes.reset_index().merge(table, on="component")
            columns, by = [*columns, "denoise", "noise"], "denoise"
        sized = table[columns].assign(size=lambda t: t[by].abs())
        return sized.nlargest(STRONGEST, "size").drop(columns="size").reset_index(drop=True)

    @property
    def figures(self) -> dict[str, go.Figure | ColouredText]:
        """``lens`` and ``heads``; with a counterfactual ``patched_heads`` and ``text``."""
        own = self.prompt
        sign = signed_axis(own.positive_label, own.negative_label)
        curve = self.lens.assign(series=own.id, low=float("nan"), high=float("nan"))
        heads = self.attribution.query("kind == 'head'")
        grid: dict[str, Any] = {"x": "head", "y": "layer", "color_title": "nats"}
        figures: dict[str, go.Figure | ColouredText] = {
            "lens": trajectories(curve, y_title=sign, title="Decision, read after each layer"),
            "heads": heatmap(heads, title="What each head writes", **grid),
        }
        if len(self.patching):
            patched = self.patching.query("head >= 0 and direction == 'denoise'")
            patched = patched.assign(value=patched.change)
            title = "Change when a head is patched, denoising"
            figures["patched_heads"] = heatmap(patched, title=title, **grid)
            figures["text"] = coloured_text(
                self.by_position.assign(value=self.by_position.change),
                row="layer",
                words=own.spelled(own.branch),
                slider="before layer",
                title="Residual stream of each word, written into the counterfactual's run",
                value_title=f"change of the {sign}",
            )
        return figures

    def __repr__(self) -> str:
        value = self.decision.value.item()
        lines = [repr(self.prompt), f"decision {value:.3f} nats; {self._answers()}"]
        return "\n".join([*lines, self.strongest.round(3).to_string(index=False)])

    def _repr_html_(self) -> str:
        own, at = self.prompt, self.lens.layer
        names = at.where(at >= 0, "embedding").astype(str)
        lens = coloured_text(
            self.lens.assign(row="after layer", token=" " + names + " "),
            row="row",
            title="Logit lens",
            value_title=signed_axis(own.positive_label, own.negative_label),
        )
        answers = Markup("<p>decision {} nats; {}</p>").format(
            f"{self.decision.value.item():.3f}", self._answers()
        )
        words = self.figures.get("text")
        parts = [answers, prompt_fragment(own), lens.fragment()]
        parts += [words.fragment()] if isinstance(words, ColouredText) else []
        number = "{:.3f}".format
        strongest = self.strongest.to_html(
            index=False, float_format=number, classes="ik-table", border=0
        )
        parts += [Markup('<p class="ik-label">strongest components (nats)</p>{}').format(
            Markup(strongest))]  # fmt: skip
        return in_jupyter(view_block("A first look", parts))

    def _answers(self) -> str:
        return ", ".join(f"p({name}) = {p:.3g}" for name, p in self.probabilities.items())


def look(
    model: Any,
    prompt: Prompt | str,
    *,
    positive: str | None = None,
    negative: str | None = None,
    counterfactual: str | None = None,
    chat_template: bool = True,
) -> Look:
    """Decision, logit lens and direct attribution of a prompt; with a counterfactual, patching.

    ``model`` is a ``TransformerBridge``, or a name as ``load_model`` takes it. Answers and
    ``counterfactual`` are as in ``encode``; a ``Prompt`` holds them already.

    Raises ``InputError`` for what is no bridge, for a counterfactual of another length (words
    could not be patched one by one), and as ``encode``.
    """
    bridge = _bridge(model)
    if isinstance(prompt, str):
        if positive is None or negative is None:
            raise InputError(
                "two answers are needed; give them as they continue the text: positive=' Paris', "
                "negative=' Rome'"
            )
        prompt = encode(
            bridge,
            prompt,
            positive=positive,
            negative=negative,
            counterfactual=counterfactual,
            labels=(positive.strip() or repr(positive), negative.strip() or repr(negative)),
            chat_template=chat_template,
        )
    elif (positive, negative, counterfactual) != (None, None, None):
        raise InputError(
            "a Prompt holds its answers and its counterfactual; give a text with new ones, or the "
            "Prompt alone"
        )
    patching = by_position = pd.DataFrame()
    if prompt.counterfactual is not None:
        corresponding(prompt, "each")  # raises before anything is computed
    with shared_passes():
        decision, log_p = decide(bridge, [prompt]), answer_log_probs(bridge, [prompt])
        lens, attribution = logit_lens(bridge, [prompt]), direct_logit_attribution(bridge, [prompt])
        if prompt.counterfactual is not None:
            patching = activation_patching(bridge, [prompt])
            layers = evenly(range(bridge.cfg.n_layers), LAYERS)
            by_position = activation_patching(
                bridge,
                [prompt],
                unit="resid_pre",
                among=[f"L{layer}_RESID_PRE" for layer in layers],
                positions="each",
                directions=["denoise"],
            )
    labels = (prompt.positive_label, prompt.negative_label)
    return Look(
        prompt=prompt,
        decision=decision,
        probabilities={
            label: float(log_p[sign].exp()) for label, sign in zip(labels, ("positive", "negative"))
        },
        lens=lens,
        attribution=attribution,
        patching=patching,
        by_position=by_position,
    )


# ------------------------------------------------------------------------------------- internals
def _bridge(model: Any) -> TransformerBridge:
    if isinstance(model, str):
        return load_model(model)
    if isinstance(model, TransformerBridge):
        return model
    raise InputError(
        f"expected a TransformerBridge or a model's name, got {type(model).__name__}; a "
        "HookedTransformer or a Hugging Face model becomes a bridge by "
        "TransformerBridge.boot_transformers(NAME), with hf_model=MODEL for one in memory"
    )
