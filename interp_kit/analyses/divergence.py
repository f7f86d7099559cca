"""Where do two models predict otherwise? Divergence by token, and the contexts that differ most.

KL(tuned || base) of every next-token prediction, in nats: over texts that the base wrote, and over
the fine-tune's own, where a change that ordinary text never touches may show. The contexts with
the largest KL say what the change is about, and become scenarios.

Source: the per-token KL dashboards of model diffing (Minder et al., arXiv:2510.13900, appendix).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp_kit.texts import Written
from interp_kit.token_differences import TokenDifferences

APART = 8  # tokens between two contexts of one text


def with_inserted(
    texts: Sequence[Written], tokens: dict[str, int], *, seed: int = 0
) -> list[Written]:
    """The texts with a token written into each, at random places: one copy for each token.

    For tokens that a fine-tune added: ordinary text never holds them. The register is
    ``with TOKEN``; what follows the token counts as written.
    """
    rng, made = np.random.default_rng(seed), []
    for name, token in tokens.items():
        for text in texts:
            at = int(rng.integers(1, len(text.tokens) + 1))
            row = (*text.tokens[:at], token, *text.tokens[at:])
            made.append(Written(register=f"with {name}", tokens=row, begun=at + 1))
    return made


def top_contexts(found: TokenDifferences, *, n: int = 12, apart: int = APART) -> pd.DataFrame:
    """The positions whose predictions differ most: ``text pos kl risen fallen``, most first.

    ``pos`` is the token that is predicted there; ``risen`` and ``fallen`` are the tokens whose log
    p changes most. Contexts of one text stand ``apart`` tokens from one another, and two in which
    the same token rises after the same token count once.
    """
    rows, seen = list[dict[str, object]](), set[tuple[int, int]]()
    for i in found.kl.argsort(descending=True).tolist():
        text, pos = int(found.text[i]), int(found.pos[i])
        before = int(found.token[i - 1]) if i and int(found.text[i - 1]) == text else -1
        same = before, int(found.risen[i, 0])
        near = any(row["text"] == text and abs(int(str(row["pos"])) - pos) < apart for row in rows)
        if near or same in seen:
            continue
        seen.add(same)
        rows.append(
            {
                "text": text,
                "pos": pos,
                "kl": float(found.kl[i]),
                "risen": int(found.risen[i, 0]),
                "fallen": int(found.fallen[i, 0]),
            }
        )
        if len(rows) == n:
            break
    return pd.DataFrame(rows, columns=pd.Index(["text", "pos", "kl", "risen", "fallen"]))
