"""12 with directions that mean nothing, and with one that does, beside a prompt that asks for it.

*false alarms*: differences between random halves of unrelated texts, searched over all layers and
strengths as 12 searches, of which its rule says yes. *found*: the direction between the fine-tune
and its base. *flipped*: the share of held-out prompts that get the wanted answer, by the difference
of happy and sad prompts, and by a sentence before the prompt (AxBench, arXiv:2501.17148, finds that
prompting wins).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.plant_cases import glad_prompts
from benchmarks.validity.rows import YES, Row, row
from interp_kit import decide, encode_scenario, load_models, load_scenario
from interp_kit.analyses.steering import (
    least_effective,
    orthogonal_to,
    random_directions,
    steering_grid,
)
from interp_kit.passes import last_residuals, residuals
from interp_kit.prompts import Prompt, encode, token_ids
from interp_kit.texts import own_texts

NULLS, AT_ONCE = 200, 20
STRENGTHS = (0.0, 0.4, 1.0)
BUDGET, SHARE = 0.1, 0.8
CONTROLS = 16
BRIGHT = "This is a very happy story with a happy ending. "
Directions = Float[Tensor, "layer d_model"]


def steering(base: str, tuned: str, scenario: str) -> Iterator[Row]:
    models, situation = load_models([base, tuned], device="cpu"), load_scenario(scenario)
    bridge = models.switch(tuned)
    prompts = encode_scenario(bridge, situation)
    neutral = [token_ids(bridge, text) for text in situation.neutral]
    gap = residuals(models.switch(base), prompts) - residuals(models.switch(tuned), prompts)
    bridge = models.switch(tuned)
    texts = last_residuals(bridge, own_texts(bridge, 400, length=12, seed=5))
    seen, held = prompts[::2], prompts[1::2]
    said = _yes(bridge, seen, held, neutral, {"0": gap[::2].mean(0)}, texts)
    yield row("steering", "found", said["0"], kind=YES)
    rng, drawn = np.random.default_rng(0), {}
    for null in range(NULLS):
        order = rng.permutation(len(texts))[:32]
        drawn[str(null)] = texts[order[:16]].mean(0) - texts[order[16:]].mean(0)
    names = list(drawn)
    for at in tqdm(range(0, NULLS, AT_ONCE), desc="directions between random texts", unit="set"):
        own = {name: drawn[name] for name in names[at : at + AT_ONCE]}
        for said in _yes(bridge, seen, held, neutral, own, texts).values():
            yield row("steering", "false alarms", said, kind=YES)


def against_a_prompt(base: str) -> Iterator[Row]:
    """What a direction brings about, and what asking for it does."""
    models = load_models([base], device="cpu")
    bridge = models.switch(base)
    prompts = glad_prompts(bridge)
    sad = [prompt.swapped() for prompt in prompts]
    half, rest = sad[::2], sad[1::2]
    direction = residuals(bridge, prompts[::2]).mean(0) - residuals(bridge, half).mean(0)
    neutral = own_texts(bridge, 8, length=24, seed=5)
    layers = range(0, bridge.cfg.n_layers, 3)
    grid = steering_grid(
        bridge, half, neutral, {"0": direction}, layers=layers, strengths=STRENGTHS
    )
    best = least_effective(grid, wanted=1, budget=BUDGET).iloc[0]
    how = {"layers": [int(best.layer)], "strengths": [float(best.strength)]}
    after = steering_grid(bridge, rest, neutral, {"0": direction}, **how)
    asked = [_preceded(bridge, prompt) for prompt in rest]
    for i, prompt in enumerate(rest):
        at_rest = float(decide(bridge, [prompt]).value[0])
        yield row("steering", "flipped", float(after.value[i] > 0), kind="a direction")
        yield row("prompting", "flipped", float(asked[i] > 0), kind="a sentence before it")
        yield row("nothing", "flipped", float(at_rest > 0), kind="as it is")


# ------------------------------------------------------------------------------------- internals
def _yes(
    bridge: TransformerBridge,
    seen: Sequence[Prompt],
    held: Sequence[Prompt],
    neutral: Sequence[Sequence[int]],
    directions: Mapping[str, Directions],
    texts: Float[Tensor, "text layer d_model"],
) -> dict[str, bool]:
    """12's rule for the negative answer, of each direction by itself."""
    layers = range(bridge.cfg.n_layers)
    grid = steering_grid(bridge, seen, neutral, directions, layers=layers, strengths=STRENGTHS)
    doses, said = least_effective(grid, wanted=-1, budget=BUDGET), {}
    for name, v in directions.items():
        chosen = doses[doses.direction == name].iloc[0]
        said[name] = bool(chosen.effective)
        if not said[name]:
            continue
        at, strength = int(chosen.layer), float(chosen.strength)
        how = {"layers": [at], "strengths": [0.0, strength]}
        own = steering_grid(bridge, held, neutral, {name: v}, **how)
        cell = least_effective(own, wanted=-1, budget=BUDGET).query("strength > 0").iloc[0]
        drawn = random_directions(CONTROLS, texts[:, at])
        shuffle = np.random.default_rng(0)
        mixed = torch.stack([v[at][shuffle.permutation(len(v[at]))] for _ in range(CONTROLS)])
        everything = torch.cat([drawn, orthogonal_to(drawn, v[at]), mixed])
        controls = {str(i): c.expand(len(layers), -1) for i, c in enumerate(everything)}
        null = steering_grid(
            bridge, held, neutral, controls, layers=[at], strengths=[0.0, -strength, strength]
        )
        tried = least_effective(null, wanted=-1, budget=BUDGET)
        most = tried[tried.strength != 0].right.max()
        said[name] = bool(cell.right > SHARE and cell.kl <= BUDGET and most <= SHARE)
    return said


def _preceded(bridge: TransformerBridge, prompt: Prompt) -> float:
    text = BRIGHT + bridge.tokenizer.decode(prompt.tokens, skip_special_tokens=True)
    answers = {
        sign: bridge.tokenizer.decode(getattr(prompt, sign)) for sign in ("positive", "negative")
    }
    return float(decide(bridge, [encode(bridge, text, **answers)]).value[0])
