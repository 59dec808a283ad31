"""Renders the messages of a chat to a prompt, by the chat template that came with the model.

transformers renders the template in a sandbox, since it is code from an unknown author. The
template's input and the texts of errors are those of Text Generation Inference.
"""

import re
import traceback
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from engine.core.errors import TemplateError

_TRAINING_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class ChatTemplate:
    """A model's chat template. Thread-safe. If the model has none, `render` raises."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._hf = tokenizer
        template = tokenizer.chat_template
        self._source = template.get("default") if isinstance(template, dict) else template

    @cached_property
    def uses_tools(self) -> bool:
        """Whether the template presents tools to the model; False if its syntax is wrong."""
        source = _TRAINING_TAG.sub("", self._source or "")
        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except jinja2.TemplateSyntaxError:
            return False
        names = tree.find_all(nodes.Name)
        return any(name.name == "tools" and name.ctx == "load" for name in names)

    def mentions(self, word: str) -> bool:
        """Whether `word` is anywhere in the template, such as the name of a role or a field."""
        return re.search(rf"\b{re.escape(word)}\b", self._source or "") is not None

    def render(
        self, messages: Seq[dict[str, Any]], tools: Seq[dict[str, Any]] | None = None
    ) -> str:
        """Return the prompt for the assistant's next message.

        If the last message is the assistant's, the prompt has the assistant continue it.

        Each message has `role` and `content`. Raises TemplateError.
        """
        if self._source is None:
            raise TemplateError("template not found")
        try:
            if messages and messages[-1]["role"] == "assistant":
                return self._continued(messages, tools)
            return self._apply(messages, tools, continued=False)
        except Exception as error:
            raise TemplateError(_detail(error)) from error

    def _continued(self, messages: Seq[dict[str, Any]], tools: Seq[dict[str, Any]] | None) -> str:
        """Return the prompt up to the end of the last message, trimmed at its end.

        Text Generation Inference cuts the prompt at the message's last occurrence, which may be
        elsewhere if the message is short. transformers marks the end of the message instead.
        If the template does not show the message, the prompt is for a next one.
        """
        try:
            return self._apply(messages, tools, continued=True).rstrip()
        except ValueError:
            return self._apply(messages, tools, continued=False)

    def _apply(
        self, messages: Seq[dict[str, Any]], tools: Seq[dict[str, Any]] | None, continued: bool
    ) -> str:
        rendered = self._hf.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=self._source,
            tokenize=False,
            continue_final_message=continued,
            add_generation_prompt=not continued,
        )
        assert isinstance(rendered, str)
        return rendered


def _detail(error: Exception) -> str:
    """Return the error in minijinja's words, where `raise_exception` is a syntax error."""
    if not isinstance(error, jinja2.TemplateError):
        return str(error)
    kind = "undefined value" if isinstance(error, jinja2.UndefinedError) else "syntax error"
    return f"{kind}: {error.message} (in <string>:{_line(error)})"


def _line(error: jinja2.TemplateError) -> int:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 1 for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else 1
