"""Messages become a prompt, by the chat template that came with the model.

transformers renders it, in its sandbox: the template is a stranger's program. What goes in
and how errors are told is Text Generation Inference's.
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
    """Safe from several threads at once. Without a template, `render` raises."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._hf = tokenizer
        template = tokenizer.chat_template
        self._source = template.get("default") if isinstance(template, dict) else template

    @cached_property
    def uses_tools(self) -> bool:
        """Whether the template tells the model of tools itself. A broken one does not."""
        source = _TRAINING_TAG.sub("", self._source or "")
        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except jinja2.TemplateSyntaxError:
            return False
        names = tree.find_all(nodes.Name)
        return any(name.name == "tools" and name.ctx == "load" for name in names)

    def render(
        self, messages: Seq[dict[str, str]], tools: Seq[dict[str, Any]] | None = None
    ) -> str:
        """The prompt for the next message; a last one of the assistant is continued instead.

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

    def _continued(self, messages: Seq[dict[str, str]], tools: Seq[dict[str, Any]] | None) -> str:
        """Cut behind the last message and trimmed, as Text Generation Inference does.

        Where it looks for the message's last occurrence, which may be anywhere if it is
        short, transformers marks its end. A template that hides the message gets its turn.
        """
        try:
            return self._apply(messages, tools, continued=True).rstrip()
        except ValueError:
            return self._apply(messages, tools, continued=False)

    def _apply(
        self, messages: Seq[dict[str, str]], tools: Seq[dict[str, Any]] | None, continued: bool
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
    """In minijinja's words, which has a template's own `raise_exception` as a syntax error."""
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
