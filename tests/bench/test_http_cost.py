"""The measurement of the HTTP side: every stream gets its tokens from the paced source."""

import pytest

from bench.http_cost import PacedSource, measure
from engine.core.request import Finished, Request, SamplingParams, StoppingParams


@pytest.mark.slow
@pytest.mark.parametrize("api", ["tgi", "chat"])
def test_all_tokens_are_served_and_their_cost_is_reported(api: str) -> None:
    cost = measure(api, streams=3, rate=100, seconds=0.1)
    assert cost.tokens == 30
    assert cost.us_per_token > 0
    assert cost.slowdown >= 1


def test_the_source_gives_every_request_its_tokens_and_an_end() -> None:
    source = PacedSource(rate=1000)
    for name in "ab":
        source.add(Request(name, [1], SamplingParams(), StoppingParams(3)))
    launches, events = 0, []

    def launched() -> None:
        nonlocal launches
        launches += 1

    while source.has_work:
        events += source.step(launched)
    assert [name for name, event in events if isinstance(event, Finished)] == ["a", "b"]
    assert len(events) == 2 * 3 + 2
    assert launches == 4  # three steps, and a call that only collects the last one
