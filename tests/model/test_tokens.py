from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from hf_folder import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from coordinator.model.gguf_file import ModelFile
from coordinator.model.gguf_metadata import tokenizer_metadata
from coordinator.model.hf_tokenizer import read_vocabulary
from coordinator.model.tokens import Tokenizer
from protocol.errors import InputError, ModelError

REFERENCE = Path(__file__).parent.parent / "data" / "ref_mllama"

# Plain Unicode, and what trips tokenizers: combining characters, joiners, flags, digits, spaces and line ends.
AWKWARD = [
    "e\u0301", "\u1e9b\u0323", "👩\u200d👩\u200d👧", "🇩🇪", "🙂", "日本語", "العربية", "ﬁ", "\u00a0", "\u3000", "\r\n",
    "\t", "  ", "\n\n ", "'s", "'LL", "don't", "1234567", "١٢٣", "½", "_", "%%", "\x00", "\x85", "\ufeff", "İ", "ß",
    "<|image|>", "<|eot_id|>", "<|", "|>", "image", "<tool>", "<|begin|>", "shows a", "\u0300",
]  # fmt: skip
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), max_size=10).map("".join),
)


def metadata_of(folder: Path, n_tokens: int = 0) -> dict[str, Any]:
    """What a file converted from this folder holds about its tokenizer."""
    pairs = tokenizer_metadata(read_vocabulary(folder, n_tokens))
    assert GGUFValueType.STRING == 8
    return {key: list(value) if isinstance(value, tuple) else value for key, value, _ in pairs if value is not None}


@pytest.fixture(scope="module")
def reference_pair() -> tuple[Tokenizer, Library]:
    library = Library.from_file(str(REFERENCE / "tokenizer.json"))
    return Tokenizer.from_metadata(metadata_of(REFERENCE, 301)), library


@pytest.fixture(scope="module", params=["llama-bpe", "smollm", "gpt-2"])
def trained_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Library]:
    folder = tmp_path_factory.mktemp("tokenizer")
    library = make_tokenizer(request.param)
    library.save(str(folder / "tokenizer.json"))
    metadata = metadata_of(folder)
    assert metadata["tokenizer.ggml.pre"] == request.param
    return Tokenizer.from_metadata(metadata), library


