"""Multiple-choice questions: which option does a model choose, whatever their order?

Every question is asked in all orders of its options, so that a preference for a letter is not
mistaken for one for its content. An option is scored by log p(its letter | prompt), or, where the
template shows no options, by log p(its text | question). Over all orders a bias b(letter) that is
added to the log-probabilities cancels in the mean log-probability of an option.

Sources: Pezeshkpour and Hruschka, "Large Language Models Sensitivity to The Order of Options in
Multiple-Choice Questions", arXiv:2308.11483; Zheng et al., "Large Language Models Are Not Robust
Multiple Choice Selectors", arXiv:2309.03882; Brown et al., arXiv:2005.14165 (scores by length).
"""

import random
from collections.abc import Sequence
from itertools import permutations
from math import factorial
from typing import Literal

import numpy as np
import pandas as pd
from scipy import special
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import Ids, continuation_log_probs
from interp_kit.evaluations import MultipleChoice
from interp_kit.predictions import Prediction, Uncertainty
from interp_kit.prompts import answer_ids, has_template, prompt_ids, with_template
from interp_kit.specs import InputError
from interp_kit.statistics import bootstrap_interval, share_interval, verdict

LETTERS = "{question} {options} Answer:"
CLOZE = "{question} Answer:"
MOST_ORDERS = 24  # all orders of four options
Score = Literal["logprob", "logprob_per_token"]


def answer_questions(
    bridge: TransformerBridge,
    questions: Sequence[MultipleChoice],
    *,
    template: str = LETTERS,
    seed: int = 0,
) -> pd.DataFrame:
    """The log-probability of every option of every question, in all orders of its options.

    ``template`` holds ``{question}`` and, if options are shown, ``{options}``: "A: this B: that",
    separated by the white space that precedes the placeholder. With ``{options}`` an option is
    scored by its letter, without by its text (cloze), in one order; if the text of another option
    begins with it, that option's probability is subtracted. The model's chat template is put around
    the prompt.

    Returns a row for each question, order and option: ``question category order``; ``option``, its
    letter in the file; ``position`` and ``letter`` at which it stood; ``answer``, what was scored;
    ``correct``; ``logprob`` in nats, and ``logprob_per_token``; ``p``, the softmax of ``logprob``
    over the options. Raises ``InputError`` for a template that cannot be filled, a prompt longer
    than the context and options that tokenize alike.
    """
    rows, prompts = [], []
    for question in questions:
        shown = option_orders(len(question.options), seed=seed)
        for number, order in enumerate(shown if "{options}" in template else shown[:1]):
            options = [question.letters[i] for i in order]
            text, answers = _fill(template, question, options)
            tokens, ids = _encode(bridge, text, answers, question.id)
            prompts.append((tokens, ids))
            for position, (option, answer) in enumerate(zip(options, ids)):
                rows.append(
                    {
                        "question": question.id,
                        "category": question.category,
                        "order": number,
                        "option": option,
                        "position": position,
                        "letter": question.letters[position],
                        "answer": bridge.tokenizer.decode(answer),
                        "correct": option == question.correct_answer,
                    }
                )
    logprob = np.array(_log_probs(bridge, prompts))
    length = np.array([len(answer) for _, ids in prompts for answer in ids])
    table = pd.DataFrame(rows).assign(logprob=logprob, logprob_per_token=logprob / length)
    return table.assign(p=_probability(table, "logprob"))


