"""Measure a demo model on held-out pictures, through the image processor and `generate` of transformers.

    python evaluate.py MODEL [--images 960] [--json FILE]

An answer counts when it is the true sentence, word for word. Held-out pictures come from generators that
training never uses. The controls replace what the vision side says: by zeros, by noise of the same spread,
by another picture's; or take transformers 4.57's own reading of `intermediate_layers_indices`. Then the same
pictures once more with the matrices rounded to quantised types.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import architecture
import gguf
import mllama_original
import torch
import world
from batches import fit, sample_picture
from PIL import Image
from tokenizer import EOT, IMAGE
from tokenizers import Tokenizer
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

FREE, SEED, BATCH, MAX_TOKENS = 0.25, 4242, 48, 28
CONTROLS = ("zeros", "noise", "another picture", "library indices")
QUANTIZED = ("Q8_0", "Q4_0")
ATTRIBUTES = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "size": world.SIZES,
    "count": tuple(world.NUMBERS.values()),
    "place or relation": ("left", "right", "top", "bottom", "center", "above"),
}


@dataclass(slots=True)
class Score:
    """Right answers out of all, by group, and the pairs (truth, answer)."""

    groups: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, scene: world.Scene, canvas: tuple[int, int], answer: str) -> None:
        right = answer == scene.caption
        self.pairs.append((scene.caption, answer))
        for group in ("all", f"kind: {scene.kind}", f"canvas: {canvas[0]}x{canvas[1]}"):
            self.groups[group].append(right)
        if scene.kind == "many":
            self.groups[f"count: {len(scene.things)}"].append(right)
        for name, words in ATTRIBUTES.items():
            truth, said = named(scene.caption, words), named(answer, words)
            if truth or said:
                self.groups[f"words: {name}"].append(truth == said)

    def summary(self) -> dict[str, float]:
        return {name: round(sum(rights) / len(rights), 4) for name, rights in sorted(self.groups.items())}

    def sizes(self) -> dict[str, int]:
        return {name: len(rights) for name, rights in sorted(self.groups.items())}


def named(caption: str, words: tuple[str, ...]) -> list[str]:
    """Those of the words, singular or plural, that the caption says, in its order."""
    found = []
    for word in re.findall("[a-z]+", caption):
        found += [w for w in words if word in (w, world.plural(w))]
    return found


@contextmanager
def changed(model: MllamaForConditionalGeneration, control: str | None) -> Iterator[None]:
    """Let the vision side say zeros or noise, or read the layer indices as the library does."""
    generator = torch.Generator().manual_seed(SEED)

    def replace(_module, _inputs, output):
        seen = output.last_hidden_state
        noise = torch.randn(seen.shape, generator=generator) * seen.std()
        output.last_hidden_state = noise if control == "noise" else torch.zeros_like(seen)
        return output

    hook = model.model.vision_model.register_forward_hook(replace) if control in ("zeros", "noise") else None
    mllama_original.patch(control != "library indices")
    try:
        yield
    finally:
        mllama_original.patch()
        if hook:
            hook.remove()


@contextmanager
def quantized(model: MllamaForConditionalGeneration, name: str) -> Iterator[None]:
    """Round the matrices whose rows divide into blocks, position tables apart, to a type of ggml."""
    kind = gguf.GGMLQuantizationType[name]
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key, tensor in model.state_dict().items():
        if tensor.ndim >= 2 and tensor[0].numel() % 32 == 0 and "positional" not in key:
            blocks = gguf.quants.quantize(tensor.flatten(1).numpy(), kind)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)).view_as(tensor))
    try:
        yield
    finally:
        model.load_state_dict(saved)


class Captioner:
    """A model with its tokenizer and image processor."""

    def __init__(self, folder: Path, model: MllamaForConditionalGeneration | None = None) -> None:
        mllama_original.patch()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.processor = MllamaImageProcessor.from_pretrained(folder)
        load = MllamaForConditionalGeneration.from_pretrained
        self.model = (model or load(folder, attn_implementation="eager")).eval()
        self.end = self.tokenizer.token_to_id(EOT)
        self.options = {
            "do_sample": False,
            "max_new_tokens": MAX_TOKENS,
            "eos_token_id": self.end,
            "pad_token_id": self.model.config.text_config.pad_token_id,
            "output_logits": True,
            "return_dict_in_generate": True,
        }

    @torch.no_grad()
    def generate(
        self, pictures: list[Image.Image], prompt: str, shift: int = 0
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Greedy answers as tokens, and their logits [B, L, V].

        `shift` gives each prompt the picture so many places further on.
        """
        ids = architecture.prompt_ids(self.tokenizer, prompt, image=bool(pictures))
        tokens = torch.tensor([ids] * max(1, len(pictures)))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if pictures:
            seen = self.processor([[p] for p in pictures[shift:] + pictures[:shift]], return_tensors="pt")
            after_image = (tokens == self.tokenizer.token_to_id(IMAGE)).cumsum(1) > 0
            visible = after_image[:, :, None, None] & seen["aspect_ratio_mask"][:, None].bool()
            inputs |= {k: seen[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
            inputs["cross_attention_mask"] = visible.long()
        out = self.model.generate(**inputs, **self.options)
        answers = out.sequences[:, len(ids) :].tolist()
        answers = [a[: a.index(self.end) + 1] if self.end in a else a for a in answers]
        return answers, torch.stack(out.logits, dim=1)

    def say(self, pictures: list[Image.Image], prompt: str, shift: int = 0) -> list[str]:
        """Greedy answers as text."""
        return [self.tokenizer.decode(answer) for answer in self.generate(pictures, prompt, shift)[0]]


def evaluate(captioner: Captioner, images: int, control: str | None = None) -> Score:
    """Ask about held-out pictures, the prompts taken in turn."""
    score, rng = Score(), random.Random(f"held out {SEED}")
    shift = 1 if control == "another picture" else 0
    with changed(captioner.model, control):
        for turn in range(-(-images // BATCH)):
            drawn = [sample_picture(rng, FREE) for _ in range(min(BATCH, images - turn * BATCH))]
            pictures = [picture for _, picture in drawn]
            answers = captioner.say(pictures, world.PROMPTS[turn % len(world.PROMPTS)], shift)
            for (scene, picture), answer in zip(drawn, answers, strict=True):
                score.add(scene, fit(*picture.size)[0], answer)
    return score


def report(captioner: Captioner, images: int, control_images: int) -> dict:
    """All measurements, as JSON can hold them."""
    held_out = evaluate(captioner, images)
    result = {
        "parameters": sum(p.numel() for p in captioner.model.parameters()),
        "pictures": held_out.sizes(),
        "held out": held_out.summary(),
        "no picture": {prompt: captioner.say([], prompt)[0] for prompt in world.PROMPTS},
        "wrong": [f"{truth} | {answer}" for truth, answer in held_out.pairs if truth != answer],
    }
    for control in CONTROLS:
        result[control] = evaluate(captioner, control_images, control).summary()
    for name in QUANTIZED:
        with quantized(captioner.model, name):
            result[name] = evaluate(captioner, images).summary()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure a demo model on held-out pictures.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--control-images", type=int, default=192)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = json.dumps(report(Captioner(options.model), options.images, options.control_images), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
