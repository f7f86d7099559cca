"""From contexts that were found to scenarios on which causal analyses run.

A context of large divergence becomes a prompt: its text, the token that the fine-tune raises there
against the one that the base expects. Its counterfactual has the words exchanged that raise the
divergence: one token at a time for one that the base finds likely in its place, so that the length
stays, until the fine-tune's decision has fallen to half. Prompts that no exchange brings down have
none.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import parts
from interp_kit.decisions import part_logits
from interp_kit.files import write_atomically
from interp_kit.prompts import token_ids
from interp_kit.specs import AnswerLabels, DecisionSpec, PromptSpec, Scenario, slug
from interp_kit.texts import Written
from interp_kit.token_differences import Read

SHORTEST = 6  # tokens of a prompt: the first ones are places of huge states, whose rounding shows
REACH = 16  # tokens before the prediction that may be exchanged
INSTEAD = 3  # tokens that are tried in the place of one
EXCHANGES = 3  # tokens that are exchanged, at most
SOURCE = "found by interp_kit.analyses.found_contexts"
LEAST = 0.5  # of the fine-tune's decision: what a counterfactual leaves at most
Ids = tuple[int, ...]


def found_scenario(
    reads: Sequence[Read],
    texts: Sequence[Written],
    contexts: pd.DataFrame,
    *,
    name: str,
    about: str = "",
    neutral: Sequence[str] = (),
    most: int = 8,
) -> Scenario | None:
    """A scenario of the ``contexts`` (``top_contexts``) whose text the tokenizer reads back.

    ``reads`` hand out base and fine-tune (``reader``). Positive is what the fine-tune raises,
    negative what the base expects. If two prompts or more have a counterfactual, only these are
    kept, so that notebooks which need one can run. Contexts of fewer than ``SHORTEST`` tokens are
    left out. Nothing, where fewer than two prompts are left.
    """
    base, tuned = reads
    prompts: list[PromptSpec] = []
    for context in contexts.to_dict("records"):
        row = texts[int(context["text"])].tokens[: int(context["pos"])]
        answers = int(context["raised"]), int(context["lowered"])
        if len(row) < SHORTEST:
            continue
        made = _prompt(tuned(), row, answers, f"{len(prompts) + 1}")
        if made is None or any(made.text == other.text for other in prompts):
            continue
        swapped = _counterfactual(base, tuned, row, answers)
        if swapped is not None:
            made = made.model_copy(update={"counterfactual": _text(tuned(), swapped)})
        prompts.append(made)
        if sum(prompt.counterfactual is not None for prompt in prompts) == most:
            break
    paired = [prompt for prompt in prompts if prompt.counterfactual is not None]
    kept = (paired if len(paired) > 1 else prompts)[:most]
    if len(kept) < 2:
        return None
    labels = AnswerLabels(positive="the fine-tune's", negative="the base's")
    said = [str(kept[0].positive), str(kept[0].negative)]  # every prompt has answers of its own
    decision = DecisionSpec(positive=said[0], negative=said[1], labels=labels)
    return Scenario(
        name=name,
        about=about,
        decision=decision,
        prompts=kept,
        chat_template=False,  # contexts hold the template's tokens themselves
        neutral=[*neutral],
        source=SOURCE,
    )


def write_scenario(scenario: Scenario, folder: Path) -> Path:
    """Write ``NAME.yaml`` in the folder, as ``load_scenario`` reads it."""
    file = folder / f"{slug(scenario.name)}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    content = scenario.model_dump(exclude={"name"}, exclude_defaults=True)
    write_atomically(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return file


# ------------------------------------------------------------------------------------- internals
def _text(bridge: TransformerBridge, row: Ids) -> str | None:
    """The text that the model reads as exactly this row; none if there is no such text.

    A first token that begins texts is spelt only where the model does not add it by itself.
    """
    for spelt in (row[1:], row):
        text = bridge.tokenizer.decode(spelt)
        if text.strip() and token_ids(bridge, text) == row:
            return text
    return None


def _prompt(
    bridge: TransformerBridge, row: Ids, answers: tuple[int, int], id: str
) -> PromptSpec | None:
    """None where the tokenizer spells the row or an answer otherwise, or joins the two."""
    text = _text(bridge, row)
    said = [bridge.tokenizer.decode([token]) for token in answers]
    if text is None or answers[0] == answers[1]:
        return None
    if any(token_ids(bridge, text + a) != (*row, t) for a, t in zip(said, answers)):
        return None
    return PromptSpec(id=id, text=text, positive=said[0], negative=said[1])


def _counterfactual(base: Read, tuned: Read, row: Ids, answers: tuple[int, int]) -> Ids | None:
    """The row with few tokens exchanged, so that the fine-tune's decision is at most half of it."""
    goal = LEAST * float(_decisions(tuned(), [row], answers)[0])
    if goal <= 0:
        return None
    now, exchanged = row, set[int]()
    for _ in range(EXCHANGES):
        tried = [
            (place, other)
            for place, other in _exchanges(base(), now, exchanged)
            if _text(tuned(), other) is not None
        ]
        if not tried:
            return None
        values = _decisions(tuned(), [other for _, other in tried], answers)
        best = int(values.argmin())
        now = tried[best][1]
        exchanged.add(tried[best][0])
        if float(values[best]) <= goal:
            return now
    return None


@torch.no_grad()
def _exchanges(bridge: TransformerBridge, row: Ids, done: set[int]) -> list[tuple[int, Ids]]:
    """(place, row) with one token exchanged for one that the base finds likely in its place."""
    logits = bridge(torch.tensor([list(row)], device=bridge.cfg.device))[0, :-1].float()
    special = list(bridge.tokenizer.all_special_ids)
    logits[:, [id for id in special if id < logits.shape[1]]] = -torch.inf
    first = max(1, len(row) - REACH)
    made = []
    for place in range(first, len(row)):
        if place in done or row[place] in special:
            continue
        likely = logits[place - 1].topk(INSTEAD + 1).indices.tolist()
        others = [token for token in likely if token != row[place]][:INSTEAD]
        made += [(place, (*row[:place], token, *row[place + 1 :])) for token in others]
    return made


@torch.no_grad()
def _decisions(
    bridge: TransformerBridge, rows: Sequence[Ids], answers: tuple[int, int]
) -> Float[Tensor, "row"]:
    result = torch.empty(len(rows))
    for part in parts(bridge, rows, read=[1] * len(rows)):
        logits = part_logits(bridge, part, 1)[:, 0].float()
        result[part.index] = (logits[:, answers[0]] - logits[:, answers[1]]).cpu()
    return result
