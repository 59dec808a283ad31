"""Steps of no sequence which together launch every kernel that sampling can need.

All of them are run before the server is ready, so that no request ever waits for a compiler. What
a kernel is compiled for beside its kind is the type of the scores, which are float32 where
biases were added, and whether the first row of logits is at a multiple of 16 bytes, which in
some vocabularies the rows of prompt tokens are not.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from engine.device.packed_arrays import PackedArrays
from engine.sampling.sampler import SamplingKind
from engine.step.builder import HostStep, StepBuilder

_ROWS = 2
_BIASES: dict[str, np.ndarray] = {
    "biased_rows": np.zeros(1, np.int64),
    "biased_ids": np.zeros(1, np.int64),
    "biases": np.zeros(1, np.float32),
}


class Rehearsal(NamedTuple):
    """A step of no sequence, and what grammars allow in it."""

    step: HostStep
    masks: PackedArrays | None = None


def rehearsals(
    builder: StepBuilder, kinds: tuple[SamplingKind, ...], vocab_size: int
) -> Iterator[Rehearsal]:
    """Yield every kind of sampling, with every change of the logits before it."""
    for kind in kinds:
        step = builder.rehearsal(_ROWS, kind)
        yield Rehearsal(step)
        yield Rehearsal(_with(step, **_BIASES))
    step = builder.rehearsal(_ROWS, kinds[0])
    rows, words = np.zeros(1, np.int64), -(-vocab_size // 32)
    masks = PackedArrays({"rows": rows, "masks": np.full((1, words), -1, np.int32)})
    yield Rehearsal(step, masks)
    yield Rehearsal(_with(step, **_BIASES), masks)
    yield Rehearsal(_with(step, watermarked=rows))
    for num_top in (0, 1):
        for first in range(_ROWS):
            prompt_ids = np.zeros(_ROWS - first, np.int64)
            prompted = replace(step, sampling=None, num_sampled=first, num_prompt_top=num_top)
            yield Rehearsal(_with(prompted, prompt_ids=prompt_ids))


def _with(step: HostStep, **extras: np.ndarray) -> HostStep:
    return replace(step, extras=PackedArrays(extras))
