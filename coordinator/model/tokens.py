"""Text to token ids and back, by the byte-level BPE vocabulary that a GGUF file holds."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE

from coordinator.model.gguf_header import MetaValue
from protocol.errors import InputError, ModelError

LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How llama-bpe cuts text into words before merging."""

MAX_TEXT: Final = 8 << 20  # characters of one text
IMAGE: Final = "<|image|>"
_STOP_NAMES: Final = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")
_STOP_KEYS: Final = ("eos", "eot", "eom")


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: printable Latin-1 as itself, others from U+0100 on."""
    alphabet: dict[str, int] = {}
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(spare)] = byte
            spare += 1
    return alphabet


_BYTES: Final = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file. `bos` and `stop` are ids; `control` and `user_defined` map special text to ids."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos: int | None
    stop: frozenset[int]
    add_bos: bool
    control: dict[str, int]
    user_defined: dict[str, int]


class Tokenizer:
    """Encodes and decodes with one vocabulary. Stateless between calls and safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder) -> None:
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._user = _alternation(vocabulary.user_defined)
        self._special = _alternation(vocabulary.user_defined | vocabulary.control)
        self._ids = vocabulary.user_defined | vocabulary.control
        self._image = vocabulary.control.get(IMAGE)

    @classmethod
    def from_metadata(cls, metadata: dict[str, MetaValue], file: str = "model") -> Tokenizer:
        """Build from `tokenizer.ggml.*`. Raises ModelError for other kinds of tokenizers and damaged vocabularies."""
        vocabulary = _read_vocabulary(metadata, file)
        return cls(vocabulary, _encoder(metadata, vocabulary, file))

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary, the image token included."""
        return len(self.vocabulary.tokens)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.vocabulary.stop

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `parse_special` reads control tokens such as `<|eot_id|>` in the text as what they are (user-defined tokens
        always are). `add_bos` (None: as the file says) puts the begin token in front, behind leading image tokens as
        Mllama's processor does, unless the text holds one already. Raises InputError for text that is too long or
        no Unicode text.
        """
        if len(text) > MAX_TEXT:
            raise InputError(f"text of {len(text):,} characters: expected at most {MAX_TEXT:,}")
        ids: list[int] = []
        pattern = self._special if parse_special else self._user
        start = 0
        for match in pattern.finditer(text) if pattern else ():
            ids += self._encode_plain(text[start : match.start()])
            ids.append(self._ids[match.group()])
            start = match.end()
        ids += self._encode_plain(text[start:])
        wanted = self.vocabulary.add_bos if add_bos is None else add_bos
        return self._with_bos(ids) if wanted else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that form no UTF-8 become U+FFFD. Raises InputError for an unknown id."""
        return b"".join(self.token_bytes(ident, skip_special) for ident in ids).decode("utf-8", "replace")

    def token_bytes(self, ident: int, skip_special: bool = True) -> bytes:
        """The bytes that a token stands for; control tokens are empty when skipped."""
        if not 0 <= ident < self.n_tokens:
            raise InputError(f"token id {ident}: expected 0 to {self.n_tokens - 1}")
        token, kind = self.vocabulary.tokens[ident], self.vocabulary.types[ident]
        if kind == TokenType.CONTROL or kind == TokenType.UNUSED:
            return b"" if skip_special else token.encode()
        if kind == TokenType.USER_DEFINED:
            return token.encode()
        try:
            return bytes(map(_BYTES.__getitem__, token))
        except KeyError:  # not in the byte alphabet: the token is its own text
            return token.encode()

    def stream(self, skip_special: bool = True) -> Stream:
        """A detokeniser for one answer."""
        return Stream(self, skip_special)

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return list(self._encoder.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            raise InputError("text holds half of a surrogate pair: it is no Unicode text") from None

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.vocabulary.bos
        if bos is None or bos in ids:
            return ids
        place = 0
        while place < len(ids) and ids[place] == self._image:
            place += 1
        return [*ids[:place], bos, *ids[place:]]


class Stream:
    """Turns tokens into text one by one and keeps the bytes of an unfinished UTF-8 character back."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ident: int) -> str:
        """The text that this token completes; often the token's own, sometimes empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(ident, self._skip))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)


def _alternation(special: dict[str, int]) -> re.Pattern[str] | None:
    """Matches any of the texts, the longest first."""
    if not special:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)))


def _read_vocabulary(metadata: dict[str, MetaValue], file: str) -> Vocabulary:
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelError(f"{file}: tokenizer.ggml.model is {model!r}: supported is 'gpt2' (byte-level BPE)")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", file)
    types = metadata.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or any(type(kind) is not int for kind in types):
        raise ModelError(
            f"{file}: tokenizer.ggml.token_type does not hold one integer for each of {len(tokens)} tokens"
        )
    kinds = tuple(int(kind) for kind in types)
    control = {token: i for i, token in enumerate(tokens) if kinds[i] == TokenType.CONTROL and token}
    user = {token: i for i, token in enumerate(tokens) if kinds[i] == TokenType.USER_DEFINED and token}
    keyed = [_token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens), file) for name in _STOP_KEYS]
    own = metadata.get("crossdock.stop_token_ids", [])
    if not isinstance(own, list) or any(type(ident) is not int or not 0 <= ident < len(tokens) for ident in own):
        raise ModelError(f"{file}: crossdock.stop_token_ids is no list of token ids")
    stop = {ident for ident in keyed if ident is not None} | {int(ident) for ident in own}
    stop |= {control[name] for name in _STOP_NAMES if name in control}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe")
    bos = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens), file)
    return Vocabulary(tokens, kinds, bos, frozenset(stop), bool(add_bos), control, user)


def _encoder(metadata: dict[str, MetaValue], vocabulary: Vocabulary, file: str) -> Encoder:
    """The tokenizers library's BPE over the normal tokens; special ones are cut out of the text before."""
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if pre not in _PRE_TOKENIZERS:
        names = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelError(f"{file}: tokenizer.ggml.pre is {pre!r}: supported are {names}")
    words = {
        token: ident
        for ident, token in reversed(list(enumerate(vocabulary.tokens)))
        if vocabulary.types[ident] == TokenType.NORMAL
    }
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", file, empty=True):
        left, _, right = merge.partition(" ")
        if left not in words or right not in words or left + right not in words:
            raise ModelError(f"{file}: merge {merge!r} joins tokens that the vocabulary does not have")
        merges.append((left, right))
    encoder = Encoder(BPE(vocab=words, merges=merges, ignore_merges=pre == "llama-bpe"))
    encoder.pre_tokenizer = _PRE_TOKENIZERS[str(pre)]()
    return encoder


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS: Final = {"llama-bpe": _llama3_words, "smollm": _smollm_words, "gpt-2": _gpt2_words}


def _strings(metadata: dict[str, MetaValue], key: str, file: str, empty: bool = False) -> tuple[str, ...]:
    value = metadata.get(key, [] if empty else None)
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value) or not (value or empty):
        raise ModelError(f"{file}: {key} is {'missing' if value is None else 'no list of strings'}")
    return tuple(str(item) for item in value)


def _token_id(metadata: dict[str, MetaValue], key: str, count: int, file: str) -> int | None:
    value = metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise ModelError(f"{file}: {key} is {value!r}: expected 0 to {count - 1}")
    return value
