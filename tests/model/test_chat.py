from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from coordinator.model.chat import ChatPrompt, ChatTemplate, Message, fallback
from coordinator.model.chat_sandbox import MAX_OUTPUT, MAX_TEMPLATE
from coordinator.model.gguf_file import ModelFile
from coordinator.model.tokens import Tokenizer
from protocol.errors import InputError, ModelError

HELLO = [Message("user", "Hi")]


def render(source: str | None, messages: list[Message] = HELLO, **options: Any) -> ChatPrompt:
    return ChatTemplate(source, "<s>", "</s>", options.pop("family", "plain")).render(messages, **options)


def test_text_and_images() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ '<|image|>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    conversation = [Message("user", "What is it?", 2), Message("assistant", "A cat."), Message("user", "Sure?")]
    prompt = render(source, conversation)
    assert prompt.text == "<s>[user]<|image|><|image|>What is it?[assistant]A cat.[user]Sure?[assistant]"
    assert prompt.note == ""
    assert render(source, add_generation_prompt=False).text == "<s>[user]Hi"


@pytest.mark.parametrize("source", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_text_may_place_its_images_itself(source: str | None) -> None:
    text = "Compare <|image|> with <|image|>."
    assert render(source, [Message("user", text, 2)]).text.count("<|image|>") == 2
    assert text in render(source, [Message("user", text, 2)]).text
    assert text in render(source, [Message("user", text)]).text
    for images in (1, 3):
        with pytest.raises(InputError, match=rf"the text has 2 <\|image\|> and {images} images are given"):
            render(source, [Message("user", text, images)])


def test_blocks_are_trimmed_as_transformers_does() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend"
    assert render(source).text == "Hi\nend"


def test_what_templates_use() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m['content'] | trim | upper }}{% endfor %}"
        "|{{ ns.n }}|{{ 'a' ~ 1 ~ 'b' }}|{{ ['x', 'y'] | join(', ') }}|{{ {'k': 'ü'} | tojson }}"
        "|{{ 'aXa'.replace('X', '-') }}|{{ 1 < 2 }}{{ 'a' in 'cat' }}{{ nothing == 'x' }}"
        "|{{ 'b=c'.split('=')[1] }}|{{ range(3) | list }}|{{ messages[1:] | length }}|{{ date is defined }}"
        "|{{ messages | map(attribute='role') | join('+') }}|{{ 'a,b' | replace(',', ';') }}|{{ '7' | int + 1 }}"
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}|{{ twice('q') }}|{{ 'x' if tools is none else 'y' }}"
    )
    conversation = [Message("system", "s"), Message("user", " hi ")]
    assert render(source, conversation).text == (
        '0TrueFalse1FalseTrueHI|2|a1b|x, y|{"k": "ü"}|a-a|TrueTrueFalse|c|[0, 1, 2]|1|False|system+user|a;b|8|qq|x'
    )


def test_today() -> None:
    now = datetime(2024, 7, 26)
    assert render("{{ strftime_now('%d %b %Y') }}", now=now).text == "26 Jul 2024"


def test_own_template_of_a_model(ref_model: ModelFile) -> None:
    tokenizer = Tokenizer.from_metadata(ref_model.metadata)
    metadata = {**ref_model.metadata, "tokenizer.chat_template": "{{ bos_token }}+{{ eos_token }}"}
    assert ChatTemplate.from_metadata(metadata, tokenizer).render(HELLO).text == "<|begin_of_text|>+<|eot_id|>"


def test_fallback_forms(ref_model: ModelFile) -> None:
    tokenizer = Tokenizer.from_metadata(ref_model.metadata)
    prompt = ChatTemplate.from_metadata(ref_model.metadata, tokenizer).render([Message("user", "Hi ", 1)])
    assert prompt.text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt.note == "the model has no chat template: the llama3 form is used"
    assert fallback(HELLO, "chatml", "<|im_start|>", True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert fallback(HELLO, "plain", "<s>", True) == "<s>user: Hi\nassistant:"
    assert fallback(HELLO, "plain", "", False) == "user: Hi\n"


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ messages | no_such_filter }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% magic %}",
    ],
)
def test_templates_that_fail_fall_back(source: str) -> None:
    prompt = render(source)
    assert prompt.text == "<s>user: Hi\nassistant:"
    assert prompt.note.startswith("the model's chat template fails (")
    assert "\n" not in prompt.note


