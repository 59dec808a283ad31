"""A request's life in the engine: tokens known, tokens computed, blocks held.

Changed by the scheduler and the engine's collection only, in the engine thread. No
tensors. Positions, as half-open ranges over one sequence:

    [0, num_completed)              KV is on the device: the step that wrote it is done
    [num_completed, num_computed)   KV is being written by steps still in flight
    [num_computed, num_tokens)      to be scheduled
    [len(token_ids), num_tokens)    sampled in flight: ids known to the device alone
"""

import time
from enum import Enum, auto

from engine.core.block_pool import BlockHash
from engine.core.request import ConstraintState, Request


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Mutable state of one request; `slot` indexes the per-sequence device state.

    `forks` are sequences of the same prompt that wait for it to be computed here: then they
    go on from there, sharing its blocks. Each of them has this one as its `leader`, until its
    own first step is done.
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
        self.slot = -1
        self.status = SequenceStatus.WAITING
        self.num_preemptions = 0
        self.arrival_time = time.perf_counter()
        self.first_scheduled_time: float | None = None

    @property
    def num_in_flight(self) -> int:
        """Tokens sampled by launched steps whose ids the host has not seen."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Of tokens that are still to be computed."""
        return self.request.prompt_logprobs and self.num_computed < self.num_prompt_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED
