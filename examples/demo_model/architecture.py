"""The demo model's shape, its starting weights and its prompts."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tokenizer import BOS, EOT, IMAGE, PAD
from tokenizers import Tokenizer
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

TILE, PATCH, TILES = 48, 16, 4
GRID = TILE // PATCH  # patches along a tile's side
HIDDEN, VOCABULARY = 128, 512
INTERMEDIATE = [1, 2]  # the inputs of local vision layers 1 and 2 (see mllama_original.py)
# In tiles: (rows, columns). The aspect ratio id is 1 + the index.
CANVASES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
CHAT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}{text}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def make_config(tokenizer: Tokenizer) -> MllamaConfig:
    """The configuration: 3 + 1 vision layers, 5 text layers with cross-attention at 1 and 3."""
    vision = MllamaVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_global_layers=1,
        num_attention_heads=4,
        vision_output_dim=HIDDEN * (1 + len(INTERMEDIATE)),
        intermediate_layers_indices=INTERMEDIATE,
        image_size=TILE,
        patch_size=PATCH,
        max_num_tiles=TILES,
        supported_aspect_ratios=[list(c) for c in CANVASES],
        initializer_range=0.04,
    )
    text = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=5,
        cross_attention_layers=[1, 3],
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        max_position_embeddings=4096,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOT),
        pad_token_id=tokenizer.token_to_id(PAD),
        initializer_range=0.04,
    )
    image = tokenizer.token_to_id(IMAGE)
    return MllamaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        tie_word_embeddings=False,
    )


def make_processor() -> MllamaImageProcessor:
    """The image processor (the slow class, which needs no torchvision)."""
    size = {"height": TILE, "width": TILE}
    return MllamaImageProcessor(size=size, image_mean=MEAN, image_std=STD, max_image_tiles=TILES)


def make_model(tokenizer: Tokenizer) -> MllamaForConditionalGeneration:
    """A fresh model with open gates and the structured start."""
    model = MllamaForConditionalGeneration._from_config(make_config(tokenizer), attn_implementation="eager")
    names = {"bos_token_id": BOS, "eos_token_id": EOT, "pad_token_id": PAD}
    for key, token in names.items():
        setattr(model.generation_config, key, tokenizer.token_to_id(token))
    with torch.no_grad():
        open_gates(model)
        start_positions(model)
        start_patches(model)
    return model


def open_gates(model: MllamaForConditionalGeneration) -> None:
    """Open all gates: a closed gate (the library's 0) passes no gradient to what lies behind it."""
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.fill_(1.0)
        elif name.endswith(("gate_attn", "gate_ffn")):
            parameter.fill_(0.8)
        elif name.endswith("positional_embedding.gate"):
            parameter.fill_(0.5)


def sinusoids(y: np.ndarray, x: np.ndarray, scale: float = 0.75) -> torch.Tensor:
    """2-D sinusoids of patch coordinates, [len(y), HIDDEN]."""
    quarter = HIDDEN // 4
    waves = 1.0 / 30.0 ** (np.arange(quarter) / quarter)
    ys, xs = y[:, None] * waves, x[:, None] * waves
    parts = np.concatenate([np.sin(ys), np.cos(ys), np.sin(xs), np.cos(xs)], axis=-1)
    return torch.from_numpy((scale * parts).astype(np.float32))


def start_positions(model: MllamaForConditionalGeneration) -> None:
    """Start the tile embedding as sinusoids of the patch's place on the whole canvas, for every canvas."""
    embedding = model.model.vision_model.gated_positional_embedding
    embedding.embedding.zero_()
    embedding.gate.fill_(0.8)
    table = embedding.tile_embedding.weight.view(len(CANVASES) + 1, TILES, GRID * GRID + 1, HIDDEN)
    table.normal_(0, 0.02)
    y, x = (axis.reshape(-1) for axis in np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"))
    for i, (rows, columns) in enumerate(CANVASES):
        for tile in range(rows * columns):
            table[i + 1, tile, 1:] = sinusoids(y + GRID * (tile // columns), x + GRID * (tile % columns))


def start_patches(model: MllamaForConditionalGeneration) -> None:
    """Start the patch projection as a rotated cosine transform: edges as loud as the mean colour."""
    k = np.arange(PATCH)
    waves = [np.cos(np.pi * (k + 0.5) * u / PATCH) for u in range(8)]
    order = sorted(((u, w) for u in range(8) for w in range(8)), key=sum)
    channels = np.array([[0.577, 0.577, 0.577], [0.707, 0, -0.707], [0.408, -0.816, 0.408]])
    rows = []
    for i in range(HIDDEN):
        u, w = order[i // 3]
        pattern = np.outer(waves[u], waves[w])
        pattern *= (0.25 if u + w else 0.06) / np.linalg.norm(pattern)
        rows.append(channels[i % 3][:, None, None] * pattern)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
    weight = model.model.vision_model.patch_embedding.weight
    weight.copy_((rotation @ torch.from_numpy(np.stack(rows).astype(np.float32)).flatten(1)).view_as(weight))


def prompt_ids(tokenizer: Tokenizer, text: str, image: bool = True) -> list[int]:
    """The chat prompt asking `text`, about an image or about none."""
    chat = CHAT.format(image=IMAGE if image else "", text=text)
    return tokenizer.encode(chat, add_special_tokens=False).ids
