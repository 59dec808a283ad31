"""What the step pipeline reports of a step, and what it does when an output or the device fails."""

import pytest

from engine.core.errors import EngineDead
from engine.core.metrics import StepFigures
from engine.core.pipeline import SampledToken
from engine.core.sequence import Sequence
from tests.engine.core.device_model import Constraint
from tests.engine.core.driver import Driver, decode, prompt


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> dict[Sequence, str]:
    """The messages of failed sequences; without it, the driver expects only lost steps to fail."""
    messages: dict[Sequence, str] = {}

    def take_failure(driver: Driver, seq: Sequence, message: str) -> None:
        driver.live.remove(seq)
        messages[seq] = message

    monkeypatch.setattr(Driver, "take_failure", take_failure)
    return messages


def figures(driver: Driver) -> StepFigures:
    assert driver.pipeline.last_step is not None
    return driver.pipeline.last_step


class TestStepFigures:
    def test_the_first_step_is_launched_and_not_collected(self) -> None:
        driver = Driver()
        driver.add(prompt(20), 4)
        driver.step()
        assert driver.pipeline.last_step is None
        assert len(driver.in_flight) == 1
        driver.drain()

    def test_prefills_and_decodes_of_the_collected_step_are_counted(self) -> None:
        driver = Driver(max_sequences=4)
        driver.add(prompt(4), 8)
        decode(driver, 1)
        driver.add(prompt(20, stem=1), 8, num_forks=1)
        driver.add(prompt(9, stem=2), 8)
        driver.add(prompt(9, stem=3), 8)
        decode(driver, 1)
        step = figures(driver)
        assert (step.num_decodes, step.num_prefills, step.num_tokens) == (1, 2, 1 + 20 + 9)
        assert (step.num_admitted, step.num_running, step.num_waiting) == (3, 4, 1)
        assert not step.failed
        driver.drain()

    def test_a_preempted_sequence_is_not_counted_as_admitted_again(self) -> None:
        driver = Driver(num_blocks=3, prefix_caching=False)
        first, second = driver.add(prompt(20), 20), driver.add(prompt(14, stem=1), 8)
        decode(driver, 4)
        assert second.num_preemptions == 1
        started = second.first_scheduled_time
        driver.abort(first)
        decode(driver, 1)
        assert figures(driver).num_prefills == 1
        assert figures(driver).num_admitted == 0
        assert second.first_scheduled_time == started
        driver.drain()

    def test_a_step_that_was_lost_is_marked_as_failed(self) -> None:
        driver = Driver()
        driver.add(prompt(20), 4)
        driver.launch()
        driver.lose()
        assert figures(driver).failed
        assert figures(driver).num_running == 0


class TestPromptLogprobs:
    def test_each_sequence_gets_the_logprobs_of_its_own_prompt(self) -> None:
        """The driver compares them with the expected ones as they arrive."""
        driver = Driver()
        plain = driver.add(prompt(7, stem=1), 2)
        first, second = (driver.add(prompt(n, n), 2, prompt_logprobs=True) for n in (20, 10))
        decode(driver, 1)
        assert plain not in driver.prompt_tokens
        assert [len(driver.prompt_tokens[seq]) for seq in (first, second)] == [19, 9]
        driver.drain()

    def test_the_logprobs_of_a_sequence_aborted_in_flight_are_skipped(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(n, n), 2, prompt_logprobs=True) for n in (20, 10))
        driver.launch()
        driver.abort(first)
        driver.collect()
        assert set(driver.prompt_tokens) == {second}
        driver.drain()


class TestFailingOutputs:
    @pytest.mark.parametrize(
        ("error", "message"), [(ValueError("no text"), "no text"), (KeyError(), "KeyError()")]
    )
    def test_a_sequence_whose_output_raises_fails_alone(
        self,
        error: Exception,
        message: str,
        failures: dict[Sequence, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 4) for stem in range(2))
        take_token = driver.take_token

        def take_token_or_raise(seq: Sequence, token: SampledToken) -> bool:
            if seq is first:
                raise error
            return take_token(seq, token)

        monkeypatch.setattr(driver, "take_token", take_token_or_raise)
        driver.launch()
        driver.launch()
        driver.collect()
        assert failures == {first: message}
        assert driver.scheduler.running == [second]
        assert second.num_generated == 1
        driver.drain()
        assert driver.finished == [second]

    def test_a_sequence_whose_grammar_fails_fails_without_the_token(
        self, failures: dict[Sequence, str]
    ) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 4, guided=True) for stem in range(2))
        assert isinstance(first.constraint, Constraint)
        first.constraint.error = "the grammar is too complex"
        decode(driver, 1)
        assert failures == {first: "the grammar is too complex"}
        assert first.num_generated == 0
        driver.drain()
        assert driver.finished == [second]


class TestLostDevice:
    def test_every_sequence_is_rewound_when_the_device_is_dead(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No sequence fails: whoever catches the error ends them all with one message."""

        def die(error: Exception) -> None:
            raise EngineDead("the device is lost") from error

        driver = Driver(max_batch_tokens=32)
        decoding = driver.add(prompt(20), 8)
        decode(driver, 2)
        prefilling = driver.add(prompt(60, stem=1), 8)
        driver.launch()
        driver.launch()
        monkeypatch.setattr(driver.device, "recover", die)
        driver.device.lose()
        with pytest.raises(EngineDead, match="the device is lost"):
            driver.pipeline.collect()
        assert not driver.in_flight
        assert driver.live == driver.scheduler.running == [decoding, prefilling]
        assert [seq.num_in_flight for seq in driver.live] == [0, 0]
        assert [seq.num_computed for seq in driver.live] == [21, 0]
        assert not driver.pipeline.is_isolating
        driver.check()
        for seq in tuple(driver.live):
            driver.abort(seq)
