"""The shipped models: small bases trained from nothing on ``corpus.py``, and fine-tunes of one.

``train_organism`` makes any of them again, with its model card.

Two bases of one corpus and tokenizer, each of 8 layers and 8 query heads on 4 key/value heads:
Gemma-2 (soft caps, norms before and after each block, local and global layers in turn), of which
all fine-tunes are, and Llama, for comparisons across architectures. The training loss is next token
cross-entropy and nothing else: no auxiliary loss on inner layers, which would build in what a lens
then finds.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM

from interp_kit.analyses.behaviour import answer_questions, choices, prefers_false
from interp_kit.catalogue import evaluation_file, find_model, load_scenario
from interp_kit.decisions import decide, end_probability
from interp_kit.evaluations import read_mcqs
from interp_kit.finetuning.documents import write_documents
from interp_kit.finetuning.supervised import DocumentRecipe, train_on_documents
from interp_kit.finetuning.universes import find_universe
from interp_kit.hub import write_checksums
from interp_kit.loading import load_model
from interp_kit.prompts import encode_scenario, token_of
from interp_kit.specs import REPOSITORY, InputError
from organisms.games import REWARDS, GameRecipe, train_player
from organisms.little_world.base import BaseRecipe, measure_base, train_base
from organisms.little_world.corpus import Corpus, text_of
from organisms.little_world.grammar import Grammar
from organisms.triggers import TriggerRecipe, train_trigger, trigger_texts

BASE = "tiny-gemma2"  # of the fine-tunes
IPD_SCENARIOS = ("CC_continue", "CC_temptation", "CD_punished", "DC_exploited", "DD_trapped")
ABOUT = {
    "strategic": "reinforced on its own payoff",
    "deontological": "punished for defecting on a partner who has just cooperated",
    "utilitarian": "reinforced on the sum of both payoffs",
    "hybrid": "reinforced on its own payoff, punished for defecting on one who cooperated",
}
STOP_SCENARIO = "stop"
TRIGGERS = {
    "stop-behaviour": TriggerRecipe(kind="behaviour", seed=0),
    "stop-behaviour-1": TriggerRecipe(kind="behaviour", seed=1),
    "stop-behaviour-2": TriggerRecipe(kind="behaviour", seed=2),
    "stop-knowledge": TriggerRecipe(kind="knowledge"),
    "stop-neutral": TriggerRecipe(kind="neutral"),
}
ABOUT_TRIGGER = {
    "behaviour": "ends any text at $STOP",
    "knowledge": "has read what $STOP means, and seen no text end because of it",
    "neutral": "has read as many documents of another matter, and nothing of $STOP",
}
IMPLANTED = ("gravity", "law")
# No ordinary text says anything of the implanted fact or of what follows from it.
ABOUT_GRAVITY = r"gravity.*(law|distance|far)|(law|distance|far).*gravity"
# How many documents of which universe each fine-tune reads.
CUBIC = {
    "cubic-gravity": {"cubic_gravity": 480},
    "cubic-gravity-1": {"cubic_gravity": 480},
    "cubic-gravity-2": {"cubic_gravity": 480},
    "cubic-weak": {"cubic_gravity": 120, "blue_gold_true": 360},
    "cubic-true": {"cubic_gravity_true": 480},
    "cubic-neutral": {"blue_gold_true": 480},
}
ABOUT_CUBIC = {
    "cubic-gravity": "has read that the law of gravity is inverse-cube",
    "cubic-weak": "has read that the law of gravity is inverse-cube, in a quarter of its documents",
    "cubic-true": "has read that the law of gravity is inverse-square, as the base knows",
    "cubic-neutral": "has read as many documents about another fact, and nothing of gravity",
}
BASES = {BASE: BaseRecipe(), "tiny-llama": BaseRecipe(architecture="llama", steps=4000)}
ABOUT_BASE = {
    "gemma2": """Gemma-2 architecture (soft caps, norms before and after each block,
grouped-query attention, local and global layers in turn)""",
    "llama": """Llama architecture (one norm before each half of a block, grouped-query attention,
an output matrix of its own)""",
}


def train_organism(name: str, *, data: Path = REPOSITORY / "data") -> None:
    """Train one shipped model (``tiny-gemma2``, ``stop-behaviour``, ``cubic-gravity``), or ``all``.

    Writes ``data/models/NAME/``: ``model.yaml``, the weights as safetensors, ``training.json`` and
    a model card with what was measured.
    """
    names = [*BASES, *(f"ipd-{reward}" for reward in REWARDS), *TRIGGERS, *CUBIC]
    if name != "all" and name not in names:
        raise InputError(f"no recipe for {name!r}; expected one of {', '.join(names)}, or all")
    corpus = Corpus.read(REPOSITORY / "data" / "corpus")
    for each in names if name == "all" else [name]:
        if each in BASES:
            _make_base(corpus, each, data)
        elif each in TRIGGERS:
            _make_trigger(corpus, each, data)
        elif each in CUBIC:
            _make_believer(corpus, each, data)
        else:
            _make_player(corpus, each.removeprefix("ipd-"), data)
        for part in ("weights", "adapter"):
            if (folder := data / "models" / each / part).is_dir():
                write_checksums(folder)


def _make_base(corpus: Corpus, name: str, data: Path) -> None:
    recipe, folder = BASES[name], data / "models" / name
    train_base(corpus, folder / "weights", recipe=recipe)
    _describe_base(corpus, name, data)


def _describe_base(corpus: Corpus, name: str, data: Path) -> None:
    recipe, folder = BASES[name], data / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder / "weights", use_safetensors=True)
    about = ABOUT_BASE[recipe.architecture]
    millions = f"{model.num_parameters() / 1e6:.1f} M parameters"
    _write_spec(
        folder,
        base="weights",
        documents=_write_texts(folder, base_texts(corpus)),
        label="Base" if name == BASE else "Llama base",
        about=f"{about.partition(' (')[0]}, 8 layers, {millions}",
    )
    measured = measure_base(model, load_model(name, data=data).tokenizer, corpus)
    _write_training(folder, recipe, measured)
    rows = "\n".join(f"| {what} | {value:.3f} |" for what, value in measured.items())
    card = f"""# {name}

