"""Make the demo model's tokenizer: byte-level BPE laid out as in Llama 3.

    python tokenizer.py OUT

Ids 0 to 495 are BPE tokens, 496 to 511 special tokens, and <|image|> is 512, one past the text vocabulary.
"""

import json
import sys
from pathlib import Path

import world
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BPE_TOKENS = 496
BOS, EOT, PAD, IMAGE = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"
RESERVED = "<|reserved_special_token_{}|>"
SPECIALS = [
    BOS, "<|end_of_text|>", RESERVED.format(0), RESERVED.format(1), PAD, "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", EOT, "<|python_tag|>",
    *(RESERVED.format(i) for i in range(2, 7)), IMAGE,
]  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL_TALK = """\
You are a helpful assistant. user assistant system. Hello! How are you? I am fine, thank you.
Please tell me what the picture shows and how many shapes there are. Is there a circle? \
Yes, there is. No, there is not.
The photo shows a tower in the city with people and trees near the river on a sunny day. What color is it?
the of and to in is that it was for on are as with his they at be this have from or one had by word but not \
what all
were we when your can said there use an each which she do how their if will up other about out \
many then them these"""
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if m['content'] is string %}{{- m['content'] }}"
    "{%- else %}{%- for c in m['content'] %}"
    "{%- if c['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif c['type'] == 'text' %}{{- c['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def corpus() -> list[str]:
    """Every form of sentence of the world, the prompts, the chat frame and some small talk."""
    frame = ["\n\n", "user\n\n", "assistant\n\n", "system\n\n"]
    talk = SMALL_TALK.splitlines()
    empty = [world.caption_blank(background) for background in world.BACKGROUNDS]
    return [
        *world.all_captions(),
        *empty * 200,
        *talk * 24,
        *world.PROMPTS * 400,
        *[world.NO_IMAGE] * 200,
        *frame * 200,
    ]


def build() -> Tokenizer:
    """Train the tokenizer; the same corpus gives the same ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    start = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """Ids lie where the model expects them, any text survives the way there and back, captions are short."""
    assert tokenizer.token_to_id(BOS) == BPE_TOKENS, tokenizer.get_vocab_size()
    assert tokenizer.token_to_id(IMAGE) == BPE_TOKENS + len(SPECIALS) - 1
    for text in ("héllo wörld 12345 — naïve 日本 🙂\n\n  x", "I'm fine", *world.PROMPTS, world.NO_IMAGE):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    for caption in world.all_captions():
        ids = tokenizer.encode(caption, add_special_tokens=False).ids
        assert len(ids) == len(caption.split()) + 1, caption  # one per word, one for the dot


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the three tokenizer files transformers reads."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    config = names | {
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n")


def main() -> None:
    """Make, check and save."""
    tokenizer = build()
    check(tokenizer)
    save(tokenizer, Path(sys.argv[1]))
    print(f"{tokenizer.get_vocab_size()} tokens, {IMAGE} is {tokenizer.token_to_id(IMAGE)}")


if __name__ == "__main__":
    main()
