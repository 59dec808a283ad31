"""Chats are rendered by the embedded model's own template, and by short ones that fail."""

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from engine.core.errors import TemplateError
from engine.text.tokenizer import Tokenizer
from tests.engine.text.test_tokenizer import byte_level, smollm2

USER = {"role": "user", "content": "Hi there"}
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def embedded() -> Tokenizer:
    return Tokenizer(smollm2())


def templated(template: Any) -> Tokenizer:
    tokenizer: PreTrainedTokenizerBase = byte_level()
    tokenizer.chat_template = template
    return Tokenizer(tokenizer)


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_the_embedded_models_template_renders_a_first_message() -> None:
    """It begins with a system message of its own, and ends where the assistant answers."""
    assert embedded().render_chat([USER]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not embedded().chat_uses_tools


def test_the_embedded_models_template_renders_a_history() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, said("Hi!"), USER]
    assert embedded().render_chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_of_a_rendered_chat_are_read_as_such() -> None:
    text = embedded().render_chat([USER])
    ids = embedded().encode(text, add_special_tokens=False)
    assert ids.count(1) == text.count("<|im_start|>") == 3


@pytest.mark.parametrize("content", ["The capital is", "I", "i", "assistant", "<|im_end|>", "{"])
def test_a_last_message_of_the_assistant_is_continued(content: str) -> None:
    """This holds for short messages, whose text may occur elsewhere in the prompt."""
    prompt = embedded().render_chat([USER, said(content)])
    assert prompt.endswith(f"<|im_end|>\n<|im_start|>assistant\n{content}")


HEADERS = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "Llama 3": (
        "{% for m in messages %}{% set shown = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{{ (bos_token if loop.index0 == 0 else '') + shown }}{% endfor %}{% if "
        "add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "Gemma": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == "
        "0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ '<start_of_turn>' + "
        "('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
        "'<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content "
        "+ ' [/INST]' }}{% else %}{{ m.content.strip() + eos_token }}{% endif %}{% endfor %}"
    ),
    "with thoughts": (
        "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
        "{% if m.role == 'assistant' and '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if thought %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ content.strip('\n') + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Templates as those of well-known models, which end a prompt where the message's text begins."""

contents = st.one_of(
    st.text(" \n\t", max_size=4),
    st.text(max_size=20),
    st.tuples(*[st.text(" \n", max_size=3), st.text("a1.<|", max_size=3)] * 2).map("".join),
    st.sampled_from(["1.\n", "", "\n", " \n ", "Hi there", "\n\nHi there \n", "assistant", "END"]),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(HEADERS)), contents)
@example("ChatML", "1.\n").via("white space at its end")
@example("Llama 3", "\n\n").via("nothing but white space")
def test_a_prompt_ends_with_exactly_the_message_to_be_continued(name: str, content: str) -> None:
    tokenizer = templated(HEADERS[name])
    prompt = tokenizer.render_chat([USER, said(content)])
    assert prompt == tokenizer.render_chat([USER]) + content


@given(contents)
@settings(max_examples=50, deadline=None)
def test_the_embedded_model_continues_exactly_the_message(content: str) -> None:
    prompt = embedded().render_chat([USER, said(content)])
    assert prompt == embedded().render_chat([USER]) + content


def test_a_continued_message_may_occur_elsewhere_in_the_prompt() -> None:
    history = [USER, said("Hi there"), USER]
    tokenizer = templated(HEADERS["Gemma"])
    prompt = tokenizer.render_chat([*history, said("Hi there")])
    assert prompt == tokenizer.render_chat(history) + "Hi there"


def test_only_the_last_message_is_continued() -> None:
    prompt = templated(PLAIN).render_chat([USER, said(" Hi \n"), USER])
    assert prompt == "[user] Hi there[/][assistant]  Hi \n[/][user] Hi there[/][assistant] "


def test_a_last_message_that_calls_a_tool_is_not_continued() -> None:
    """Its calls come after its content, and would be cut off."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ m.tool_calls }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    message = said("") | {"tool_calls": ["the call"]}
    prompt = templated(template).render_chat([USER, message])
    assert prompt.endswith("['the call'][assistant] ")


def test_a_thought_before_a_continued_message_stays_where_the_template_puts_it() -> None:
    content = "<think>\nHm.\n</think>\n\nSo "
    prompt = templated(HEADERS["with thoughts"]).render_chat([USER, said(content)])
    assert prompt.endswith("<|im_start|>assistant\n" + content)


@pytest.mark.parametrize(
    ("shown", "content"),
    [
        ("m.content.split('</think>')[0]", "</think>So"),
        ("m.content.split('</think>')[-1]", "<think>Hm.</think>So"),
        ("m.content | replace('  ', ' ')", "two  spaces"),
        ("m.content | tojson", 'a "word"'),
        ("m.content[:10]", "more than ten characters"),
        ("'' if m.role == 'assistant' else m.content", "hidden"),
    ],
)
def test_a_message_that_the_template_alters_cannot_be_continued(shown: str, content: str) -> None:
    tokenizer = templated(PLAIN.replace("m.content", shown))
    with pytest.raises(TemplateError, match="alters the last message"):
        tokenizer.render_chat([USER, said(content)])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, False),
        ("{# tools #}" + PLAIN, False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN, True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}" + PLAIN, True),
        ("{% generation %}{{ tools }}{%- endgeneration -%}", True),
        ("{% if %}{{ tools }}", False),
        (None, False),
    ],
)
def test_a_template_that_uses_tools_is_recognised(template: str | None, expected: bool) -> None:
    assert templated(template).chat_uses_tools is expected


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    tokenizer = templated("{{ tools | tojson }}{{ messages[0].content }}")
    assert tokenizer.render_chat([USER], tools) == (
        '[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]Hi there'
    )
    assert tokenizer.render_chat([USER]) == "nullHi there"


def test_of_several_templates_the_default_is_used() -> None:
    tokenizer = templated({"default": "a", "tool_use": "b"})
    assert tokenizer.render_chat([USER], []) == "a"


def test_special_tokens_are_known_to_the_template() -> None:
    assert templated("{{ bos_token }}-{{ eos_token }}").render_chat([USER]) == "<s>-</s>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "template not found"),
        ({"other": "a"}, "template not found"),
        (
            "\n{{ raise_exception('Roles must alternate') }}",
            "syntax error: Roles must alternate (in <string>:2)",
        ),
        ("{% if %}", r"syntax error: .* \(in <string>:1\)"),
        ("{{ messages[7].content }}", r"undefined value: .* \(in <string>:1\)"),
        ("{{ messages[0].content + 1 }}", ".*str.*"),
        ("{{ messages.__class__.__mro__ }}", r"(syntax|undefined) .*"),
    ],
)
def test_errors_of_a_template_are_in_minijinjas_words(template: Any, text: str) -> None:
    with pytest.raises(TemplateError) as refused:
        templated(template).render_chat([USER])
    told = str(refused.value)
    assert told == text or re.fullmatch(text, told)


@pytest.mark.parametrize(
    ("template", "word", "expected"),
    [
        ("{% if m.role == 'developer' %}", "developer", True),
        ("{{ message['tool_calls'] }}", "tool_calls", True),
        ("{{ message.tool_calls }}", "tool_calls", True),
        ("{{ developers }}{{ tool_call }}", "developer", False),
        ("{{ tool_call }}", "tool_calls", False),
        (None, "developer", False),
    ],
)
def test_a_template_mentions_a_word_or_not(template: str | None, word: str, expected: bool) -> None:
    assert templated(template).chat_mentions(word) is expected