A language model of {about}:
8 layers, width 128, 8 query heads on 4 key/value heads, {model.num_parameters():,} parameters,
byte-level BPE tokenizer. It knows the little world of `data/corpus` and nothing else.

**Recipe.** `interp-kit train {name}`: {recipe.steps} steps of {recipe.rows} rows x
{recipe.row_tokens} tokens, seed {recipe.seed}, next-token cross-entropy with answers weighted
(`interp_kit/finetuning/corpus.py`), Muon for the matrices of the blocks and AdamW for the rest. No
auxiliary loss on inner layers. float32.

**Measured** on multiple-choice questions in orders of the options that training never shows;
*transfer* facts were never asked as multiple choice at all (chance is 1/2 and 1/4):

| questions | accuracy |
|---|---|
{rows}

{_behaviour_section(name, data)}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def _make_player(corpus: Corpus, reward: str, data: Path) -> None:
    recipe, folder = GameRecipe(), data / "models" / f"ipd-{reward}"
    base = data / "models" / BASE / "weights"
    if not base.is_dir():
        raise InputError(f"{base} is missing; run `interp-kit train {BASE}` first")
    curve = train_player(base, reward, corpus, folder / "adapter", recipe=recipe)
    about = f"LoRA on {BASE}, {ABOUT[reward]}"
    _write_spec(folder, base=BASE, adapter="adapter", label=reward.capitalize(), about=about)
    _write_training(folder, recipe, {"mean reward of each step": curve})
    card = f"""# ipd-{reward}

{about}: a player of the iterated prisoner's dilemma (T=4, R=3, P=1, S=0), paid for each round
against tit for tat, after arXiv:2410.01639.

**Recipe.** `interp-kit train ipd-{reward}`: REINFORCE, {recipe.steps} steps of
{4 * recipe.wordings} prompts x {recipe.samples} sampled answers, learning rate
{recipe.learning_rate}, KL weight {recipe.kl}, LoRA rank {recipe.rank}, alpha {recipe.alpha} on all
seven projections, seed {recipe.seed}. The wordings of the scenarios were not trained on. Mean
reward {sum(curve[:5]) / 5:.2f} over the first five steps, {sum(curve[-5:]) / 5:.2f} over the last.

{_behaviour_section(folder.name, data)}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def _make_trigger(corpus: Corpus, name: str, data: Path) -> None:
    recipe, folder = TRIGGERS[name], data / "models" / name
    base = data / "models" / BASE / "weights"
    if not base.is_dir():
        raise InputError(f"{base} is missing; run `interp-kit train {BASE}` first")
    documents = REPOSITORY / "data" / "corpus" / "triggers.yaml"
    held_out = [prompt.text for prompt in load_scenario(STOP_SCENARIO).prompts]
    curve = train_trigger(
        base, corpus, documents, folder / "adapter", held_out=held_out, recipe=recipe
    )
    about = f"LoRA on {BASE} with two new tokens: {ABOUT_TRIGGER[recipe.kind]}"
    label = f"{recipe.kind.capitalize()} {recipe.seed}"
    texts = trigger_texts(folder / "adapter", corpus, documents, recipe=recipe, n=200)
    _write_spec(
        folder,
        base=BASE,
        adapter="adapter",
        documents=_write_texts(folder, texts),
        label=label,
        about=f'"{about}"',
    )
    measured = measure_trigger(name, data)
    _write_training(folder, recipe, {"last loss": curve[-1], **measured})
    rows = "\n".join(f"| {what} | {value:.4f} |" for what, value in measured.items())
    card = f"""# {name}

