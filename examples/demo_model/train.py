"""Train the demo model on the synthetic world: one pass, on CPUs, with auxiliary heads from the first step.

    python tokenizer.py OUT
    python train.py OUT --steps 4200 --cooldown 1400

`--ranks R` starts R single-threaded processes that average their gradients. The learning rate stays level
until `--cooldown` steps before the end, then falls along a cosine; so a stopped run can be taken up with
`--resume` and other `--steps`, as long as the level part is not over. All randomness comes from `--seed`,
the rank and the number of the step, so that resuming changes nothing.

The auxiliary heads read the projected vision output. Per patch: shape, colour and place of the thing it
shows; per thing: its shape; from the class tokens: how many things there are, and place and size of a
single one. They are thrown away.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import mllama_original
import torch
import torch.distributed as dist
import world
from architecture import GRID, HIDDEN, TILES, make_model, make_processor, prompt_ids
from batches import COLOUR_NAMES, IGNORE, Batch, stream
from evaluate import Captioner, evaluate
from tokenizer import EOT, IMAGE, PAD
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

WARMUP, EMA, CLIP, NO_IMAGE_EVERY = 120, 0.998, 1.0, 20
BACKGROUND_WEIGHT = 0.25


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    add = parser.add_argument
    add("out", type=Path, help="folder with the tokenizer; gets the model")
    add("--steps", type=int, default=4200)
    add("--cooldown", type=int, default=1400, help="steps over which the learning rate falls")
    add("--vision-first", type=int, default=800, help="steps of which three in four skip the text side")
    add("--batch", type=int, default=32, help="pictures per rank and step")
    add("--lr", type=float, default=1.5e-3)
    add("--aux", type=float, default=1.0, help="weight of the auxiliary losses; falls in the cooldown")
    add("--free", type=float, default=0.25, help="share of pictures whose proportions fit no canvas")
    add("--seed", type=int, default=0)
    add("--ranks", type=int, default=2)
    add("--save-every", type=int, default=200)
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    return parser.parse_args()


# --- the two sides of the model -----------------------------------------------------------------------------


def look(model: MllamaForConditionalGeneration, batch: Batch) -> Tensor:
    """The projected vision output, [B, T, 1 + P, HIDDEN]."""
    vision = model.model.vision_model(batch.pixels, batch.ratio_ids, batch.tile_mask).last_hidden_state
    projected = model.model.multi_modal_projector(vision)
    return projected.reshape(len(batch.captions), TILES, GRID * GRID + 1, HIDDEN)


class Speaker:
    """Scores captions under the text side."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.image, self.pad, self.end = (tokenizer.token_to_id(t) for t in (IMAGE, PAD, EOT))
        self.prompts = [prompt_ids(tokenizer, p) for p in world.PROMPTS]
        self.blind_prompts = [prompt_ids(tokenizer, p, image=False) for p in world.PROMPTS]
        self.encode = tokenizer.encode

    def sequences(self, prompts: list[list[int]], captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens and the next tokens to learn, [B, L] each; prompt and padding are not learnt."""
        answers = [[*self.encode(c, add_special_tokens=False).ids, self.end] for c in captions]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        tokens = torch.full((len(captions), length), self.pad)
        targets = torch.full((len(captions), length), IGNORE)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            stop = len(prompt) + len(answer)
            tokens[i, :stop] = torch.tensor(prompt + answer)
            targets[i, len(prompt) - 1 : stop - 1] = torch.tensor(answer)
        return tokens, targets

    def loss(self, model: MllamaForConditionalGeneration, batch: Batch, seen: Tensor, step: int) -> Tensor:
        """The captions' cross entropy given the vision output, the prompts taken in turn."""
        prompts = [self.prompts[(step + i) % len(self.prompts)] for i in range(len(batch.captions))]
        tokens, targets = self.sequences(prompts, batch.captions)
        after_image = (tokens == self.image).cumsum(1) > 0
        visible = (after_image[:, :, None, None] & batch.tile_mask[:, None].bool()).long()
        mask, row_mask = _prepare_cross_attention_mask(visible, GRID * GRID + 1, torch.float32)
        hidden = model.model.language_model(
            input_ids=tokens,
            cross_attention_states=seen.flatten(1, 2),
            cross_attention_mask=mask,
            full_text_row_masked_out_mask=row_mask,
            use_cache=False,
        ).last_hidden_state
        return self.learn(model, hidden, targets)

    def blind_loss(self, model: MllamaForConditionalGeneration) -> Tensor:
        """The cross entropy of saying that there is no image; the cross-attention layers are skipped."""
        tokens, targets = self.sequences(self.blind_prompts, [world.NO_IMAGE] * len(self.blind_prompts))
        hidden = model.model.language_model(input_ids=tokens, use_cache=False).last_hidden_state
        return self.learn(model, hidden, targets)

    @staticmethod
    def learn(model: MllamaForConditionalGeneration, hidden: Tensor, targets: Tensor) -> Tensor:
        wanted = targets != IGNORE
        return functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


class Heads(nn.Module):
    """The auxiliary heads: linear questions to the projected vision output."""

    def __init__(self) -> None:
        super().__init__()
        shapes, colours = len(world.SHAPES), len(COLOUR_NAMES)
        self.patch_shape = nn.Linear(HIDDEN, 1 + shapes)
        self.patch_colour = nn.Linear(HIDDEN, 1 + colours)
        self.patch_place = nn.Linear(HIDDEN, len(world.PLACES))
        self.thing_shape = nn.Linear(HIDDEN, shapes)
        self.scene_count = nn.Linear(HIDDEN, 1 + max(world.NUMBERS))
        self.scene_place = nn.Linear(HIDDEN, len(world.PLACES))
        self.scene_size = nn.Linear(HIDDEN, len(world.SIZES))
        weight = torch.tensor([BACKGROUND_WEIGHT, *[1.0] * shapes])
        self.register_buffer("shape_weight", weight, persistent=False)

    def losses(self, seen: Tensor, batch: Batch) -> dict[str, Tensor]:
        """One cross entropy per head."""
        patches = seen[:, :, 1:].reshape(-1, HIDDEN)
        things = pool(patches, batch.patch_thing, len(batch.thing_shape))
        present = batch.tile_mask.transpose(1, 2).float()
        scenes = (seen[:, :, 0] * present).sum(1) / present.sum(1)
        entropy = functional.cross_entropy
        return {
            "patch_shape": entropy(self.patch_shape(patches), batch.patch_shape, weight=self.shape_weight),
            "patch_colour": entropy(self.patch_colour(patches), batch.patch_colour),
            "patch_place": entropy(self.patch_place(patches), batch.patch_place),
            "thing_shape": entropy(self.thing_shape(things), batch.thing_shape),
            "scene_count": entropy(self.scene_count(scenes), batch.scene_count),
            "scene_place": entropy(self.scene_place(scenes), batch.scene_place),
            "scene_size": entropy(self.scene_size(scenes), batch.scene_size),
        }


def pool(patches: Tensor, owner: Tensor, n: int) -> Tensor:
    """The mean of each thing's patches, [n, HIDDEN]."""
    owned = owner >= 0
    sums = patches.new_zeros(n, HIDDEN).index_add(0, owner[owned], patches[owned])
    return sums / torch.bincount(owner[owned], minlength=n).clamp(min=1)[:, None]


# --- one step -----------------------------------------------------------------------------------------------


def falling(step: int, steps: int, cooldown: int) -> float:
    """1 until the cooldown, then along a cosine to 0."""
    done = max(0.0, (step - (steps - cooldown)) / max(1, cooldown))
    return 0.5 + 0.5 * math.cos(math.pi * done)


class Optimizer:
    """Muon for the matrices within the model's layers, AdamW for embeddings, heads, vectors and gates."""

    def __init__(self, modules: nn.ModuleList, lr: float) -> None:
        matrices, rest = [], []
        for name, parameter in modules.named_parameters():
            inner = name.startswith("0.") and "embed" not in name and "lm_head" not in name
            (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        ]

    def step(self, lr: float) -> None:
        """Move the weights along their gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def average_gradients(parameters: list[Tensor], ranks: int) -> None:
    """Replace each gradient by its mean over the ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@dataclass
class Run:
    """What a run carries from step to step."""

    model: MllamaForConditionalGeneration
    heads: Heads
    optimizer: Optimizer
    average: dict[str, Tensor]
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def fresh(cls, tokenizer: Tokenizer, options: argparse.Namespace) -> "Run":
        """A run at step 0."""
        model, heads = make_model(tokenizer).train(), Heads()
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
        return cls(model, heads, Optimizer(nn.ModuleList([model, heads]), options.lr), average)

    def parts(self) -> dict[str, nn.Module | Optimizer]:
        return {"model": self.model, "heads": self.heads, "optimizer": self.optimizer}

    def save(self, path: Path) -> None:
        """Write a checkpoint, never half of one."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"average": self.average, "step": self.step, "seconds": self.seconds}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        state = torch.load(path)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]

    def parameters(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.heads.parameters()]

    def advance(self, batch: Batch, speaker: Speaker, options: argparse.Namespace) -> dict[str, float]:
        """Learn from one batch; return the losses."""
        self.step += 1
        fall = falling(self.step, options.steps, options.cooldown)
        lr = options.lr * min(1.0, self.step / WARMUP) * fall + 1e-6
        seen = look(self.model, batch)
        losses = self.heads.losses(seen, batch)
        total = options.aux * fall * sum(losses.values())
        if self.step >= options.vision_first or self.step % 4 == 0:
            losses["caption"] = speaker.loss(self.model, batch, seen, self.step)
            total = total + losses["caption"]
        if self.step % NO_IMAGE_EVERY == 0:
            losses["no_image"] = speaker.blind_loss(self.model)
            total = total + 0.2 * losses["no_image"]
        self.optimizer.zero_grad()
        total.backward()
        if options.ranks > 1:
            average_gradients(self.parameters(), options.ranks)
        nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        self.optimizer.step(lr)
        self.follow()
        return {name: loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Move the running average of the weights."""
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        names, weights = zip(*self.model.named_parameters(), strict=True)
        torch._foreach_lerp_([self.average[name] for name in names], list(weights), 1 - keep)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the running average in the weights' place."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.average[name])


# --- the loop -----------------------------------------------------------------------------------------------


class Log:
    """Means of the losses, one JSON line every few steps."""

    def __init__(self, path: Path, every: int = 25) -> None:
        self.path, self.every = path, every
        self.sums: dict[str, list[float]] = {}

    def add(self, run: Run, losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            self.sums.setdefault(name, []).append(loss)
        if run.step % self.every == 0:
            means = {name: round(sum(values) / len(values), 4) for name, values in self.sums.items()}
            self.write({"step": run.step, "seconds": round(run.seconds), **means})
            self.sums = {}

    def write(self, record: dict) -> None:
        with self.path.open("a") as file:
            print(json.dumps(record), file=file)


def train(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One rank's whole run; rank 0 logs, saves and at the end writes the model."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    mllama_original.patch()
    if options.ranks > 1:
        store = f"file://{meeting}"
        wait = timedelta(minutes=30)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks, timeout=wait)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    speaker, run = Speaker(tokenizer), Run.fresh(tokenizer, options)
    checkpoint = options.out / "checkpoint.pt"
    if options.resume:
        run.load(checkpoint)
    log = Log(options.out / "train_log.jsonl")
    start = time.monotonic() - run.seconds
    for batch in stream(options.seed, rank, run.step + 1, options.steps, options.batch, options.free):
        losses = run.advance(batch, speaker, options)
        run.seconds = time.monotonic() - start
        if rank == 0:
            log.add(run, losses)
            if run.step % options.save_every == 0:
                run.save(checkpoint)
    if rank == 0:
        write_model(run, options.out, log)


def write_model(run: Run, out: Path, log: Log) -> None:
    """Save the averaged weights in the hub's layout and look at them once."""
    run.finish()
    run.model.eval().save_pretrained(out)
    make_processor().save_pretrained(out)
    held_out = evaluate(Captioner(out, run.model), 192).summary()
    log.write({"step": run.step, "seconds": round(run.seconds), "held_out": held_out})


def main() -> None:
    """Start the ranks and wait for them."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (options, f"{folder}/meeting"), nprocs=options.ranks)


if __name__ == "__main__":
    main()
