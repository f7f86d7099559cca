"""Tiny random models of each architecture, saved in the Hugging Face layout: no download needed."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [a + b for a in "bdfgklmnprst" for b in "aeiou"]  # 60 words of one token each
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS = {
    # The sliding window is shorter than the prompts of the tests.
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=512,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
ARCHITECTURES = tuple(CONFIGS)
PARALLEL = {  # attention and MLP both read the block's input: there is no stream between them
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=1,
    )
}
LATER = {  # architectures of ready specs; all that holds for the five above is not tried on them
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows of whole 4-bit blocks


def save_tiny(
    architecture: str, folder: Path, *, seed: int = 0, wide: bool = False, shard: str = "1GB"
) -> Path:
    """A random checkpoint with a tokenizer of ``WORDS`` in ``folder``."""
    torch.manual_seed(seed)
    config = (CONFIGS | PARALLEL | LATER)[architecture]()
    for name, value in WIDE.items() if wide else ():
        if hasattr(config, name):
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # biases and gains start at trivial values; identities must not need that
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and Qwen have it, in which every word of ``WORDS`` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS)] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
