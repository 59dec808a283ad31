"""The parts that a `chat.completion` and its chunks have in common: usage, logprobs."""

from collections.abc import Iterable, Sequence

from api.generation.contract import f32
from api.openai.payloads import usage
from api.openai.responses import Logprobs, TokenLogprob, TopLogprob, Usage
from engine.core.request import Finished, Token, TokenOutput


class ChatUsage:
    """Counts the tokens of all answers to a chat. Their prompt counts once."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    @classmethod
    def of(cls, ends: Iterable[Finished]) -> "ChatUsage":
        total = cls()
        for end in ends:
            total.start(end.num_prompt_tokens)
            total.num_generated_tokens += end.num_generated_tokens
        return total

    def start(self, num_prompt_tokens: int) -> None:
        """Count the prompt of one answer. An answer in words may have a shorter one than a call."""
        self.num_prompt_tokens = max(self.num_prompt_tokens, num_prompt_tokens)

    def json(self) -> Usage:
        return usage(self.num_prompt_tokens, self.num_generated_tokens)


def chat_logprobs(outputs: Sequence[TokenOutput]) -> Logprobs:
    return {"content": [_token_logprob(output) for output in outputs], "refusal": None}


def _token_logprob(output: TokenOutput) -> TokenLogprob:
    return {**_logprob(output.token), "top_logprobs": [_logprob(t) for t in output.top_tokens]}


def _logprob(token: Token) -> TopLogprob:
    return {
        "token": token.text,
        "logprob": f32(token.logprob),
        "bytes": list(token.text.encode()),
    }
