"""The errors that this worker currently has, for its reports."""

from collections.abc import Callable


class ActiveErrors:
    """At most one message per cause, until the cause is gone. (Vast's stock worker never clears
    an error.) `on_change` is called whenever `message` changes.
    """

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None

    def add(self, cause: str, message: str) -> None:
        if self._messages.get(cause) != message:
            self._messages[cause] = message
            self.on_change()

    def clear(self, cause: str) -> None:
        if self._messages.pop(cause, None) is not None:
            self.on_change()

    @property
    def message(self) -> str:
        """All current messages, or an empty string."""
        return "; ".join(self._messages.values())
