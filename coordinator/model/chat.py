"""Turn a conversation into a prompt by the model's own chat template, run in a sandbox with limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from coordinator.model.chat_sandbox import MAX_TEMPLATE, Sandbox, TemplateRefusalError
from coordinator.model.gguf_header import MetaValue
from coordinator.model.tokens import IMAGE, Tokenizer
from protocol.errors import InputError, ModelError

ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `images` are placed before the text, each as one `<|image|>`, unless the text has one for each."""

    role: str  # system | user | assistant
    text: str
    images: int = 0


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A prompt to encode with `parse_special=True`; `note` says why the model's own template was not used, else ""."""

    text: str
    note: str = ""


class ChatTemplate:
    """A model's chat template, or the fallback for its family when it has none that works."""

    def __init__(self, source: str | None, bos: str, eos: str, family: str) -> None:
        self._source = source
        self._bos, self._eos, self._family = bos, eos, family

    @classmethod
    def from_metadata(cls, metadata: dict[str, MetaValue], tokenizer: Tokenizer) -> ChatTemplate:
        """Read `tokenizer.chat_template` and the texts of the begin and end tokens."""
        source = metadata.get("tokenizer.chat_template")
        tokens, special = tokenizer.vocabulary.tokens, tokenizer.vocabulary.control
        bos = tokenizer.vocabulary.bos
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        family = "llama3" if "<|start_header_id|>" in special else "chatml" if "<|im_start|>" in special else "plain"
        return cls(
            source if isinstance(source, str) else None,
            "" if bos is None else tokens[bos],
            tokens[eos] if type(eos) is int and 0 <= eos < len(tokens) else "",
            family,
        )

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, now: datetime | None = None
    ) -> ChatPrompt:
        """The prompt for a conversation. `now` is what templates that print today's date see (None: the clock).

        Raises InputError for an unknown role, for a text with `<|image|>` in it and another number of images, or when
        the template itself refuses the conversation, and ModelError for a template that tries to leave its sandbox or
        to outgrow its limits. A template that cannot be read or run is replaced by the fallback, and the result's note
        says so.
        """
        for message in messages:
            if message.role not in ROLES:
                raise InputError(f"role {message.role!r}: expected one of {', '.join(ROLES)}")
        messages = [_placed(message) for message in messages]
        plain = ChatPrompt(fallback(messages, self._family, self._bos, add_generation_prompt))
        if self._source is None:
            return ChatPrompt(plain.text, f"the model has no chat template: the {self._family} form is used")
        if len(self._source) > MAX_TEMPLATE:
            raise ModelError(f"chat template of {len(self._source):,} characters: expected at most {MAX_TEMPLATE:,}")
        variables: dict[str, Any] = {
            "messages": [_as_dict(message) for message in messages],
            "bos_token": self._bos,
            "eos_token": self._eos,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return ChatPrompt(Sandbox(now).render(self._source, variables))
        except TemplateRefusalError as refusal:
            raise InputError(f"the model's chat template refuses: {' '.join(str(refusal).split())[:200]}") from None
        except (SecurityError, RecursionError, MemoryError) as error:
            raise ModelError(f"chat template stopped: {' '.join(str(error).split())[:200]}") from None
        except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return ChatPrompt(
                plain.text, f"the model's chat template fails ({reason}): the {self._family} form is used"
            )


def _placed(message: Message) -> Message:
    """A text that names its images says where they are: none are left to be placed before it."""
    named = message.text.count(IMAGE)
    if not named or not message.images:
        return message
    if named != message.images:
        raise InputError(
            f"the text has {named} {IMAGE} and {message.images} images are given: expected one for each of them,"
            " or none in the text, which places them before it"
        )
    return replace(message, images=0)


def _as_dict(message: Message) -> dict[str, Any]:
    """Plain text as a string, which old templates need; a list of parts as soon as there are images."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, str]] = [{"type": "image"}] * message.images
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


def fallback(messages: Sequence[Message], family: str, bos: str, add_generation_prompt: bool) -> str:
    """A prompt without a template: `llama3`, `chatml`, or `plain` lines of role and text."""
    before, between, after = {
        "llama3": ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        "chatml": ("<|im_start|>", "\n", "<|im_end|>\n"),
        "plain": ("", ": ", "\n"),
    }[family]
    # ChatML models name the begin of a turn as their begin token: no second one in front.
    text = bos if family != "chatml" else ""
    for message in messages:
        text += before + message.role + between + IMAGE * message.images + message.text.strip() + after
    return text + (before + "assistant" + between if add_generation_prompt else "").rstrip(" ")
