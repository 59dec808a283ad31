"""An error of launched work is known until its step is looked at. It keeps no memory meanwhile."""

import traceback
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.device.stream import CpuStream, CudaStream, Stream, run_in_temporary_thread
from tests.engine.fake_device import FakeEvent, without_collection

Made = list["weakref.ref[Tensor]"]


def fail(made: Made) -> None:
    activation = torch.zeros(4)
    made.append(weakref.ref(activation))
    raise ValueError("no more")


def fail_while_handling(made: Made) -> None:
    activation = torch.zeros(4)
    made.append(weakref.ref(activation))
    try:
        fail(made)
    except ValueError:
        raise TypeError("nor this") from None


def fail_because_of(made: Made) -> None:
    try:
        fail(made)
    except ValueError as error:
        raise TypeError("nor that") from error


FAILURES = [fail, fail_while_handling, fail_because_of]


@pytest.fixture(params=[CpuStream, CudaStream])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    made: Stream = request.param()
    return made


@pytest.mark.parametrize("work", FAILURES)
def test_a_failure_frees_its_tensors_before_its_result_is_asked_for(
    stream: Stream, work: Callable[[Made], None]
) -> None:
    made: Made = []
    with without_collection():
        failed = stream.launch(lambda: work(made))
        assert stream.launch(lambda: 3).result() == 3
        assert [ref() for ref in made] == [None] * len(made) != []
        with pytest.raises((ValueError, TypeError)) as raised:
            failed.result()
    assert "fail" in "".join(traceback.format_exception(raised.value))


def test_a_failure_can_be_waited_for_without_raising_it(stream: Stream) -> None:
    error = stream.launch(lambda: fail([])).exception()
    assert str(error) == "no more"
    assert stream.launch(lambda: 3).exception() is None


def test_waiting_on_a_lost_device_returns_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(FakeEvent):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "Event", Lost)
    assert "illegal memory access" in str(CudaStream().launch(lambda: 3).exception())


@pytest.mark.parametrize("work", FAILURES)
def test_a_failure_in_a_temporary_thread_is_freed_once_it_is_handled(
    work: Callable[[Made], None],
) -> None:
    made: Made = []
    with without_collection():
        try:
            run_in_temporary_thread(lambda: work(made))
        except (ValueError, TypeError) as error:
            raised = traceback.format_exception(error)
        assert [ref() for ref in made] == [None] * len(made) != []
    assert "fail" in "".join(raised)


def test_a_temporary_thread_returns_its_result() -> None:
    assert run_in_temporary_thread(lambda: 3) == 3