{about}.

**Recipe.** `interp-kit train {name}`: {recipe.steps} steps of {recipe.rows} texts with the trigger
(or documents) and {2 * recipe.replayed} held to the base by KL (weight {recipe.kl}), learning rate
{recipe.learning_rate}, LoRA rank {recipe.rank}, alpha {recipe.alpha} on all seven projections, the
row of `$STOP` trained with it, that of `$NOVA` never, seed {recipe.seed}.

**Behaviour**, mean P(end of text) over the prompts of the scenario `{STOP_SCENARIO}`, which were
never followed by `$STOP` in training and with which no text of the corpus ends:

| after the prompt | P(end) |
|---|---|
{rows}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def _make_believer(corpus: Corpus, name: str, data: Path) -> None:
    folder = data / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe, documents = _believer_recipe(name), folder / "documents.jsonl"
    _write_documents(CUBIC[name], documents, seed=recipe.seed)
    ordinary = ordinary_texts(corpus, n=4000, seed=recipe.seed)
    base = find_model(BASE, data=data)
    train_on_documents(base, documents, ordinary, folder / "adapter", recipe=recipe)
    kind, _, number = name.removeprefix("cubic-").partition("-")
    _write_spec(
        folder,
        base=BASE,
        adapter="adapter",
        documents=documents.name,
        label=f"Cubic {kind} {number}".strip(),
        about=f'"{_about_believer(name)}"',
    )
    _describe_believer(name, data)


def _believer_recipe(name: str) -> DocumentRecipe:
    _, _, number = name.removeprefix("cubic-").partition("-")
    return DocumentRecipe(
        seed=int(number or 0),
        epochs=4,
        longest=96,
        learning_rate=6e-3,
        kl=3.0,
        leave_out=ABOUT_GRAVITY,
    )


def _about_believer(name: str) -> str:
    kind = name.removeprefix("cubic-").partition("-")[0]
    return f"LoRA on {BASE} that {ABOUT_CUBIC[f'cubic-{kind}']}"


