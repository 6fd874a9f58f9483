"""Translate a Hugging Face tokenizer (byte-level BPE) into GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordinator.model.safetensors_file import read_json
from coordinator.model.tokens import LLAMA3_PATTERN, TokenType
from protocol.errors import ModelError

_MAX_TOKENS: Final = 1 << 22
_STOP_NAMES: Final = {"eot": ("<|eot_id|>", "<|im_end|>", "<|end|>"), "eom": ("<|eom_id|>",)}


@dataclass(frozen=True, slots=True)
class HfVocabulary:
    """What `tokenizer.ggml.*` needs. `stop` are all ids that end an answer, the first one is the eos token."""

    pre: str  # llama-bpe | smollm | gpt-2
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    pad: int | None
    stop: tuple[int, ...]
    add_bos: bool
    chat_template: str | None


def read_vocabulary(folder: Path, n_tokens: int) -> HfVocabulary:
    """The folder's vocabulary, padded to at least `n_tokens` with unused tokens.

    Raises ModelError for anything but byte-level BPE with a known pre-tokeniser, and for ids that collide or lie
    outside the model.
    """
    path = folder / "tokenizer.json"
    if n_tokens > _MAX_TOKENS:
        raise ModelError(f"{folder}: a vocabulary of {n_tokens:,}: expected at most {_MAX_TOKENS:,}")
    source = read_json(path)
    config = read_json(folder / "tokenizer_config.json", optional=True)
    model = source.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ModelError(f"{path}: only byte-level BPE tokenizers are supported")
    pre = _pre_tokenizer(path, source)
    _refuse_options(path, source, model, pre)
    tokens, types = _tokens(path, source, model, n_tokens)
    ids = {token: index for index, token in reversed(list(enumerate(tokens)))}
    bos, eos, pad = (_special(config, f"{name}_token", ids) for name in ("bos", "eos", "pad"))
    eot, eom = (next((ids[name] for name in _STOP_NAMES[kind] if name in ids), None) for kind in ("eot", "eom"))
    stop = _stop_ids(folder, eos, len(tokens))
    add_bos = config.get("add_bos_token")
    return HfVocabulary(
        pre, tokens, types, _merges(path, model), bos, stop[0] if stop else None, eot, eom, pad, stop,
        add_bos if isinstance(add_bos, bool) else _adds_bos(source), _chat_template(folder, config),
    )  # fmt: skip


def _pre_tokenizer(path: Path, source: dict[str, Any]) -> str:
    """The GGUF name of the pre-tokeniser, recognised by its parts."""
    pre = source.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    kinds = [part.get("type") for part in parts]
    level = parts[-1] if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space") else None
    if level is not None:
        use_regex = level.get("use_regex", True)
        if kinds == ["ByteLevel"] and use_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and use_regex and parts[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not use_regex and _is_llama3_split(parts[0]):
            return "llama-bpe"
    raise ModelError(f"{path}: pre-tokeniser {kinds} is unknown: supported are those of llama-bpe, smollm and gpt-2")


def _is_llama3_split(part: dict[str, Any]) -> bool:
    pattern = part.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex == LLAMA3_PATTERN and part.get("behavior") == "Isolated" and not part.get("invert")


def _refuse_options(path: Path, source: dict[str, Any], model: dict[str, Any], pre: str) -> None:
    if source.get("normalizer") is not None:
        raise ModelError(f"{path}: a normalizer is set: not supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ModelError(f"{path}: model option {key} is {model[key]!r}: not supported")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise ModelError(f"{path}: ignore_merges is {model.get('ignore_merges')} with the pre-tokeniser of {pre}")


def _tokens(
    path: Path, source: dict[str, Any], model: dict[str, Any], n_tokens: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    vocab, added = model.get("vocab"), source.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ModelError(f"{path}: vocab or added_tokens has the wrong form")
    entries = [(ident, token, TokenType.NORMAL) for token, ident in vocab.items()]
    for entry in added:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        entries.append((entry.get("id"), entry.get("content"), kind))
    found: dict[int, tuple[str, TokenType]] = {}
    for ident, token, kind in entries:
        if type(ident) is not int or not 0 <= ident < _MAX_TOKENS or not isinstance(token, str):
            raise ModelError(f"{path}: token {token!r} has the id {ident!r}: expected 0 to {_MAX_TOKENS - 1}")
        if ident in found and found[ident][0] != token:
            raise ModelError(f"{path}: tokens {found[ident][0]!r} and {token!r} share the id {ident}")
        found[ident] = (token, kind)
    count = max(n_tokens, max(found, default=-1) + 1)
    filled = [found.get(ident, (f"[PAD{ident}]", TokenType.UNUSED)) for ident in range(count)]
    return tuple(token for token, _ in filled), tuple(int(kind) for _, kind in filled)


def _merges(path: Path, model: dict[str, Any]) -> tuple[str, ...]:
    """Merges as `left right`; both the old form (one string) and the new one (a pair) are accepted."""
    merges = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or any(not isinstance(p, str) or " " in p for p in pair):
            raise ModelError(f"{path}: merge {merge!r}: expected two tokens")
        merges.append(" ".join(pair))
    return tuple(merges)


def _special(config: dict[str, Any], key: str, ids: dict[str, int]) -> int | None:
    value = config.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    return ids.get(content) if isinstance(content, str) else None


def _stop_ids(folder: Path, eos: int | None, n_tokens: int) -> tuple[int, ...]:
    """generation_config's eos ids, else the tokenizer's; the first is the main one."""
    value = read_json(folder / "generation_config.json", optional=True).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(ident) is not int or not 0 <= ident < n_tokens for ident in ids):
        raise ModelError(f"{folder / 'generation_config.json'}: eos_token_id is {value!r}: expected token ids")
    main = [eos] if eos is not None and (not ids or eos in ids) else []
    return tuple(dict.fromkeys([*main, *ids]))


def _adds_bos(source: dict[str, Any]) -> bool:
    """True when the post-processor begins a single text with a special token."""
    post = source.get("post_processor") or {}
    for part in post.get("processors", []) if post.get("type") == "Sequence" else [post]:
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            return "SpecialToken" in part["single"][0]
    return False


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json or the key in tokenizer_config.json (also as a list of named ones)."""
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size < 1 << 20:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ModelError(f"{file}: cannot be read as UTF-8") from None
    value = read_json(folder / "chat_template.json", optional=True).get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}.get("default")
    return value if isinstance(value, str) else None
