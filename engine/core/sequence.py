"""A request's life in the engine: its tokens known, tokens computed and blocks.

Only the scheduler and the pipeline change a sequence, in the engine thread. It holds no tensors.
Positions, as half-open ranges over one sequence:

    [0, num_completed)              KV is on the device: the step that wrote it is done
    [num_completed, num_computed)   KV is being written by steps still in flight
    [num_computed, num_tokens)      to be scheduled
    [len(token_ids), num_tokens)    sampled in flight: ids known to the device alone
"""

import time
from enum import Enum, auto

from engine.core.block_pool import BlockHash
from engine.core.request import ConstraintState, Request

NO_SLOT = -1
"""Slot of a sequence that is not running."""


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """The mutable state of one request.

    slot    index of its state on the device, `NO_SLOT` while it is not running
    forks   sequences of the same prompt, waiting for this one to compute it; they start from its
            blocks
    leader  for a fork, the sequence that computes the prompt, until the fork's first step is done
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_table",
        "constraint",
        "first_scheduled_time",
        "forks",
        "leader",
        "max_tokens",
        "num_completed",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered",
        "num_tokens",
        "request",
        "slot",
        "status",
        "token_ids",
    )

    def __init__(self, request: Request, leader: "Sequence | None" = None):
        self.request = request
        self.leader = leader
        self.forks: list[Sequence] = []
        self.constraint: ConstraintState | None = None
        if request.grammar is not None:
            self.constraint = request.grammar.start()
        self.token_ids = list(request.prompt_ids)
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_tokens = self.num_prompt_tokens
        self.max_tokens = self.num_prompt_tokens + request.stopping.max_new_tokens
        self.num_computed = 0
        self.num_completed = 0
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_registered = 0
        self.slot = NO_SLOT
        self.status = SequenceStatus.WAITING
        self.num_preemptions = 0
        self.arrival_time = time.perf_counter()
        self.first_scheduled_time: float | None = None

    @property
    def num_in_flight(self) -> int:
        """How many tokens launched steps sample whose ids the host has not seen yet."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether tokens that are still to be computed need prompt logprobs."""
        return self.request.prompt_logprobs and self.num_computed < self.num_prompt_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED
