"""What two models predict otherwise, token by token, from one pass of each over texts.

At every position both predict the next token. KL(tuned || base) in nats says how much their
predictions differ, the surprise -log p of the token that follows how well each foresees the text,
and the largest changes of log p which tokens the fine-tune raises and lowers there. The divergence
of contexts and Diff Mining read the same pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit import store
from interp_kit.batching import logit_batches, padded
from interp_kit.files import digest
from interp_kit.loading import Models
from interp_kit.specs import InputError
from interp_kit.texts import Written

TOP = 20  # tokens that are kept of a position, of each kind
Read = Callable[[], TransformerBridge]


@dataclass(frozen=True, kw_only=True)
class TokenDifferences:
    """One entry for every token that is predicted: all but the first of each text.

    ``text`` and ``pos`` say where it stands, ``token`` which it is. ``kl``: KL(tuned || base) of
    its prediction; ``base`` and ``tuned``: its surprise, all in nats. ``risen`` are the tokens
    whose log p rises most from base to tuned, most first, and ``risen_by`` how much, in nats;
    ``gained`` are the tokens that carry most of the KL, and ``gained_by`` how much: p_tuned
    (log p_tuned - log p_base), in nats; ``lost`` those that carry most of KL(base || tuned), and
    ``lost_by`` how much.
    """

    text: Int[Tensor, "token"]
    pos: Int[Tensor, "token"]
    token: Int[Tensor, "token"]
    kl: Float[Tensor, "token"]
    base: Float[Tensor, "token"]
    tuned: Float[Tensor, "token"]
    risen: Int[Tensor, "token top"]
    risen_by: Float[Tensor, "token top"]
    gained: Int[Tensor, "token top"]
    gained_by: Float[Tensor, "token top"]
    lost: Int[Tensor, "token top"]
    lost_by: Float[Tensor, "token top"]

    def table(self, texts: Sequence[Written]) -> pd.DataFrame:
        """``prompt register pos token written kl base tuned``, one row a token.

        ``prompt`` is the text's number; ``written`` whether a model wrote the token, rather than
        that it was given.
        """
        keys = ("pos", "token", "kl", "base", "tuned")
        table = pd.DataFrame({key: getattr(self, key).numpy() for key in keys})
        own = [texts[i] for i in self.text.tolist()]
        table.insert(0, "prompt", [str(i) for i in self.text.tolist()])
        table.insert(1, "register", [text.register for text in own])
        begun = [text.begun for text in own]
        return table.assign(written=table.pos.to_numpy() >= begun)


@torch.no_grad()
def token_differences(
    models: Models, name: str, texts: Sequence[Written], *, base: str = ""
) -> TokenDifferences:
    """How model ``name`` predicts the texts otherwise than ``base``.

    Without ``base`` that is what the model was tuned from. Tokens that only one of the two has,
    added for a fine-tune, are left out: predictions are those given that the next token is a common
    one, and a text ends before the first other one. Kept by content where there is a ``store``.

    Raises ``InputError`` where the two number their tokens otherwise, and for no text.
    """
    reads: list[Read] = [reader(models, base, of=name), lambda: models.switch(name)]
    rows = [list(text.tokens) for text in texts]
    key = [store.name_of(read(), "differences", rows) for read in reads]
    kept = digest(key) if all(key) else ""
    if (found := store.find(kept)) is None:
        found = _differences(reads, rows, common_vocabulary(*(read() for read in reads)))
        store.keep(kept, found)
    return TokenDifferences(**found)


def joined(first: TokenDifferences, second: TokenDifferences, *, n: int) -> TokenDifferences:
    """Of the ``n`` texts of the first and then those of the second, as if compared together."""
    parts = {key: torch.cat([getattr(first, key), getattr(second, key)]) for key in vars(first)}
    parts["text"] = torch.cat([first.text, second.text + n])
    return TokenDifferences(**parts)


def reader(models: Models, base: str, *, of: str) -> Read:
    """What hands out the bridge of ``base``, or, for "", of what the model was tuned from.

    Raises ``InputError`` where neither is known.
    """
    if base:
        return lambda: models.switch(base)
    if not models.specs[of].tuned:
        raise InputError(
            f"model {of!r} has no adapter, and its spec does not say what it was tuned from; name "
            "the base to compare with, or add tuned_from: MODEL to its model.yaml"
        )
    return lambda: models.base_of(of)


def common_vocabulary(first: TransformerBridge, second: TransformerBridge) -> int:
    """How many first token ids mean the same to both; ``InputError`` where any id does not."""
    size = min(first.cfg.d_vocab, second.cfg.d_vocab)
    ours, theirs = (
        {id: token for token, id in bridge.tokenizer.get_vocab().items() if id < size}
        for bridge in (first, second)
    )
    other = next((id for id in sorted(ours) if theirs.get(id, ours[id]) != ours[id]), None)
    if other is not None:
        raise InputError(
            f"the two models number their tokens otherwise: id {other} is {ours[other]!r} and "
            f"{theirs[other]!r}; their predictions cannot be compared token by token. Choose "
            "models of one vocabulary; what they write can still be read side by side"
        )
    return size


# ------------------------------------------------------------------------------------- internals
def _differences(
    reads: Sequence[Read], rows: Sequence[list[int]], common: int
) -> dict[str, Tensor]:
    ends = [next((i for i, t in enumerate(row) if t >= common), len(row)) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends)]
    long = [i for i, row in enumerate(rows) if len(row) > 1]
    if not long:
        raise InputError("no text has two tokens that both models know; give longer texts")
    found: list[dict[str, Tensor]] = []
    progress = tqdm(total=len(long), desc="texts", unit="text", leave=False)
    for index in logit_batches([rows[i] for i in long], common):
        own = [long[i] for i in index]
        tokens, inside = padded([rows[i] for i in own], reads[0]().cfg.device)
        base, tuned = (_log_probs(read(), tokens, common) for read in reads)
        found.append(_of_batch(base, tuned, tokens, inside[:, 1:], torch.tensor(own)))
        progress.update(len(own))
    progress.close()
    joined = {key: torch.cat([each[key] for each in found]) for key in found[0]}
    order = (joined["text"] * max(map(len, rows)) + joined["pos"]).argsort()
    return {key: values[order] for key, values in joined.items()}


def _log_probs(
    bridge: TransformerBridge, tokens: Int[Tensor, "row all_pos"], common: int
) -> Float[Tensor, "row pos vocab"]:
    return bridge(tokens)[:, :-1, :common].float().log_softmax(-1)


def _of_batch(
    base: Float[Tensor, "row pos vocab"],
    tuned: Float[Tensor, "row pos vocab"],
    tokens: Int[Tensor, "row all_pos"],
    inside: Tensor,
    texts: Int[Tensor, "row"],
) -> dict[str, Tensor]:
    base, tuned, following = base[inside], tuned[inside], tokens[:, 1:][inside]
    change = tuned - base
    row, pos = (x.cpu() for x in inside.nonzero(as_tuple=True))
    carried = tuned.exp() * change
    risen, gained = change.topk(TOP), carried.topk(TOP)
    lost = (base.exp() * -change).topk(TOP)
    found = {
        "kl": carried.sum(-1),
        "token": following,
        "base": -base.gather(-1, following[:, None])[:, 0],
        "tuned": -tuned.gather(-1, following[:, None])[:, 0],
        "risen": risen.indices.int(),
        "risen_by": risen.values,
        "gained": gained.indices.int(),
        "gained_by": gained.values,
        "lost": lost.indices.int(),
        "lost_by": lost.values,
    }
    return {key: x.cpu() for key, x in found.items()} | {"text": texts[row], "pos": pos + 1}
