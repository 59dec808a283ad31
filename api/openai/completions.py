"""The answer to a completion of one or several prompts, each a generation of its own."""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.generation.headers import caller_of, stream_headers, summed_headers
from api.generation.inference import Answer, CompletionOutput
from api.generation.state import AppState, state_of
from api.http import sse
from api.http.disconnect import all_together, until_disconnect
from api.http.responses import json_response
from api.openai.completion_choice import LogprobsWriter, joined
from api.openai.completion_prompt import CompletionPrompt, prepare_prompts
from api.openai.completion_stream import completion_frames, whole_frames
from api.openai.payloads import completion_head, finish_reason, usage
from api.openai.requests import CompletionRequest
from api.openai.responses import Completion, CompletionChoice, CompletionLogprobs
from api.telemetry.observation import Caller


async def answer_completion(http: HttpRequest, body: CompletionRequest) -> Response:
    """Answer a completion that came by any route. A stream begins once all prompts are admitted.

    Raises `REQUEST_ERRORS`.
    """
    state = state_of(http)
    state.observer.arrived()
    prompts = await prepare_prompts(body, state.settings, state.engine.tokenizer)
    requests = [prompt.request for prompt in prompts]
    caller = caller_of(http, "completions")
    if body.stream and not _comes_whole(body):
        frames = completion_frames(state, body, prompts, caller)
        await until_disconnect(http.receive, sse.begun(frames))
        return sse.EventStream(frames, stream_headers(state, *requests))
    answers = await until_disconnect(http.receive, _answers(state, body, prompts, caller))
    completion = await asyncio.to_thread(_completion, state, body, prompts, answers)
    if body.stream:
        return sse.EventStream(whole_frames(body, completion), stream_headers(state, *requests))
    return json_response(completion, summed_headers(state, requests, answers))


def _comes_whole(body: CompletionRequest) -> bool:
    """Tell whether a stream has nothing to show before its end, because the logprobs of the prompt
    are known then or no token is wanted.
    """
    return body.token_limit == 0 or bool(body.echo and body.logprobs is not None)


async def _answers(
    state: AppState, body: CompletionRequest, prompts: list[CompletionPrompt], caller: Caller
) -> list[Answer]:
    """Return the answers in the order of the prompts. TGI has them in the order of their ends."""
    n = body.n or 1
    count = body.best_of or n
    return await all_together(
        state.inference.complete(
            prompt.request,
            caller,
            prompt.extras,
            logprobs=body.logprobs is not None or count > n,
            n=count,
        )
        for prompt in prompts
    )


def _completion(
    state: AppState,
    body: CompletionRequest,
    prompts: list[CompletionPrompt],
    answers: list[Answer],
) -> Completion:
    choices = [
        _choice(body, prompt, answer, completion)
        for prompt, answer in zip(prompts, answers, strict=True)
        for completion in _best(answer.completions, body.n or 1)
    ]
    for index, choice in enumerate(choices):
        choice["index"] = index
    num_generated = sum(answer.timings.num_generated_tokens for answer in answers)
    return {
        **completion_head(state),
        "choices": choices,
        "usage": usage(
            sum(len(answer.request.prompt_ids) for answer in answers),
            0 if body.token_limit == 0 else num_generated,
        ),
    }


def _best(completions: list[CompletionOutput], n: int) -> list[CompletionOutput]:
    """Return the `n` with the highest mean logprob, best first; all of them in their order if there
    are not more.
    """
    if len(completions) == n:
        return completions
    return sorted(completions, key=lambda completion: -completion.mean_logprob)[:n]


def _choice(
    body: CompletionRequest, prompt: CompletionPrompt, answer: Answer, completion: CompletionOutput
) -> CompletionChoice:
    text = "" if body.token_limit == 0 else completion.end.text_before_stop
    return {
        "index": 0,
        "text": prompt.echo + text,
        "logprobs": _logprobs(body, prompt, answer, completion),
        "finish_reason": finish_reason(completion.end),
    }


def _logprobs(
    body: CompletionRequest, prompt: CompletionPrompt, answer: Answer, completion: CompletionOutput
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    writer = LogprobsWriter(body.logprobs, prompt.echo)
    first = answer.completions[0].end  # it has the prompt
    outputs = [] if body.token_limit == 0 else completion.tokens
    return joined([writer.prompt(first), writer.generated(outputs)])
