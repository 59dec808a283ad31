"""Renders the messages of a chat to a prompt, by the chat template that came with the model.

transformers renders the template in a sandbox, since it is code from an unknown author. The
template's input and the texts of errors are those of Text Generation Inference.
"""

import re
import traceback
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any
from uuid import uuid4

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

        If the last message is the assistant's, the prompt ends with exactly its content, for the
        assistant to continue it.

        Each message has `role` and `content`. Raises TemplateError.
        """
        if self._source is None:
            raise TemplateError("template not found")
        if messages and messages[-1]["role"] == "assistant":
            return self._continued(messages, tools)
        return self._apply(messages, tools, add_generation_prompt=True)

    def _continued(self, messages: Seq[dict[str, Any]], tools: Seq[dict[str, Any]] | None) -> str:
        """Return the prompt up to the end of the last message.

        A mark at the end of its content tells where that is, even if the template trims the
        content or the same text is elsewhere, too. White space before the content does not reach
        the template, lest it be taken for the template's own, and is put back into the prompt.
        """
        *before, last = messages
        content, mark = last["content"], f"END{uuid4().hex}"
        shown = content.lstrip()
        marked = [*before, {**last, "content": shown + mark}]
        rendered = self._apply(marked, tools, add_generation_prompt=False)
        prompt, found, _ = rendered.rpartition(mark)
        if not (found and prompt.endswith(shown)):
            raise TemplateError(
                "the template alters the last message, so the assistant cannot continue it"
            )
        return prompt[: len(prompt) - len(shown)] + content

    def _apply(
        self,
        messages: Seq[dict[str, Any]],
        tools: Seq[dict[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        try:
            rendered = self._hf.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            raise TemplateError(_detail(error)) from error
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