def test_refusal_of_the_template_is_told() -> None:
    with pytest.raises(InputError, match=r"the model's chat template refuses: Roles must alternate"):
        render("{{ raise_exception('Roles must\nalternate') }}")


def test_unknown_role() -> None:
    with pytest.raises(InputError, match="role 'robot': expected one of system, user, assistant"):
        render(None, [Message("robot", "Hi")])


LONG = "{% set a = range(200000) | join('x') %}"

ATTACKS = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "comparing": "{% set a = namespace(x=['ab'], y=['ab']) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
    "{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}",
    "copying": "{% set a = range(20000) | join('x') %}{% for i in range(150000) %}{% set b = a ~ i %}{% endfor %}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "product": "{{ 'a' * 1000000000 }}",
    "power": "{{ 10 ** 100000000 }}",
    "range": "{{ range(1000000000) | list }}",
    "nested loops": "{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nesting": "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "json": "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "joining": "{% set a = range(2000) | join('x') %}{% set l = [a,a,a,a,a,a,a,a,a,a] %}"
    "{% set b = l | join %}{% set c = [b,b,b,b,b,b,b,b,b,b] | join %}{{ [c,c,c,c,c,c,c,c,c,c] | join }}",
    "replacing": "{% set a = range(20000) | join('x') %}{{ a.replace('x', a) }}",
    "replacing by filter": "{% set a = range(20000) | join('x') %}{{ a | replace('x', a) }}",
    "capturing": "{% set x %}aaaaaaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for i in range(100000) %}" + "z" * 100 + "{% endfor %}",
    "date": "{{ strftime_now('%d' ~ '%d%d%d%d%d%d%d%d%d%d' ~ '" + "%d" * 60 + "') }}",
    "length": "x" * (MAX_TEMPLATE + 1),
    "filters": "{% for i in range(100000) %}{% if range(200000) | list | length %}{% endif %}{% endfor %}",
    "lazy filters": "{% for i in range(100000) %}"
    "{{ range(200000) | map('string') | map('upper') | select('none') | first | default('') }}{% endfor %}",
    "sorting": "{% set a = range(100000) | list %}{% for i in range(5000) %}{{ (a | sort)[0] }}{% endfor %}",
    "filtering text": LONG + "{% for i in range(90000) %}{{ (a | upper)[0] }}{% endfor %}",
    "methods": LONG + "{% for i in range(90000) %}{{ a.upper()[0] }}{{ a.split('x')[0] }}{% endfor %}",
    "slices": LONG + "{% for i in range(90000) %}{{ a[1:][0] }}{% endfor %}",
    "tests": "{% set a = range(200000) | list %}{% for i in range(90000) %}{{ 'x' is in(a) }}{% endfor %}",
    "searching numbers": "{% for i in range(90000) %}{{ 'x' in range(200000) }}{% endfor %}",
    "counting numbers": "{% for i in range(90000) %}{{ range(200000).count('x') }}{% endfor %}",
    "stripping": LONG + "{{ (a + 'y').strip('z' + a) }}",
    "trimming": LONG + "{{ (a + 'y') | trim('z' + a) }}",
    "arguments": LONG + "{% for i in range(3) %}{% for j in range(60000) %}"
    "{{ loop.changed(a) }}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [1] recursive %}{% if i %}{{ loop(range(200000)) }}{% endif %}{% endfor %}",
    "memory": "{{ (1).to_bytes(8000000000, 'big') | length }}",
    "dictionaries": "{% for i in range(90000) %}{{ dict.fromkeys(range(200000)) | length }}{% endfor %}",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "sorting")) for n in ATTACKS])
def test_attack_is_stopped(name: str) -> None:
    """Within seconds of processor time; some of them would go on for hours."""
    began = time.process_time()
    with pytest.raises(ModelError, match="chat template") as caught:
        render(ATTACKS[name])
    assert time.process_time() - began < 10
    assert "\n" not in str(caught.value)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ModelError, match="unsafe"):
        render("{{ messages.append(1) }}")


def test_long_conversations_fit() -> None:
    text = "ä" * (MAX_OUTPUT // 8)
    source = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    assert len(render(source, [Message("user", text)] * 4).text) > 4 * len(text)
