"""What comes back from a step: all arrays of its sampled tokens in one copy."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.device.host_buffers import Staging
from engine.sampling.sampler import SampledTokens


@dataclass(frozen=True, slots=True)
class HostTokens:
    """Sampled tokens on the host, as the fields of `SampledTokens`. Nothing keeps them: they may
    be read once the launched work is done, and until the step's buffers are released.
    """

    ids: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Sampled tokens on the device, packed so that they reach the host in one copy.

    data          [bytes] uint8: the arrays of `SampledTokens`, those of ids first
    num_rows      rows of each array
    num_top       columns of the top tokens' arrays; 0 if there are none
    has_logprobs  whether there are logprobs of the sampled tokens
    """

    data: Tensor
    num_rows: int
    num_top: int
    has_logprobs: bool

    @classmethod
    def of(cls, sampled: SampledTokens) -> "PackedTokens":
        arrays = (sampled.ids, sampled.top_ids, sampled.logprobs, sampled.top_logprobs)
        parts = [a.reshape(-1).view(torch.uint8) for a in arrays if a is not None]
        return cls(
            data=parts[0] if len(parts) == 1 else torch.cat(parts),
            num_rows=len(sampled.ids),
            num_top=0 if sampled.top_ids is None else sampled.top_ids.shape[1],
            has_logprobs=sampled.logprobs is not None,
        )

    def to_host(self, rows: int, staging: Staging) -> HostTokens:
        """Start copying: the first `rows` are on the host once all launched work is done.

        A copy is needed because the next replay of a graph overwrites its result.
        """
        size = len(self.data)
        buffer = staging.take(size)
        buffer.tensor[:size].copy_(self.data, non_blocking=True)
        ids_end = self.num_rows * (1 + self.num_top) * 8
        ids = buffer.array[:ids_end].view(np.int64)
        logprobs = buffer.array[ids_end:size].view(np.float32)
        own, top_shape = self.num_rows, (self.num_rows, self.num_top)
        first = own if self.has_logprobs else 0
        return HostTokens(
            ids=ids[:rows],
            logprobs=logprobs[:rows] if self.has_logprobs else None,
            top_ids=ids[own:].reshape(top_shape)[:rows] if self.num_top else None,
            top_logprobs=logprobs[first:].reshape(top_shape)[:rows] if self.num_top else None,
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's result, on the host.

    sampled       None when nothing was sampled
    prompt        the prompt tokens whose logprobs were asked for; None when none were
    staging       the buffers that both are read from; None if they are in memory of their own
    has_captured  whether graphs were captured, so that the step's time is none of a usual one
    """

    sampled: HostTokens | None
    prompt: HostTokens | None
    staging: Staging | None = None
    has_captured: bool = False

    def release(self) -> None:
        """Let later steps use the buffers: the result must not be read any more."""
        if self.staging is not None:
            self.staging.release()
