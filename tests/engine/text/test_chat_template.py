"""Chats are rendered by the embedded model's own template, and by short ones that fail."""

import re
from functools import cache
from typing import Any

import pytest
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


@pytest.mark.parametrize("content", ["The capital is \n", "  The capital is"])
@pytest.mark.parametrize("filter", ["", "| trim"])
def test_a_continued_message_is_trimmed_at_its_end(content: str, filter: str) -> None:
    tokenizer = templated(PLAIN.replace("m.content", f"m.content {filter}"))
    expected = content.strip() if filter else content.rstrip()
    assert (
        tokenizer.render_chat([USER, said(content)]) == f"[user] Hi there[/][assistant] {expected}"
    )


def test_an_empty_message_is_continued_too() -> None:
    assert templated(PLAIN).render_chat([USER, said("")]) == "[user] Hi there[/][assistant]"


def test_a_last_message_that_the_template_hides_is_not_continued() -> None:
    template = PLAIN.replace("m.content", "m.content.split('</think>')[0]")
    messages = [USER, said("</think>So")]
    assert templated(template).render_chat(messages).endswith("[assistant] [/][assistant] ")


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
