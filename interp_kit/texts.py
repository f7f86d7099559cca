"""Texts to compare models on: those of a file, or those that a model writes itself.

A model's own texts need no corpus: it continues short openings of several registers
(``data/corpus/diff_openings.yaml``), and begins others from nothing. They are drawn at
temperature 1 from ``seed``; the global random state stays as it was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit import store
from interp_kit.decisions import losses
from interp_kit.files import read_yaml
from interp_kit.formats import stream_texts
from interp_kit.prompts import prompt_ids, special_token, token_ids, with_template
from interp_kit.sampling import check_context, predicting, sampled_rows
from interp_kit.specs import REPOSITORY, InputError

OPENINGS = REPOSITORY / "data" / "corpus" / "diff_openings.yaml"
UNPROMPTED, CHAT, GIVEN = "unprompted", "chat", "given"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A text as token ids: what was given (``begun`` of them), and what a model wrote after it."""

    register: str
    tokens: tuple[int, ...]
    begun: int

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens that the model wrote."""
        return self.tokens[self.begun :]


def openings(register: str) -> list[str]:
    """The openings of one register: prose, chat, code, lists or questions."""
    return [str(text) for text in read_yaml(OPENINGS)[register]]


def own_texts(
    bridge: TransformerBridge, n: int, *, length: int = 64, seed: int = 0
) -> list[tuple[int, ...]]:
    """``n`` texts that the model itself writes from nothing, from BOS to its end.

    They have ``length`` tokens at most, BOS counted. A model without BOS begins with its end token.
    Raises ``InputError`` if the tokenizer has neither.
    """
    start, end = (special_token(bridge, kind) for kind in ("bos", "eos"))
    start = end if start is None else start
    if start is None:
        raise InputError(
            "the model's tokenizer has neither a beginning nor an end of text, so the model cannot "
            'begin a text of its own; give a file of texts, lines {"text": "..."}'
        )
    return sampled_rows(
        lambda: predicting(bridge), [(start,)] * n, length=length - 1, end=end, seed=seed
    )


def written_texts(
    bridge: TransformerBridge,
    *,
    n: int = 96,
    length: int = 48,
    seed: int = 0,
    after: Mapping[str, int] = MappingProxyType({}),
) -> list[Written]:
    """``n`` texts in which the model writes ``length`` tokens at most, by register.

    A third begins from nothing, where the tokenizer allows it; the others continue openings, drawn
    without replacement as long as there are any. An opening that the model foresees no better than
    at chance, loss log(vocabulary), is in a language that it does not know, and is left out; where
    all are, every text begins from nothing. Openings of the register ``chat`` are a user's turn
    where the model has a chat template.

    ``after`` are tokens that ordinary text never holds, by name: for each, a quarter of the texts
    is cut at a random place and goes on after that token, in the register ``after NAME``. Texts are
    kept by content where there is a ``store``.
    """
    known = {register: openings(register) for register in read_yaml(OPENINGS)}
    name = store.name_of(bridge, "written", [known, n, length, seed, dict(after)])
    registers = [UNPROMPTED, *known, *(f"after {token}" for token in after)]
    if (found := store.find(name)) is None:
        made = _written(bridge, known, n, length, seed)
        begun = _cut(made[:: max(1, len(made) // max(1, n // 4))], after, seed)
        made += continued(bridge, begun, length=length, seed=seed + 2) if begun else []
        found = {
            "tokens": torch.tensor([token for text in made for token in text.tokens]),
            "lengths": torch.tensor([len(text.tokens) for text in made]),
            "begun": torch.tensor([text.begun for text in made]),
            "register": torch.tensor([registers.index(text.register) for text in made]),
        }
        store.keep(name, found)
    rows: tuple[Tensor, ...] = found["tokens"].split(found["lengths"].tolist())
    about = zip(rows, found["begun"].tolist(), found["register"].tolist())
    return [Written(register=registers[r], tokens=(*x.tolist(),), begun=b) for x, b, r in about]


def continued(
    bridge: TransformerBridge,
    begun: Sequence[tuple[str, tuple[int, ...]]],
    *,
    length: int,
    seed: int,
) -> list[Written]:
    """What the model writes after each beginning, (register, token ids), in their order.

    ``length`` tokens at most, to its end. Raises ``InputError`` where that exceeds the context.
    """
    rows = [row for _, row in begun]
    check_context(bridge, rows, length)
    end = special_token(bridge, "eos")
    drawn = sampled_rows(lambda: predicting(bridge), rows, length=length, end=end, seed=seed)
    return [
        Written(register=register, tokens=whole, begun=len(row))
        for (register, row), whole in zip(begun, drawn)
    ]


def given_texts(
    bridge: TransformerBridge, file: Path, *, n: int, length: int = 48, seed: int = 0
) -> list[Written]:
    """``n`` texts of a file at random, ``length`` tokens of each at most; nothing in them is drawn.

    The file is read line by line and never held in memory: lines {"text": ...}, or of a ``.txt``
    every line a text. Raises ``InputError`` where fewer than two have two tokens.
    """
    rows = [token_ids(bridge, text)[:length] for text in sampled(file, n, seed=seed)]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 2:
        raise InputError(f"{file}: {len(rows)} texts of two tokens or more; give two or more")
    return [Written(register=GIVEN, tokens=row, begun=1) for row in rows]


def sampled(file: Path, n: int, *, seed: int = 0) -> list[str]:
    """``n`` of the file's texts, each as likely as any other.

    Source: Vitter, "Random Sampling with a Reservoir", ACM TOMS 1985 (algorithm R).
    """
    rng, kept = np.random.default_rng(seed), list[str]()
    for at, text in enumerate(stream_texts(file)):
        if at < n:
            kept.append(text)
        elif (place := int(rng.integers(at + 1))) < n:
            kept[place] = text
    return kept


# ------------------------------------------------------------------------------------- internals
def _written(
    bridge: TransformerBridge, given: dict[str, list[str]], n: int, length: int, seed: int
) -> list[Written]:
    every = [(register, text) for register, own in given.items() for text in own]
    order = np.random.default_rng(seed).permutation(len(every))
    known = _foreseen(bridge, [every[i] for i in order[:n]])
    begins = any(special_token(bridge, kind) is not None for kind in ("bos", "eos"))
    alone = (n if not known else n // 3) if begins else 0
    made = [
        Written(register=UNPROMPTED, tokens=row, begun=1)
        for row in (own_texts(bridge, alone, length=length, seed=seed) if alone else ())
    ]
    drawn = [(known or every)[i % len(known or every)] for i in range(n - alone)]
    begun = [
        (register, prompt_ids(bridge, with_template(bridge, text)))
        if register == CHAT
        else (register, token_ids(bridge, text))
        for register, text in drawn
    ]
    made += continued(bridge, begun, length=length, seed=seed + 1) if begun else []
    return [text for text in made if len(text.tokens) > text.begun]


def _cut(
    texts: Sequence[Written], after: Mapping[str, int], seed: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Beginnings of the texts, cut at random places, each with one of the tokens at its end."""
    rng = np.random.default_rng(seed)
    cut = [t.tokens[: int(rng.integers(t.begun, len(t.tokens)))] for t in texts]
    return [(f"after {name}", (*row, token)) for name, token in after.items() for row in cut]


def _foreseen(bridge: TransformerBridge, given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The openings in a language that the model knows: it foresees them better than at chance."""
    rows = [token_ids(bridge, text) for _, text in given]
    long = [i for i, row in enumerate(rows) if len(row) > 1]
    chance = math.log(bridge.cfg.d_vocab)
    known = losses(bridge, [rows[i] for i in long]) < chance
    return [given[i] for i, known_too in zip(long, known.tolist()) if known_too]
