"""TGI's JSON of a finished request, and TGI's event of each streamed token."""

from api.generation.contract import f32
from api.generation.inference import Answer, CompletionOutput
from api.generation.request import GenerateRequest
from api.http import sse
from api.http.errors import wire_error
from api.tgi.schemas import (
    BestOfSequence,
    Details,
    GenerateResponse,
    PrefillTokenJson,
    StreamDetails,
    StreamResponse,
    TokenJson,
)
from engine.core.request import Finished, Token, TokenOutput


def wants_details(body: GenerateRequest) -> bool:
    return body.parameters.details or body.parameters.decoder_input_details


def generate_response(body: GenerateRequest, answer: Answer) -> GenerateResponse:
    """Return the best completion as the answer, with the others as its `best_of_sequences`."""
    response: GenerateResponse = {"generated_text": _full_text(body, answer.best.end)}
    if wants_details(body):
        response["details"] = _details(body, answer)
    return response


class GenerateFrameWriter:
    """Writes the frames of a stream: one for each token, numbered from 1."""

    def __init__(self, body: GenerateRequest) -> None:
        self._body = body
        self._index = 0

    def token(self, output: TokenOutput) -> bytes:
        self._index += 1
        return sse.event(_stream_response(self._index, output))

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        self._index += 1
        details = _stream_details(end) if self._body.parameters.details else None
        text = _full_text(self._body, end)
        return sse.event(_stream_response(self._index, output, text, details))

    def error(self, problem: Exception) -> bytes:
        return sse.event(wire_error(problem).json())


def _stream_response(
    index: int, output: TokenOutput, text: str | None = None, details: StreamDetails | None = None
) -> StreamResponse:
    """Return the event of one token. Only the last one has a `text` and may have `details`."""
    token = _token_json(output.token)
    if not output.top_tokens:
        return {"index": index, "token": token, "generated_text": text, "details": details}
    return {
        "index": index,
        "token": token,
        "top_tokens": [_token_json(top) for top in output.top_tokens],
        "generated_text": text,
        "details": details,
    }


def _full_text(body: GenerateRequest, end: Finished) -> str:
    prompt = body.inputs if body.parameters.return_full_text else ""
    return prompt + end.generated_text


def _details(body: GenerateRequest, answer: Answer) -> Details:
    best, *others = answer.completions
    prefill = [_prefill_token(token) for token in answer.prompt]
    details: Details = {
        "finish_reason": best.end.reason,
        "generated_tokens": best.end.num_generated_tokens,
        "seed": best.end.seed,
        "prefill": prefill,
        "tokens": _tokens(best),
    }
    if others:
        details["best_of_sequences"] = [_best_of_sequence(body, other, prefill) for other in others]
    if body.parameters.top_n_tokens:
        details["top_tokens"] = _top_tokens(best)
    return details


def _best_of_sequence(
    body: GenerateRequest, other: CompletionOutput, prefill: list[PrefillTokenJson]
) -> BestOfSequence:
    sequence: BestOfSequence = {
        "generated_text": _full_text(body, other.end),
        "finish_reason": other.end.reason,
        "generated_tokens": other.end.num_generated_tokens,
        "seed": other.end.seed,
        "prefill": prefill,
        "tokens": _tokens(other),
    }
    if body.parameters.top_n_tokens:
        sequence["top_tokens"] = _top_tokens(other)
    return sequence


def _stream_details(end: Finished) -> StreamDetails:
    return {
        "finish_reason": end.reason,
        "generated_tokens": end.num_generated_tokens,
        "seed": end.seed,
        "input_length": end.num_prompt_tokens,
    }


def _tokens(completion: CompletionOutput) -> list[TokenJson]:
    return [_token_json(output.token) for output in completion.tokens]


def _top_tokens(completion: CompletionOutput) -> list[list[TokenJson]]:
    return [[_token_json(token) for token in output.top_tokens] for output in completion.tokens]


def _prefill_token(token: Token) -> PrefillTokenJson:
    return {"id": token.id, "text": token.text, "logprob": f32(token.logprob)}


def _token_json(token: Token) -> TokenJson:
    id, text, logprob, special = token
    return {"id": id, "text": text, "logprob": f32(logprob), "special": special}