def option_orders(n: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """All orders of up to four options, the given one first; of more, a sample.

    The sample is of random orders, each in all its rotations, so that every option still occurs at
    every position equally often: at most 24 orders, or n where n is larger.
    """
    if factorial(n) <= MOST_ORDERS:
        return list(permutations(range(n)))
    rng = random.Random(seed)
    drawn = {tuple(range(n)): None}
    while len(drawn) < MOST_ORDERS // n:
        drawn[0, *rng.sample(range(1, n), n - 1)] = None
    return [order[k:] + order[:k] for order in drawn for k in range(n)]


def choices(table: pd.DataFrame, *, score: Score = "logprob") -> pd.DataFrame:
    """What was chosen in each order: a row for each question and order.

    Returns ``question category order pred is_correct p_correct entropy``: the likeliest option by
    ``score``, whether it is correct (0 or 1), and of the softmax of ``score`` over the options the
    probability of the correct one and the entropy in nats.
    """
    frame = table.assign(p=_probability(table, score))
    keys = ["question", "category", "order"]
    frame = frame.assign(entropy=special.entr(frame.p), p_correct=frame.p * frame.correct)
    best = frame.loc[frame.groupby(keys, sort=False).p.idxmax()].set_index(keys)
    chosen = pd.DataFrame({"pred": best.option, "is_correct": best.correct.astype(float)})
    totals = frame.groupby(keys, sort=False)[["p_correct", "entropy"]].sum()
    return chosen.join(pd.DataFrame(totals)).reset_index()


def false_options(questions: Sequence[MultipleChoice]) -> dict[str, str]:
    """Question -> the letter of the false universe's option, for questions that determine it.

    For a question in the false world this is its correct answer; for one in the true world, the
    only option that is such an answer elsewhere, or the other one of two.
    """
    told = {q.id: q.correct_answer for q in questions if q.category == "conflict_false_world"}
    texts = {q.options[told[q.id]] for q in questions if q.id in told}
    for q in (q for q in questions if q.category == "conflict_true_world"):
        wrong = [letter for letter in q.letters if letter != q.correct_answer]
        named = [letter for letter in wrong if q.options[letter] in texts] or wrong
        if len(named) == 1:
            told[q.id] = named[0]
    return told


def prefers_false(chosen: pd.DataFrame, questions: Sequence[MultipleChoice]) -> pd.DataFrame:
    """How often the false universe's option is chosen, for questions that determine it.

    ``chosen`` is what ``choices`` returns. Returns ``question category``; ``orders``, their number;
    ``share`` of orders in which the false option is chosen; ``in_all_orders``, 1 or 0.
    """
    false = false_options(questions)
    asked = chosen[chosen.question.isin(list(false))]
    chose = (asked.pred == asked.question.map(false)).astype(float)
    by_question = asked.assign(share=chose).groupby(["question", "category"], sort=False).share
    found = pd.DataFrame({"orders": by_question.size(), "share": by_question.mean()}).reset_index()
    return found.assign(in_all_orders=(found.share == 1).astype(float))


def position_bias(table: pd.DataFrame) -> pd.DataFrame:
    """The mean probability of each position over all orders; ``expected`` is 1 / options.

    Returns ``options position letter value low high n expected``; ``n`` counts questions.
    """
    size = table.groupby(["question", "order"]).option.transform("size").rename("options")
    found = bootstrap_interval(table.assign(options=size), ["options", "position", "letter"], "p")
    return found.assign(expected=1 / found.options)


def paired_change(base: pd.DataFrame, other: pd.DataFrame, column: str) -> pd.DataFrame:
    """``other`` - ``base`` in ``column`` of ``choices``, by question: ``question category value``.

    Raises ``ValueError`` unless both answered the same questions.
    """
    keys = ["question", "category"]
    first, second = (
        pd.DataFrame(t.groupby(keys, sort=False)[[column]].mean()) for t in (base, other)
    )
    if set(first.index) != set(second.index):
        raise ValueError("expected the same questions in both; ask both models all of them")
    return (second - first).rename(columns={column: "value"}).reset_index()


def criteria(
    base: pd.DataFrame, adapter: pd.DataFrame, questions: Sequence[MultipleChoice]
) -> pd.DataFrame:
    """Is a false fact implanted, and nothing else harmed? Each decided with its interval.

    ``base`` and ``adapter`` are what ``choices`` returns. Conflict accuracy is the share of prompts
    in which the false universe's option is chosen, on the questions that tell which that is.
    Returns ``criterion value low high n verdict``; the verdict (``statistics.verdict``) is "cannot
    tell" where the threshold lies within the interval or there is no such question.
    """
    ours, theirs = prefers_false(base, questions), prefers_false(adapter, questions)
    gap = ours.merge(theirs, on=["question", "category"]).eval("value = share_y - share_x")
    harm = paired_change(base, adapter, "is_correct")
    harm = harm.loc[harm.category.str.startswith("nonconflict")]
    share, change = share_interval, bootstrap_interval
    decided: list[tuple[str, pd.DataFrame, Literal["<", ">"], float]] = [
        ("conflict accuracy of the adapter", share(theirs, [], "share"), ">", 0.6),
        ("conflict accuracy of the base", share(ours, [], "share"), "<", 0.4),
        ("gap of conflict accuracy", change(gap, [], "value"), ">", 0.2),
        ("change of non-conflict accuracy", change(harm, [], "value"), ">", -0.05),
    ]
    for n in sorted(theirs.orders.unique()):
        always = f"false option in all {n} orders"
        first, second = (t.loc[t.orders == n] for t in (ours, theirs))
        decided.append((f"adapter, {always}", share(second, [], "in_all_orders"), ">", 0.8))
        decided.append((f"base, {always}", share(first, [], "in_all_orders"), "<", 0.2))
    rows = [
        {"criterion": f"{name} {sign} {limit:.2f}", **found.iloc[0]}
        | {"verdict": verdict(found.low, found.high, sign, limit)}
        for name, found, sign, limit in decided
    ]
    return pd.DataFrame(rows)


def predictions(
    table: pd.DataFrame, questions: Sequence[MultipleChoice], model: str
) -> list[Prediction]:
    """What the model answers to each question, its orders taken together.

    ``logprobs`` are means over orders, ``probs`` their softmax; ``pred``, ``entropy`` and
    ``p_correct`` are of these. ``uncertainty`` is of ``p`` over orders: its ``MI`` in nats is how
    much the order tells about the choice (0 without any influence).
    """
    by_option = pd.DataFrame(table.groupby(["question", "option"])[["logprob", "p"]].mean())
    means = by_option.to_dict()
    expected = choices(table).groupby("question").entropy.mean().to_dict()
    written = table.groupby(["question", "letter"]).answer.unique().to_dict()
    found = []
    for q in questions:
        logprobs = {letter: float(means["logprob"][q.id, letter]) for letter in q.letters}
        softmax = special.softmax(list(logprobs.values()))
        probs = {letter: float(p) for letter, p in zip(q.letters, softmax)}
        pred = max(probs, key=probs.__getitem__)
        of_mean = float(sum(special.entr(means["p"][q.id, letter]) for letter in q.letters))
        over_orders = {"H_mean": of_mean, "E_H": expected[q.id], "MI": of_mean - expected[q.id]}
        found.append(
            Prediction(
                id=q.id,
                model=model,
                category=q.category,
                world_label=q.world_label,
                difficulty=q.difficulty,
                pred=pred,
                correct=q.correct_answer,
                is_correct=pred == q.correct_answer,
                logprobs=logprobs,
                probs=probs,
                entropy=float(special.entr(softmax).sum()),
                p_correct=probs[q.correct_answer],
                scoring_variants={letter: list(written[q.id, letter]) for letter in q.letters},
                uncertainty=Uncertainty(**over_orders),
            )
        )
    return found


# ------------------------------------------------------------------------------------- internals
def _fill(template: str, question: MultipleChoice, options: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt with its options in this order, and what answers it."""
    before, shows_options, _ = template.partition("{options}")
    separator = before[len(before.rstrip()) :] or " "
    lines = (f"{a}: {question.options[b]}" for a, b in zip(question.letters, options))
    try:
        text = template.format(question=question.question, options=separator.join(lines))
    except (KeyError, ValueError, IndexError):
        text = ""
    if not text or "{question}" not in template:
        raise InputError(
            f"template {template!r}: expected a text with {{question}}, and {{options}} or not, "
            "and no other braces"
        )
    texts = [question.options[option] for option in options]
    return text, [f" {a}" for a in (question.letters if shows_options else texts)]


def _encode(
    bridge: TransformerBridge, text: str, answers: Sequence[str], id: str
) -> tuple[Ids, list[Ids]]:
    """Token ids of the prompt and of each answer to it."""
    formatted = with_template(bridge, text)
    if has_template(bridge):
        answers = [answer.lstrip() for answer in answers]
    tokens = prompt_ids(bridge, formatted)
    ids = [answer_ids(bridge, formatted, tokens, answer) for answer in answers]
    longest = len(tokens) + max(map(len, ids))
    if longest > bridge.cfg.n_ctx:
        raise InputError(
            f"question {id!r}: {longest} tokens with its answer, the model's context holds "
            f"{bridge.cfg.n_ctx}; shorten it"
        )
    same = next((i for i, answer in enumerate(ids) if answer in ids[:i]), None)
    if same is not None:
        raise InputError(
            f"question {id!r}: {answers[same]!r} and {answers[ids.index(ids[same])]!r} are the "
            "same tokens for this tokenizer; reword one of the options"
        )
    return tokens, ids


def _log_probs(bridge: TransformerBridge, prompts: Sequence[tuple[Ids, list[Ids]]]) -> list[float]:
    """log p(answer | prompt) in nats of each prompt's answers, one after the other."""
    asked = [(prompt, answer) for prompt, answers in prompts for answer in answers]
    found = continuation_log_probs(bridge, asked).tolist()
    rest = iter(found)
    return [v for _, ids in prompts for v in _exclusive(ids, [next(rest) for _ in ids])]


def _exclusive(ids: Sequence[Ids], log_p: Sequence[float]) -> list[float]:
    """log p(this answer and none that begins with it): "1/r" without what "1/r²" has of it."""
    exact = dict(zip(ids, log_p))
    for answer in sorted(ids, key=len, reverse=True):
        longer = [exact[o] for o in ids if o != answer and o[: len(answer)] == answer]
        if longer:
            share = np.exp(np.logaddexp.reduce(longer) - exact[answer])
            exact[answer] += float(
                np.log1p(-min(share, 1 - 1e-6))
            )  # 1 by rounding, if nothing left
    return [exact[answer] for answer in ids]


def _probability(table: pd.DataFrame, score: str) -> pd.Series:
    """The softmax of ``score`` over the options of each question and order."""
    scores = pd.Series(table[score])
    keys = [table.question, table.order]
    odds = pd.Series(np.exp(scores - scores.groupby(keys).transform("max")), table.index)
    return odds / odds.groupby(keys).transform("sum")
