"""The generation of the answers to a chat, as events that any dialect can encode."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from api.chat.call import CallReader, new_call_id
from api.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ChatEvent,
    Ended,
    EndReason,
    Started,
    TextDelta,
)
from api.chat.prompt import ChatPrompt, prepare_in_words
from api.chat.request import Chat
from api.generation.inference import Run
from api.generation.state import AppState
from api.telemetry.observation import Caller
from engine.core.request import Delivery, Finished, FinishReason, TokenOutput
from engine.core.stop_text import StopText

Events = AsyncGenerator[list[ChatEvent], None]


class ChatGeneration:
    """Generates the answers to one chat.

    If the model chooses none of the tools, it is asked again without them, and only the second
    answer is shown. `prompt` and `run` are those of the last time it was asked.
    """

    run: Run

    def __init__(self, state: AppState, chat: Chat, prompt: ChatPrompt, caller: Caller) -> None:
        self.prompt = prompt
        self._state = state
        self._chat = chat
        self._caller = caller

    async def events(self) -> Events:
        """Yield the events, those that are pending together in one list.

        The first list comes as soon as the request is admitted. It and others may be empty. Raises
        `REQUEST_ERRORS`, before the first list if the request is refused.
        """
        in_words: list[int] = []
        async with aclosing(self._ask(list(range(self._chat.n)), in_words)) as asked:
            async for events in asked:
                yield events
        if in_words:
            self.prompt = await prepare_in_words(self._state.engine.tokenizer, self._chat)
            async with aclosing(self._ask(in_words, [])) as asked:
                async for events in asked:
                    yield events

    async def _ask(self, choices: list[int], in_words: list[int]) -> Events:
        """Generate the answers numbered `choices`. The numbers of those that turn out to be no
        call are added to `in_words`; they have no events.
        """
        prompt = self.prompt
        async with self._state.inference.begin(
            prompt.request,
            self._caller,
            prompt.extras,
            logprobs=self._chat.logprobs,
            n=len(choices),
        ) as self.run:
            num_prompt_tokens = len(self.run.request.prompt_ids)
            stop = self.run.request.stopping.stop
            answers: list[_Answer] = [
                _Call(choice, num_prompt_tokens, stop, prompt.in_words)
                if prompt.is_call
                else _Text(choice, num_prompt_tokens, stop)
                for choice in choices
            ]
            yield [event for answer in answers for event in answer.start()]
            async with aclosing(self.run.deliveries()) as deliveries:
                async for index, delivery in deliveries:
                    yield answers[index].read(delivery)
            in_words += [answer.choice for answer in answers if answer.is_in_words]


class _Answer:
    """One answer. Its text ends before the first stop string."""

    def __init__(self, choice: int, num_prompt_tokens: int, stop: Sequence[str]) -> None:
        self.choice = choice
        self._started = Started(choice, num_prompt_tokens)
        self._stop = StopText(stop)

    @property
    def is_in_words(self) -> bool:
        """Whether the answer turned out to be the wish to answer in words."""
        return False

    def start(self) -> list[ChatEvent]:
        """Return the events before the first delivery."""
        return [self._started]

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        """Return the events of a delivery."""
        raise NotImplementedError

    def _texts(self, delivery: Delivery) -> Iterator[tuple[TokenOutput, str]]:
        """Yield each token with the text that can be shown after it."""
        outputs, end = delivery
        for output in outputs:
            text = self._stop.push(output.token.text, output.token.special)
            if end is not None and output is outputs[-1]:
                text += self._stop.flush()
            yield output, text


class _Text(_Answer):
    """An answer in words."""

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        events: list[ChatEvent] = [
            TextDelta(self.choice, text, (output,)) for output, text in self._texts(delivery)
        ]
        if isinstance(delivery.end, Finished):
            events.append(Ended(self.choice, _end_reason(delivery.end), delivery.end))
        return events


class _Call(_Answer):
    """An answer that is the call of a tool. It has no events if that is the tool `in_words`."""

    def __init__(
        self, choice: int, num_prompt_tokens: int, stop: Sequence[str], in_words: str | None
    ) -> None:
        super().__init__(choice, num_prompt_tokens, stop)
        self._in_words = in_words
        self._call = CallReader()
        self._unnamed: list[TokenOutput] = []

    @property
    def is_in_words(self) -> bool:
        return self._call.name is not None and self._call.name == self._in_words

    def start(self) -> list[ChatEvent]:
        """Return nothing while the answer may turn out to be in words."""
        return [] if self._in_words is not None else [self._started]

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        events = [event for piece in self._texts(delivery) for event in self._piece(*piece)]
        end = delivery.end
        if not isinstance(end, Finished) or self.is_in_words:
            return events
        if self._call.name is None:
            events += self._nameless()
        reason = "tool_calls" if self._call.is_complete else _end_reason(end)
        return [*events, Ended(self.choice, reason, end)]

    def _piece(self, output: TokenOutput, text: str) -> Iterator[ChatEvent]:
        was_named = self._call.name is not None
        arguments = self._call.read(text)
        if self._call.name is None:
            self._unnamed.append(output)
        elif self.is_in_words:
            return
        elif was_named:
            yield ArgumentsDelta(self.choice, arguments, (output,))
        else:
            yield from self._named(self._call.name, arguments, output)

    def _named(self, name: str, arguments: str, output: TokenOutput) -> Iterator[ChatEvent]:
        if self._in_words is not None:
            yield self._started
        yield CallStarted(self.choice, new_call_id(), name, (*self._unnamed, output))
        if arguments:
            yield ArgumentsDelta(self.choice, arguments, ())

    def _nameless(self) -> list[ChatEvent]:
        """Return the events of a call that was cut before it had a name: an empty text."""
        start: list[ChatEvent] = [] if self._in_words is None else [self._started]
        return [*start, TextDelta(self.choice, "", tuple(self._unnamed))]


def _end_reason(end: Finished) -> EndReason:
    """Return the reason of a text: `stop` if the last allowed token completed a stop string."""
    is_cut = end.reason is FinishReason.LENGTH and end.stop is None
    return "length" if is_cut else "stop"
