"""The generation of the answers to a chat, as events that any dialect can encode."""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing

from api.chat.answer_readers import AnswerReader, CallAnswer, TextAnswer
from api.chat.events import ChatEvent, Started
from api.chat.prompt import ChatPrompt, prepare_in_words
from api.chat.request import Chat
from api.generation.inference import Run
from api.generation.state import AppState
from api.telemetry.observation import Caller

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
        choices = list(range(self._chat.n))
        while choices:
            async with self._begin(len(choices)) as self.run:
                answers = [self._answer(choice) for choice in choices]
                yield [event for answer in answers for event in answer.start()]
                async with aclosing(self.run.deliveries()) as deliveries:
                    async for pending in deliveries:
                        yield [
                            event
                            for number, delivery in pending
                            for event in answers[number].read(delivery)
                        ]
            choices = [answer.choice for answer in answers if answer.is_in_words]
            if choices:
                self.prompt = await prepare_in_words(self._state.engine.tokenizer, self._chat)

    def _begin(self, n: int) -> AbstractAsyncContextManager[Run]:
        prompt = self.prompt
        return self._state.inference.begin(
            prompt.request, self._caller, prompt.extras, logprobs=self._chat.logprobs, n=n
        )

    def _answer(self, choice: int) -> AnswerReader:
        request = self.run.request
        started = Started(choice, len(request.prompt_ids))
        if self.prompt.is_call:
            return CallAnswer(started, self.prompt.in_words)
        return TextAnswer(started, request.stopping.stop)
