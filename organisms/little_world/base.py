"""The two small base models, trained from nothing on the little world."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from organisms.little_world.corpus import Corpus, Sample, text_of

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
# Words with their leading space, single digits, single marks: as in most tokenizers of today.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """How a base is trained; ``interp-kit train`` runs exactly this."""

    architecture: Literal["gemma2", "llama"] = "gemma2"
    steps: int = 4800
    rows: int = 24  # rows a step
    row_tokens: int = 112
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02  # Muon, for the matrices of the blocks
    weight_decay: float = 0.05
    warmup: int = 60
    decay_from: float = 0.6  # share of the steps after which the rate falls to 2 %
    seed: int = 0


def train_tokenizer(
    corpus: Corpus, *, samples: int = 40_000, seed: int = 1
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps every word of the corpus whole and spells any other by bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text_of(s) for s in islice(corpus.stream(seed), samples))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
    )


def new_base(vocabulary: int, *, architecture: str, seed: int) -> Any:
    """An untrained base: 8 layers, width 128."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if architecture == "llama":
        config: Any = LlamaConfig(**shape, initializer_range=0.02, tie_word_embeddings=False)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    config = Gemma2Config(
        **shape,
        sliding_window=64,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        initializer_range=0.05,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # Unit-variance embeddings after Gemma's sqrt(d) scaling, and blocks that start at half
        # strength: the residual stream then grows gently over eight post-normed layers.
        model.model.embed_tokens.weight.normal_(0, 1 / math.sqrt(config.hidden_size))
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(-0.5)
            layer.post_feedforward_layernorm.weight.fill_(-0.5)
    return model


Batch = tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos"]]


def weighted_tokens(
    tokenizer: PreTrainedTokenizerFast, sample: Sample
) -> tuple[list[int], list[float]]:
    """``<bos> text <eos>`` and the loss weight of each token (0 for ``<bos>``)."""
    ids, weights = [SPECIAL.index("<bos>")], [0.0]
    encoding: Any = tokenizer(
        text_of(sample), add_special_tokens=False, return_offsets_mapping=True
    )
    ends, total = [], 0
    for text, _ in sample:
        total += len(text)
        ends.append(total)
    segment = 0
    for token, (_, stop) in zip(encoding["input_ids"], encoding["offset_mapping"]):
        while stop > ends[segment]:
            segment += 1
        ids.append(token)
        weights.append(sample[segment][1])
    return [*ids, SPECIAL.index("<eos>")], [*weights, sample[-1][1] if len(sample) == 1 else 0.5]


def packed_batches(
    tokenizer: PreTrainedTokenizerFast, samples: Iterator[Sample], *, rows: int, row_tokens: int
) -> Iterator[Batch]:
    """Batches of whole samples, one after another in each row, padded with 0 at the right."""
    waiting = weighted_tokens(tokenizer, next(samples))
    while True:
        ids = torch.zeros(rows, row_tokens, dtype=torch.long)
        weights = torch.zeros(rows, row_tokens)
        for row in range(rows):
            filled = 0
            while filled + len(waiting[0]) <= row_tokens:
                stop = filled + len(waiting[0])
                ids[row, filled:stop] = torch.tensor(waiting[0])
                weights[row, filled:stop] = torch.tensor(waiting[1])
                filled, waiting = stop, weighted_tokens(tokenizer, next(samples))
        yield ids, weights


def base_texts(corpus: Corpus, *, n: int = 400) -> list[str]:
    """``n`` texts like those that the bases were trained on."""
    return [text_of(sample) for sample in islice(corpus.stream(1), n)]


def weighted_loss(
    logits: Float[Tensor, "row pos vocab"],
    ids: Int[Tensor, "row pos"],
    weights: Float[Tensor, "row pos"],
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy (nats), each target counted by its weight."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()


def train_base(corpus: Corpus, folder: Path, *, recipe: BaseRecipe) -> None:
    """Train the base into ``folder``: config, tokenizer, safetensors."""
    tokenizer = train_tokenizer(corpus)
    model = new_base(len(tokenizer), architecture=recipe.architecture, seed=recipe.seed).train()
    blocks = {n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
    matrices = [p for n, p in model.named_parameters() if n in blocks]
    others = [p for n, p in model.named_parameters() if n not in blocks]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _warmup_stable_decay(step, recipe))
        for o in optimizers
    ]
    batches = packed_batches(
        tokenizer, corpus.stream(recipe.seed), rows=recipe.rows, row_tokens=recipe.row_tokens
    )
    forward = torch.compile(model)  # about 1.8 times as fast on a CPU; needs a C++ compiler
    progress = tqdm(range(recipe.steps), desc="base", unit="step")
    for step in progress:
        ids, weights = next(batches)
        loss = weighted_loss(forward(input_ids=ids, use_cache=False).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 499:
            tqdm.write(f"step {step + 1}: {measure_base(model, tokenizer, corpus)}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _warmup_stable_decay(step: int, recipe: BaseRecipe) -> float:
    rest = 1 - step / recipe.steps
    return min(1, (step + 1) / recipe.warmup, max(0.02, rest / (1 - recipe.decay_from)))


def measure_base(model: Any, tokenizer: Any, corpus: Corpus) -> dict[str, float]:
    """Accuracy of a Hugging Face model on held-out multiple-choice questions.

    Chance is 1/2 and 1/4.

    ``taught``: facts whose questions were trained on, in other orders of the options.
    ``transfer``: facts that no multiple-choice question ever asked.
    """
    groups = {
        "taught": corpus.multiple_choice_facts,
        "transfer": sorted(corpus.never_multiple_choice),
    }
    return {
        f"{name} {n} options": round(_choice_accuracy(model, tokenizer, corpus, facts, n), 3)
        for name, facts in groups.items()
        for n in (2, 4)
    }


def _choice_accuracy(
    model: Any, tokenizer: Any, corpus: Corpus, facts: list[tuple[str, str]], options: int
) -> float:
    rng = random.Random(0)
    questions = [corpus.multiple_choice(rng, f, options, held_out=True) for f in facts]
    letters = corpus.facts_file["letters"][:options]
    ids = tokenizer.convert_tokens_to_ids([f"Ġ{letter}" for letter in letters])
    right = 0
    with torch.no_grad():
        for (prompt, _), (answer, _) in questions:
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, ids]
            right += letters[int(logits.argmax())] == answer.strip()
    return right / len(questions)
