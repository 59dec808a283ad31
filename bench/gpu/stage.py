"""The model that is on the device, and the engine or steps made from it: one of each at a time.

Everything is made when a section first needs it, and freed when something else needs the memory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedModel

from bench.gpu import models, workloads
from bench.gpu.bounds import ModelCost
from bench.gpu.run import Run
from bench.gpu.scales import Points
from bench.gpu.steps import Steps
from engine.core.config import EngineConfig
from engine.engine import Engine, measure_limits
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits
from engine.step.graphs import CudaCapture

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, ready for the engine, and the cost of its steps."""

    name: str
    loaded: LoadedModel
    limits: Limits
    cost: ModelCost
    points: Points

    @property
    def labels(self) -> dict[str, str]:
        return {"model": self.name, "dtype": self.loaded.info.dtype}

    @property
    def vocab_size(self) -> int:
        return int(self.loaded.model.config.vocab_size)


class Stage:
    """Owns the model on the device, and the engine or the steps that run it."""

    def __init__(self, run: Run):
        self._run = run
        self._model: tuple[str, Subject | PreTrainedModel] | None = None
        self._runner: Steps | Engine | None = None
        self._failed: dict[str, str] = {}

    def clear(self) -> None:
        """Free everything."""
        self.clear_cache()
        self._model = None
        self._run.release()

    def clear_cache(self) -> None:
        """Free everything except the model."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None
        match self._model:
            case (_, Subject(loaded=loaded)):
                for call in loaded.calls:
                    call.module.paged_attention = None  # type: ignore[assignment]
        self._run.release()

    def subject(self, name: str) -> Subject:
        match self._model:
            case (str(on_stage), Subject() as subject) if on_stage == name:
                return subject
        self.clear()
        subject = self._once(f"{name}: load", lambda: load(self._run, name))
        self._model = name, subject
        return subject

    def peer(self, name: str) -> PreTrainedModel:
        """Return a plain transformers model, in which nothing is replaced."""
        match self._model:
            case (str(on_stage), PreTrainedModel() as model) if on_stage == name:
                return model
        self.clear()
        build = lambda: models.build(name, self._run.device, self._run.dtype)  # noqa: E731
        model = self._once(f"{name}: build", build)
        self._model = name, model
        return model

    def steps(self, name: str) -> Steps:
        subject = self.subject(name)
        if not isinstance(self._runner, Steps):
            self.clear_cache()
            capture = CudaCapture() if self._run.on_cuda else None
            self._runner = Steps(subject.loaded, subject.limits, capture)
        return self._runner

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Yield the engine of the first model, with every graph captured.

        An exception frees the engine.
        """
        subject = self.subject(self._run.scale.model)
        if not isinstance(self._runner, Engine):
            self.clear_cache()
            self._runner = self._once("engine", lambda: warm_engine(self._run, subject))
        try:
            yield self._runner
        except Exception:
            self.clear_cache()
            raise

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """Make something; if that failed before, raise at once instead of trying again."""
        if name in self._failed:
            raise RuntimeError(f"{name} failed before: {self._failed[name]}")
        try:
            return make()
        except Exception as error:
            self._failed[name] = repr(error)[:200]
            raise


def load(run: Run, name: str) -> Subject:
    started = time.perf_counter()
    loaded = models.load(name, run.device, run.dtype)
    load_s = time.perf_counter() - started
    scale, is_first = run.scale, name == run.scale.model
    points = scale.points if is_first else scale.other_points
    longest = scale.longest if is_first else points.longest + scale.count + 16
    config = EngineConfig(
        max_sequences=max(points.batches), max_total_tokens=min(longest, loaded.max_positions)
    )
    limits = measure_limits(loaded, config)
    cost = ModelCost.of(loaded, limits.cache_dtype.itemsize)
    row = {
        "model": name,
        "load_s": load_s,
        "size_s": time.perf_counter() - started - load_s,
        "weight_gb": cost.weight_bytes / 1e9,
        "limits": limits.reasons,
    }
    others = [other for other in run.figures["models"] if other["model"] != name]
    run.figures["models"] = [*others, row]
    return Subject(name, loaded, limits, cost, points)


def warm_engine(run: Run, subject: Subject) -> Engine:
    limits = subject.limits
    config = EngineConfig(limits.max_sequences, max_total_tokens=limits.max_total_tokens)
    engine = Engine(subject.loaded, config, limits)
    engine.warm_up()
    scale = run.scale
    measured: list[Any] = [*scale.offline, scale.http, scale.peer]
    for sampling in {workload.sampling for workload in measured}:
        workloads.warm(engine, sampling, subject.vocab_size)
    return engine