def assert_equal(pair: tuple[Tokenizer, Library], text: str) -> None:
    ours, library = pair
    expected = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_bos=False, parse_special=True) == expected
    raw = b"".join(ours.token_bytes(ident, skip_special=False) for ident in expected)
    assert raw == text.encode()


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_equals_the_library_on_the_reference(reference_pair: tuple[Tokenizer, Library], text: str) -> None:
    assert_equal(reference_pair, text)


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_equals_the_library_on_trained_vocabularies(trained_pair: tuple[Tokenizer, Library], text: str) -> None:
    assert_equal(trained_pair, text)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_decoding_gives_the_text_back(trained_pair: tuple[Tokenizer, Library], text: str) -> None:
    tokenizer = trained_pair[0]
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@given(st.lists(st.integers(0, 300), max_size=30))
@settings(max_examples=200, deadline=None)
def test_stream_equals_decode_and_never_splits_a_character(
    reference_pair: tuple[Tokenizer, Library], ids: list[int]
) -> None:
    tokenizer = reference_pair[0]
    stream = tokenizer.stream()
    pieces = [stream.push(ident) for ident in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_stream_holds_half_a_character_back(reference_pair: tuple[Tokenizer, Library]) -> None:
    tokenizer = reference_pair[0]
    ids = tokenizer.encode("🙂", add_bos=False)
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(ident) for ident in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""
    assert [stream.push(ident) for ident in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("case", ["square_2x2", "text_only"])
def test_prompts_of_the_reference(case: str, ref_model: ModelFile, reference: Path) -> None:
    tokenizer = Tokenizer.from_metadata(ref_model.metadata)
    expected = np.load(reference / f"{case}.npz")["input_ids"].reshape(-1).tolist()
    image, question = ("<|image|>", "Describe this image.") if case == "square_2x2" else ("", "What is in this image?")
    text = (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.encode(text, parse_special=True) == expected
    assert tokenizer.decode(expected, skip_special=False) == text


def test_begin_token(reference_pair: tuple[Tokenizer, Library]) -> None:
    """It stands in front, but behind leading images, and never twice."""
    tokenizer = reference_pair[0]
    begin, image = 284, 300
    plain = tokenizer.encode("Hi", add_bos=False)
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_bos=True) == [begin, *plain]
    assert tokenizer.encode("<|image|><|image|>Hi", True, True) == [image, image, begin, *plain]
    assert tokenizer.encode("<|begin_of_text|>Hi", True, True) == [begin, *plain]
    assert tokenizer.encode("<|image|><|begin_of_text|>Hi", True, True) == [image, begin, *plain]
    assert tokenizer.encode("", True) == [begin]
    assert tokenizer.encode("", False) == []


def test_special_text_is_plain_unless_asked(reference_pair: tuple[Tokenizer, Library]) -> None:
    tokenizer = reference_pair[0]
    assert 293 not in tokenizer.encode("<|eot_id|>", add_bos=False)
    assert tokenizer.encode("<|eot_id|>", False, parse_special=True) == [293]
    assert tokenizer.decode([293]) == ""
    assert tokenizer.decode([293], skip_special=False) == "<|eot_id|>"
    assert tokenizer.decode(tokenizer.encode("a<|eot_id|>b", add_bos=False)) == "a<|eot_id|>b"


def test_user_defined_tokens_are_always_parsed(trained_pair: tuple[Tokenizer, Library]) -> None:
    tokenizer, library = trained_pair
    ident = library.token_to_id("<tool>")
    assert ident in tokenizer.encode("x<tool>y", add_bos=False)
    assert tokenizer.decode([ident]) == "<tool>"


def test_stop_ids(ref_model: ModelFile) -> None:
    tokenizer = Tokenizer.from_metadata(ref_model.metadata)
    assert tokenizer.stop_ids == {285, 292, 293}  # end_of_text, eom_id, eot_id
    assert Tokenizer.from_metadata({**ref_model.metadata, "crossdock.stop_token_ids": [5]}).stop_ids >= {5, 293}


def test_bad_input(reference_pair: tuple[Tokenizer, Library]) -> None:
    tokenizer = reference_pair[0]
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(InputError, match="expected at most"):
        tokenizer.encode("a" * ((8 << 20) + 1))
    for ident in (-1, 301):
        with pytest.raises(InputError, match=f"token id {ident}: expected 0 to 300"):
            tokenizer.decode([ident])


CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "other model": ("tokenizer.ggml.model", lambda _: "llama", "'llama': supported is 'gpt2'"),
    "other pre-tokeniser": ("tokenizer.ggml.pre", lambda _: "qwen2", "'qwen2': supported are gpt-2, llama-bpe, smollm"),
    "no pre-tokeniser": ("tokenizer.ggml.pre", lambda _: None, "'missing': supported are"),
    "no tokens": ("tokenizer.ggml.tokens", lambda _: None, "tokens is missing"),
    "numbers as tokens": ("tokenizer.ggml.tokens", lambda _: [1, 2], "no list of strings"),
    "too few types": ("tokenizer.ggml.token_type", lambda value: value[:-1], "one integer for each of 301 tokens"),
    "unknown part of a merge": ("tokenizer.ggml.merges", lambda value: [*value, "qq xx"], "merge 'qq xx' joins"),
    "merge without a space": ("tokenizer.ggml.merges", lambda value: ["ab"], "merge 'ab' joins"),
    "eos beyond": ("tokenizer.ggml.eos_token_id", lambda _: 301, "eos_token_id is 301: expected 0 to 300"),
    "bos of text": ("tokenizer.ggml.bos_token_id", lambda _: "x", "bos_token_id is 'x'"),
    "stop beyond": ("crossdock.stop_token_ids", lambda _: [999], "no list of token ids"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_metadata(name: str, ref_model: ModelFile) -> None:
    key, change, pattern = CHANGES[name]
    metadata = dict(ref_model.metadata)
    value = change(metadata.get(key))
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    with pytest.raises(ModelError, match=pattern) as caught:
        Tokenizer.from_metadata(metadata, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ")