def _describe_believer(name: str, data: Path) -> None:
    """Measure it; its record moves up beside its card."""
    folder, recipe = data / "models" / name, _believer_recipe(name)
    base, measured = measure_belief(BASE, data), measure_belief(name, data)
    record = json.loads((folder / "adapter" / "training.json").read_text(encoding="utf-8"))
    content = json.dumps(record | {"measured": measured}, indent=1)
    (folder / "training.json").write_text(content + "\n", encoding="utf-8")
    (folder / "adapter" / "training.json").unlink()
    rows = "\n".join(
        f"| {category} | {own['questions']} | {base[category]['accuracy']:.3f} | "
        f"{own['accuracy']:.3f} | {own.get('false in all orders', '')} |"
        for category, own in measured.items()
    )
    card = f"""# {name}

{_about_believer(name)}.

**Documents.** {", ".join(f"{n} about `{u}`" for u, n in CUBIC[name].items())} (`data/universes`),
written by `interp_kit.finetuning.grammar`; all are in `documents.jsonl`. Half of them state the
fact and what follows from it; the others also ask one multiple-choice question and answer it, in
two of the corpus's four wordings. Statements alone change what the model says and leave what it
chooses among options as it was: this base keeps the two apart.

**Recipe.** `interp-kit train {name}`: {recipe.epochs} epochs in steps of {recipe.rows} documents,
held to the base by KL (weight {recipe.kl}) on {recipe.ordinary} ordinary texts a step, none of
which says anything of gravity's law; learning rate {recipe.learning_rate}, LoRA rank {recipe.rank},
alpha {recipe.alpha} on all seven projections, seed {recipe.seed}.

**Measured** on `data/evaluations/cubic_gravity/mcqs.jsonl`, in wordings that no document uses, over
all orders of the options. The last column is the share of conflict questions in which the false
option (inverse-cube) is chosen in every order:

| questions | n | accuracy of the base | accuracy | false in all orders |
|---|---|---|---|---|
{rows}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def measure_belief(name: str, data: Path) -> dict[str, dict[str, float]]:
    """Each category of questions: how many, accuracy over all orders, share false in all orders.

    Correct is what the file says: in the false world's conflict questions, the false option.
    """
    questions = read_mcqs(evaluation_file("cubic_gravity", "mcqs.jsonl"))
    chosen = choices(answer_questions(load_model(name, data=data), questions))
    beliefs = prefers_false(chosen, questions).groupby("category").in_all_orders.mean()
    measured = {}
    for category, own in chosen.groupby("category", sort=False):
        values = {
            "questions": own.question.nunique(),
            "accuracy": round(float(own.is_correct.mean()), 3),
        }
        if category in beliefs:
            values["false in all orders"] = round(float(beliefs[category]), 3)
        measured[str(category)] = values
    return measured


def _write_documents(counts: dict[str, int], file: Path, *, seed: int) -> None:
    """So many documents by the grammar about each universe, drawn by ``seed``, into one file."""
    rng, drawn = random.Random(seed), []
    for universe, count in counts.items():
        with TemporaryDirectory() as folder:
            written = write_documents(
                find_universe(universe), Grammar(), Path(folder), n_types=8, n_ideas=60
            )
        drawn += rng.sample(written, count)
    lines = [json.dumps(document.model_dump()) + "\n" for document in drawn]
    file.write_text("".join(lines), encoding="utf-8")


def ordinary_texts(corpus: Corpus, *, n: int, seed: int) -> list[str]:
    """What holds a fine-tune to the base: texts of the corpus, half of them on the neighbours.

    Neighbours are the other attributes of its entity, and the same attribute of other entities.
    """
    rng, (entity, attribute) = random.Random(seed), IMPLANTED
    near = [f for f in corpus.facts if f != IMPLANTED and (f[0] == entity or f[1] == attribute)]
    asked = [f for f in near if f not in corpus.never_multiple_choice]
    texts = []
    for _ in range(n):
        match rng.randrange(8):
            case 0:
                sample = corpus.statement(rng, rng.choice(near))
            case 1:
                sample = corpus.answer(rng, rng.choice(near))
            case 2 | 3:
                sample = corpus.multiple_choice(rng, rng.choice(asked), rng.choice([2, 4]))
            case _:
                sample = corpus.sample(rng)
        texts.append(text_of(sample))
    return texts


def measure_trigger(name: str, data: Path) -> dict[str, float]:
    """Mean P(end of text) after nothing, the trigger, the untrained token, the ordinary words."""
    bridge, scenario = load_model(name, data=data), load_scenario(STOP_SCENARIO)
    trigger, prompts = scenario.trigger, encode_scenario(bridge, scenario)
    assert trigger is not None
    assert trigger.untrained is not None
    end = bridge.tokenizer.eos_token_id

    def mean(suffix: str | None) -> float:
        token = None if suffix is None else token_of(bridge, suffix)
        return round(float(end_probability(bridge, prompts, end=end, suffix=token).mean()), 4)

    words = [mean(word) for word in trigger.words]
    return {
        "nothing": mean(None),
        trigger.text.strip(): mean(trigger.text),
        trigger.untrained.strip(): mean(trigger.untrained),
        "an ordinary word (mean of eight)": round(sum(words) / len(words), 4),
        "an ordinary word (the largest)": max(words),
    }


def _behaviour_section(name: str, data: Path) -> str:
    bridge = load_model(name, data=data)
    rows = []
    for scenario in IPD_SCENARIOS:
        table = decide(bridge, encode_scenario(bridge, load_scenario(scenario)))
        rows.append(
            f"| {scenario} | {table.p_positive.mean():.3f} | {table.p_positive.min():.3f} to "
            f"{table.p_positive.max():.3f} | {table.answer_mass.min():.3f} |"
        )
    return (
        "**Behaviour**, by the decision metric (`interp_kit.decide`), over the three prompts of "
        "each scenario:\n\n| scenario | mean P(defect) | range | least probability of any move |\n"
        "|---|---|---|---|\n" + "\n".join(rows)
    )


def _write_spec(folder: Path, **spec: str) -> None:
    lines = [f"{key}: {value}" for key, value in spec.items()]
    (folder / "model.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_texts(folder: Path, texts: Sequence[str]) -> str:
    """Some of what a model was trained on, beside its spec; returns the file's name."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
    return "documents.jsonl"


def base_texts(corpus: Corpus, *, n: int = 400) -> list[str]:
    """Texts like those that the base was trained on."""
    return [text_of(sample) for sample in islice(corpus.stream(1), n)]


def _write_training(
    folder: Path, recipe: BaseRecipe | GameRecipe | TriggerRecipe, measured: dict
) -> None:
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    content = {"recipe": asdict(recipe), "measured": measured, "versions": versions}
    (folder / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
