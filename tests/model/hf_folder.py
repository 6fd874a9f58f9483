"""Write small Hugging Face model folders for the converter's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The image shows a red tower on a gray background. It's 1234 metres high, isn't it?",
    "Das Bild zeigt einen grünen Würfel; naïve café, 日本語のテキスト, 🙂🙂 und 12,5 %.",
    "    def f(x):\n\treturn x ** 2\r\n\n\n   # three   spaces   ",
] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(pre: str, added: tuple[str, ...] = ("<|begin|>", "<|stop|>")) -> Tokenizer:
    """Train a byte-level BPE of about 400 tokens."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    parts = {
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), level],
        "gpt-2": [level],
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(added))
    tokenizer.add_tokens(["<tool>"])
    begin = tokenizer.token_to_id(added[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{added[0]} $A", special_tokens=[(added[0], begin)]
    )
    return tokenizer


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 420, "tie_word_embeddings": False, **changes,
    }  # fmt: skip


def llama_weights(config: dict[str, Any], tied: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    width, n_ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (kv, width) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (n_ff, width) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, n_ff)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], pre: str = "smollm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(pre).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>", "eos_token": "<|stop|>"}))
    save_file(weights, folder / "model.safetensors")
    return folder
