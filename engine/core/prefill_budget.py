"""Limits how many prompt tokens a step computes beside decodes, by measured time.

A step makes all its sequences wait for its slowest part. The prompt tokens that fit into a given
time differ a hundredfold between devices and models, and fall as the prompt's context grows. So
the limit follows from how long the last steps took: beside decodes a step may take a few times as
long as they take alone, or a fixed time, whichever is longer.
"""

from collections import deque

_MAX_SLOWDOWN = 2.5
"""A step with prompt tokens may take this many times as long as one of decodes alone. Clients see
less than three times their usual gap, with room for what the estimate does not foresee.
"""
_NUM_MEASURED = 9
_REMEASURE_AFTER = 32
"""After so many steps with prompt tokens, one computes decodes alone, to measure them anew."""


class PrefillBudget:
    """Estimates the time of a decode step and of a prompt token, and derives the limit from them.

    Knows no clock: each step's duration is told to `observe`, so equal durations give equal limits.

    min_tokens  prompts get that many, however long they take: with fewer, most of the time would
                go into what a step costs at any size
    max_tokens  token budget of a step
    step_s      seconds that a step beside decodes may take, however short the decodes are
    step_multiple  the scheduler takes fewer prompt tokens, to make a step a multiple of this
    """

    def __init__(
        self, min_tokens: int, max_tokens: int, step_s: float = 0.0, step_multiple: int = 1
    ):
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._step_s = step_s
        self._step_multiple = step_multiple
        self._decode_times: deque[float] = deque(maxlen=_NUM_MEASURED)
        self._token_s = 0.0
        self._num_mixed = 0

    def limit(self) -> int:
        """Return the most prompt tokens of the next step, if decodes run in it.

        It is 0 for one step when the time of decodes has to be measured anew.
        """
        if not self._decode_times or not self._token_s:
            return self._max_tokens
        if self._num_mixed >= _REMEASURE_AFTER:
            self._num_mixed = 0
            return 0
        step_s = max(_MAX_SLOWDOWN * self._decode_s, self._step_s)
        fitting = (step_s - self._decode_s) / self._token_s
        return int(min(max(fitting, self._min_tokens), self._max_tokens))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds` on the device.

        A few prompt tokens take no time that could be told from the decodes' own.
        """
        if not num_prefill_tokens:
            self._decode_times.append(seconds)
            self._num_mixed = 0
            return
        self._num_mixed += num_decodes > 0
        if num_prefill_tokens <= self._min_tokens - self._step_multiple:
            return
        token_s = max(seconds - self._decode_s, 0.0) / num_prefill_tokens
        # At once if slower, so that no second step is too long. By halves if faster: one short
        # measurement is no reason for a long step.
        self._token_s = max(token_s, (self._token_s + token_s) / 2)

    @property
    def _decode_s(self) -> float:
        """The median, which one disturbed step does not change. 0 if none was measured."""
        times = self._decode_times
        return sorted(times)[len(times) // 2] if times else 0.0
