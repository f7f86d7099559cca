"""Compile RASP programs into transformers whose circuits are known: run once, results are shipped.

    pip install tracr-pypi==1.0.0 && python -m benchmarks.validity.compile_programs

Writes ``programs/NAME.safetensors``, weights named as TransformerLens names them, and
``NAME.json``: the shape, the words, and inputs with what the program itself gives at the last
position. A native bridge runs them; jax is needed here only. Source: Lindner et al., "Tracr:
Compiled Transformers as a Laboratory for Interpretability", arXiv:2301.05062.
"""

import itertools
import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PROGRAMS = Path(__file__).parent / "programs"
WORDS = {"dyck1": 6}  # of an input, beside BOS; an odd number of brackets is never balanced
USUAL_WORDS = 5
BOS = "BOS"
N_INPUTS = 200


def sources() -> dict[str, tuple[Any, list[Any]]]:
    """Program and vocabulary by name."""
    lib: Any = import_module("tracr.compiler.lib")
    rasp: Any = import_module("tracr.rasp.rasp")

    def seen(word: str) -> Any:
        """1 where the input has the word, else 0, by a head of its own."""
        found = rasp.numerical(rasp.Map(lambda token: float(token == word), rasp.tokens))
        same = rasp.Select(rasp.tokens, rasp.tokens, lambda key, query: key == word)
        return rasp.numerical(rasp.Aggregate(same, found, default=0))

    letters, numbers = ["a", "b", "c"], [1, 2, 3, 4]
    both = rasp.numerical(rasp.LinearSequenceMap(seen("a"), seen("a"), 1, 1))
    either = rasp.categorical(rasp.Map(lambda n: int(n > 0.5), both))
    return {
        "reverse": (lib.make_reverse(rasp.tokens), letters),
        "sort": (
            lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=USUAL_WORDS, min_key=1),
            numbers,
        ),
        "sort_freq": (lib.make_sort_freq(max_seq_len=USUAL_WORDS), letters),
        "frac_prevs": (lib.make_frac_prevs(rasp.tokens == "a"), letters),
        "pair_balance": (lib.make_pair_balance(rasp.tokens, "(", ")"), ["(", ")", "a"]),
        "dyck1": (lib.make_shuffle_dyck(pairs=["()"]), ["(", ")"]),
        "redundant_or": (either, letters),
    }


def compile_program(name: str, program: Any, words: list[Any]) -> None:
    compiling: Any = import_module("tracr.compiler.compiling")
    length = WORDS.get(name, USUAL_WORDS)
    made = compiling.compile_rasp_to_model(
        program, vocab=set(words), max_seq_len=length + 1, compiler_bos=BOS
    )
    config, params = made.model_config, made.params
    heads, width = config.num_heads, config.key_size
    d_model = params["token_embed"]["embeddings"].shape[1]
    weights = {
        "embed.W_E": params["token_embed"]["embeddings"],
        "pos_embed.W_pos": params["pos_embed"]["embeddings"],
    }
    for layer in range(config.num_layers):
        here = f"transformer/layer_{layer}"
        for ours, theirs in (("Q", "query"), ("K", "key"), ("V", "value")):
            own = params[f"{here}/attn/{theirs}"]
            shape = d_model, heads, width
            weights[f"blocks.{layer}.attn.W_{ours}"] = own["w"].reshape(shape).transpose(1, 0, 2)
            weights[f"blocks.{layer}.attn.b_{ours}"] = own["b"].reshape(heads, width)
        own = params[f"{here}/attn/linear"]
        weights[f"blocks.{layer}.attn.W_O"] = own["w"].reshape(heads, width, d_model)
        weights[f"blocks.{layer}.attn.b_O"] = own["b"]
        for ours, theirs in (("in", "linear_1"), ("out", "linear_2")):
            own = params[f"{here}/mlp/{theirs}"]
            weights[f"blocks.{layer}.mlp.W_{ours}"] = own["w"]
            weights[f"blocks.{layer}.mlp.b_{ours}"] = own["b"]
    answers = [str(label) for label in made.residual_labels if label.startswith(f"{program.label}")]
    unembed = np.zeros((d_model, max(2, len(answers))))  # a number is read against nothing
    for column, label in enumerate(answers):
        unembed[made.residual_labels.index(label), column] = 1
    weights["unembed.W_U"] = unembed
    rng = random.Random(0)
    every = list(itertools.product(words, repeat=length))
    asked = [list(row) for row in rng.sample(every, min(N_INPUTS, len(every)))]
    outputs = [made.apply([BOS, *row]) for row in asked]
    encoding = made.input_encoder.encoding_map
    cfg = {
        "n_layers": config.num_layers,
        "n_ctx": len(weights["pos_embed.W_pos"]),
        "d_model": d_model,
        "d_head": width,
        "n_heads": heads,
        "d_mlp": config.mlp_hidden_size,
        "attn_only": False,
        "d_vocab": len(weights["embed.W_E"]),
        "d_vocab_out": unembed.shape[1],
        "normalization_type": None,
        "act_fn": "relu",
        "attention_dir": "causal" if config.causal else "bidirectional",
    }
    described = {
        "cfg": cfg,
        "answers": answers,
        "inputs": [[int(encoding[word]) for word in (BOS, *row)] for row in asked],
        "outputs": [str(o.decoded[-1]) for o in outputs],
    }
    PROGRAMS.mkdir(exist_ok=True)
    floats = {key: np.ascontiguousarray(w, np.float32) for key, w in weights.items()}
    save_file(floats, PROGRAMS / f"{name}.safetensors")
    (PROGRAMS / f"{name}.json").write_text(json.dumps(described) + "\n")
    print(name, cfg["n_layers"], "layers of", cfg["n_heads"], "heads,", len(asked), "inputs")


if __name__ == "__main__":
    for name, (program, words) in sources().items():
        compile_program(name, program, words)
