"""Random requests, forks, aborts, forced tokens and failures; the driver checks each step."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.core.config import BLOCK_SIZE
from engine.core.pipeline import MAX_IN_FLIGHT
from tests.engine.core.driver import Driver, prompt
from tests.thorough import THOROUGH


class SchedulerMachine(RuleBasedStateMachine):
    """Adds and aborts requests with common prefixes and forks, forces tokens, and launches,
    collects and loses steps.
    """

    @initialize(
        num_blocks=st.integers(4, 10) | st.integers(4, 24),
        max_sequences=st.integers(1, 6),
        extra_tokens=st.integers(0, 60),
        prefix_caching=st.sampled_from([True, True, True, False]),
        can_end=st.booleans(),
        token_s=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    )
    def start(
        self,
        num_blocks: int,
        max_sequences: int,
        extra_tokens: int,
        prefix_caching: bool,
        can_end: bool,
        token_s: float,
    ) -> None:
        budget = max_sequences + extra_tokens
        self.driver = Driver(num_blocks, max_sequences, budget, prefix_caching, can_end, token_s)

    @rule(
        stem=st.integers(0, 5),
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
        changed=st.none() | st.integers(0, 70),
        max_new_tokens=st.integers(1, 40),
        salt=st.sampled_from([b"", b"", b"", b"other"]),
        num_forks=st.just(0) | st.integers(1, 4),
        prompt_logprobs=st.sampled_from([False, False, True]),
        guided=st.booleans(),
    )
    def add(
        self,
        stem: int,
        lengths: list[int],
        changed: int | None,
        max_new_tokens: int,
        salt: bytes,
        num_forks: int,
        prompt_logprobs: bool,
        guided: bool,
    ) -> None:
        """Add prefixes of a stem or of a finished text, perhaps with one token changed."""
        driver, room = self.driver, self.driver.num_blocks * BLOCK_SIZE
        stems = [prompt(70), prompt(70, 1), *(seq.token_ids for seq in driver.finished[-4:])]
        for length in lengths:
            tokens = stems[stem % len(stems)][: min(length, room - 1)]
            if changed is not None and changed < len(tokens):
                tokens[changed] = 3
            num_tokens = min(max_new_tokens, room - len(tokens))
            driver.add(tokens, num_tokens, salt, num_forks, prompt_logprobs, guided)

    @rule(num_steps=st.integers(1, 20))
    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @precondition(lambda self: not self.driver.pipeline.is_isolating)
    @precondition(lambda self: not self.driver.device.has_failed)
    @precondition(lambda self: len(self.driver.in_flight) < MAX_IN_FLIGHT)
    @rule()
    def launch(self) -> None:
        self.driver.launch()

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def collect(self) -> None:
        self.driver.collect()

    @precondition(lambda self: self.driver.live)
    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        self.driver.abort(self.driver.live[index % len(self.driver.live)])

    @precondition(lambda self: any(seq.constraint for seq in self.driver.live))
    @rule(index=st.integers(0, 30), num_tokens=st.integers(2, 30))
    def force(self, index: int, num_tokens: int) -> None:
        guided = [seq for seq in self.driver.live if seq.constraint is not None]
        self.driver.force(guided[index % len(guided)], num_tokens)

    @precondition(lambda self: self.driver.in_flight)
    @rule(isolate=st.booleans())
    def lose_a_step(self, isolate: bool) -> None:
        self.driver.lose(isolate)

    @rule()
    def fail_a_launch(self) -> None:
        """Let the next launch fail before the device sees it, if there is anything to launch."""
        self.driver.device.fails_next = True
        self.driver.step()
        self.driver.device.fails_next = False

    def teardown(self) -> None:
        """Run every sequence that is left to its end."""
        if hasattr(self, "driver"):
            self.driver.drain()


class ThoroughSchedulerMachine(SchedulerMachine):
    pass


TestRandomSchedules = SchedulerMachine.TestCase
TestRandomSchedules.settings = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)

TestManyRandomSchedules = pytest.mark.slow(pytest.mark.thorough(ThoroughSchedulerMachine.TestCase))
TestManyRandomSchedules.settings = settings(
    max_examples=600 * THOROUGH,
    stateful_step_count=60,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
