"""No sampling parameter is lost on its way from the body of a request to the engine."""

from dataclasses import fields
from typing import Any

import pytest
from pydantic import BaseModel

from api.generation.grammar import GrammarValidator
from api.generation.request import GenerateParameters, GenerateRequest
from api.generation.validation import Validator
from api.openai.chat_translation import chat_of, check_chat
from api.openai.requests import ChatRequest, Message, Tool
from api.settings.config import read_settings
from engine.core.request import SamplingParams
from tests.api.client import client
from tests.api.scripted import ScriptedEngine, WordTokenizer

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


def generate(**parameters: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"inputs": "x", "parameters": parameters}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "x"} | fields


FROM_WIRE: dict[str, tuple[tuple[str, dict[str, Any]], object]] = {
    "do_sample": (generate(do_sample=True), True),
    "temperature": (generate(temperature=0.5), 0.5),
    "top_k": (generate(top_k=7), 7),
    "top_p": (generate(top_p=0.5), 0.5),
    "typical_p": (generate(typical_p=0.5), 0.5),
    "repetition_penalty": (generate(repetition_penalty=1.5), 1.5),
    "frequency_penalty": (generate(frequency_penalty=0.5), 0.5),
    "presence_penalty": (("/v1/chat/completions", CHAT | {"presence_penalty": 0.5}), 0.5),
    "output_frequency_penalty": (complete(frequency_penalty=0.5), 0.5),
    "logit_bias": (complete(logit_bias={"7": 1.5, "8": -1}), ((7, 1.5), (8, -1.0))),
    "seed": (generate(seed=3), 3),
    "logprobs": (generate(details=True), True),
    "top_n_tokens": (generate(details=True, top_n_tokens=2), 2),
    "raw_logprobs": (complete(), True),
    "watermark": (generate(watermark=True), True),
}
"""Each field of `SamplingParams`: a request that sets it, and the value that it then has."""

NOT_VALIDATED = {
    "details": "the response reads it",
    "return_full_text": "the response reads it",
    "adapter_id": "accepted and ignored, as TGI without adapters does",
}
"""The fields of `GenerateParameters` that the validation does not read, and why."""

NOT_IN_PROMPT = {
    "model": "the response reads it",
    "parallel_tool_calls": "an answer has at most one call, which either value permits",
    "stream": "the route reads it",
}
"""The fields of `ChatRequest` that its translation does not read, and why."""


class Recorder:
    """Records the `names` of the attributes of models that are read."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def record(self, model: type[BaseModel]) -> Any:
        """Return a subclass of `model` whose instances are recorded."""
        names = self.names

        class Recorded(model):  # type: ignore[valid-type, misc]
            def __getattribute__(self, name: str) -> Any:
                names.add(name)
                return super().__getattribute__(name)

        return Recorded


def test_every_sampling_parameter_has_a_request_that_sets_it() -> None:
    assert set(FROM_WIRE) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("name", FROM_WIRE)
async def test_a_sampling_parameter_of_a_request_reaches_the_engine(name: str) -> None:
    (path, body), value = FROM_WIRE[name]
    engine = ScriptedEngine()
    async with client(engine) as http:
        assert (await http.post(path, json=body)).status_code == 200
    assert getattr(engine.requests[0].sampling, name) == value
    assert getattr(SamplingParams(), name) != value


async def test_the_validation_reads_every_parameter_of_a_request() -> None:
    recorder = Recorder()
    parameters = recorder.record(GenerateParameters)()
    validator = Validator(
        WordTokenizer(), GrammarValidator(None), read_settings([]).limits(2048), 100, num_workers=1
    )
    recorder.names.clear()
    await validator.validate(GenerateRequest(inputs="x", parameters=parameters), logprobs=True)
    validator.close()
    unread = set(GenerateParameters.model_fields) - recorder.names
    assert unread == set(NOT_VALIDATED)


def test_the_translation_of_a_chat_reads_every_field_of_it() -> None:
    recorder = Recorder()
    tool = Tool.model_validate({"function": {"name": "clock"}})
    message = Message(role="user", content="x")
    chat = recorder.record(ChatRequest)(messages=[message], tools=[tool])
    recorder.names.clear()
    check_chat(chat, 128)
    chat_of(chat)
    unread = set(ChatRequest.model_fields) - recorder.names
    assert unread == set(NOT_IN_PROMPT)
