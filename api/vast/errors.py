"""What is wrong with this worker, for its reports: one message for each thing that can be."""

from collections.abc import Callable


class Errors:
    """Errors end when their cause does: the platform's own worker never takes one back.

    `on_change` is called when what is to be reported has changed.
    """

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None

    def raised(self, cause: str, message: str) -> None:
        if self._messages.get(cause) != message:
            self._messages[cause] = message
            self.on_change()

    def cleared(self, cause: str) -> None:
        if self._messages.pop(cause, None) is not None:
            self.on_change()

    @property
    def message(self) -> str:
        return "; ".join(self._messages.values())
