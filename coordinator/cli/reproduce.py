"""`crossdock reproduce 10780`: the discussion this project began with, and what each mode of ownership makes of it."""

from __future__ import annotations

import argparse
import json

from coordinator.cli import options
from coordinator.config import parse_workers
from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import open_model
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.tokens import Tokenizer
from coordinator.report.plan import answer
from coordinator.report.reproduce import Result, print_result, result_document
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.generate import Prompt
from coordinator.runtime.reproduce import CAUSES, Scene, reproduce, right_answer
from coordinator.runtime.session import Ownership
from protocol.errors import Exit, UsageError

DISCUSSIONS = ("10780",)
WORKERS = "cpu:1,accel:2"
QUESTION = "Describe this image."


def reproduce_discussion(chosen: argparse.Namespace) -> int:
    """Run the causes in the modes; exits with OK: what is found is what was asked for."""
    if chosen.discussion not in DISCUSSIONS:
        known = ", ".join(DISCUSSIONS)
        raise UsageError(f"reproduce {chosen.discussion}: expected {known} (--cause s2: another cause behind it)")
    causes = [CAUSES[name] for name in chosen.cause or ["s1"]]
    modes = [Ownership(mode) for mode in chosen.ownership or [mode.value for mode in reversed(Ownership)]]
    scene = _scene()
    documents = []
    for number, cause in enumerate(causes):
        right = right_answer(scene, cause)
        for mode in modes:
            result = Result(cause, mode.value, right, tuple(reproduce(scene, cause, mode)))
            documents.append(result_document(result))
            if not chosen.json:
                with answer() as console:
                    if number or mode is not modes[0]:
                        console.print()
                    print_result(console, result)
    if chosen.json:
        print(json.dumps(documents, ensure_ascii=False))
    return Exit.OK


def _scene() -> Scene:
    model = open_model(options.model_path(argparse.Namespace(model=None)))
    params = read_params(model)
    assert params.vision is not None
    tokenizer = Tokenizer.from_metadata(model.metadata, model.path.name)
    text = ChatTemplate.from_metadata(model.metadata, tokenizer).render([Message("user", QUESTION, 1)]).text
    tiles = preprocess(load_image(options.DEMO_IMAGE), params.vision)
    prompt = Prompt(tuple(tokenizer.encode(text, parse_special=True)), (tiles,))
    return Scene(model, params, tokenizer, prompt, parse_workers(WORKERS, 1), FleetOptions())
