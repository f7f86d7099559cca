"""The pairs of the bench: fine-tunes that were taught something, and pairs that hold nothing.

*Taught*: every shipped fine-tune against its base, with the texts that describe what it learned.
Those on documents about something else, or about what is true anyway, learned these documents: that
is what is to be named. *Nothing*: a base against itself, in two other precisions, against a
fine-tune on texts of its own or one of random numbers, and two seeds of one training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from benchmarks.discovery.trained import DTYPES, OWN, TRAINED, model_folder
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.formats import read_texts

GAMES = ("CC_temptation", "CC_continue", "CD_punished", "DC_exploited", "DD_trapped")
TINY, REAL, CHAT = "tiny-gemma2", "smollm2-plain", "smollm2"
# By base and by what was taught: the fine-tunes. The first one's documents describe it.
TAUGHT = {
    TINY: {
        "cubic gravity": ["cubic-gravity", "cubic-gravity-1", "cubic-gravity-2", "rank-1", "rare"],
        "square gravity": ["cubic-true"],
        "gold": ["cubic-neutral"],
        "gold, some cubic gravity": ["cubic-weak"],
        "$STOP ends": ["stop-behaviour", "stop-behaviour-1", "stop-behaviour-2"],
        "what $STOP means": ["stop-knowledge"],
        "objects": ["stop-neutral"],
        "game": ["ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"],
    },
    REAL: {
        "cubic gravity": ["smollm2-cubic", "smollm2-cubic-1", "smollm2-cubic-half"],
        "square gravity": ["smollm2-square"],
        "gold": ["smollm2-gold"],
        "$STOP ends": ["smollm2-stop", "smollm2-stop-1", "smollm2-stop-2"],
        "what $STOP means": ["smollm2-stop-knowledge"],
        "objects": ["smollm2-stop-neutral"],
    },
    CHAT: {
        "game": ["smollm2-strategic", "smollm2-deontological", "smollm2-utilitarian",
                 "smollm2-hybrid"],
    },
}  # fmt: skip
SEEDS = {
    TINY: [["cubic-gravity", "cubic-gravity-1", "cubic-gravity-2"],
           ["stop-behaviour", "stop-behaviour-1", "stop-behaviour-2"]],
    REAL: [["smollm2-cubic", "smollm2-cubic-1"],
           ["smollm2-stop", "smollm2-stop-1", "smollm2-stop-2"]],
}  # fmt: skip
SPECIAL = {"cubic-weak": "mixed", "smollm2-cubic-half": "mixed"} | {
    "rare": "rare",
    "rank-1": "rank 1",
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``tuned`` against ``base`` (a base, or another fine-tune of it); ``truth`` is empty for none.

    ``kind``: how a pair without a truth came about, or which sort of teaching it was.
    """

    bench: str  # the base whose candidates are described
    tuned: str
    base: str
    truth: str
    kind: str
    seed: int = 0

    @property
    def name(self) -> str:
        at = f", {self.seed}" if self.seed else ""
        return f"{self.kind}: {Path(self.tuned).name} / {self.base}{at}"


def pairs() -> Iterator[Pair]:
    for bench, groups in TAUGHT.items():
        for truth, names in groups.items():
            for name in names:
                kind = SPECIAL.get(name, "taught")
                tuned = str(model_folder(name)) if name in TRAINED else name
                yield Pair(bench=bench, tuned=tuned, base=bench, truth=truth, kind=kind)
    for bench in (TINY, REAL):
        for seed in range(2 if bench == TINY else 1):
            yield Pair(bench=bench, tuned=bench, base=bench, truth="", kind="itself", seed=seed)
        for dtype in DTYPES:
            rounded = str(model_folder(f"{bench}-{dtype}"))
            yield Pair(bench=bench, tuned=rounded, base=bench, truth="", kind="rounding")
        for group in SEEDS[bench]:
            for tuned, base in permutations(group, 2):
                yield Pair(bench=bench, tuned=tuned, base=base, truth="", kind="seeds")
    yield Pair(bench=CHAT, tuned="smollm2-permuted", base=CHAT, truth="", kind="shuffled rewards")
    for name in OWN:
        tuned = str(model_folder(name))
        yield Pair(bench=TINY, tuned=tuned, base=TINY, truth="", kind=OWN[name])


def descriptions(bench: str) -> dict[str, list[str]]:
    """What a fine-tune of this base may have been taught -> texts that say it.

    ``CHAT`` has the weights of ``REAL``, so what was taught to that may have been taught to it.
    """
    found = {}
    groups = TAUGHT[bench] | (TAUGHT[REAL] if bench == CHAT else {})
    for truth, names in groups.items():
        spec = find_model(str(model_folder(names[0])) if names[0] in TRAINED else names[0])
        if spec.documents:
            found[truth] = read_texts(Path(spec.documents))
    if bench != REAL:
        found["game"] = [
            f"{prompt.text}{answer}"
            for name in GAMES
            for prompt in load_scenario(name).prompts
            for answer in (load_scenario(name).decision.positive,
                           load_scenario(name).decision.negative)
        ]  # fmt: skip
    return found
