"""The books of a worker that dies: its successor goes on with them.

They have what was not reported yet, which requests were running, and which envelopes have been
accepted. All else is found again: the benchmark's result and the certificate are on the disk, and
the public key is fetched.

The highest request number is left out: the autoscaler may begin to count anew, and the successor
would refuse all that it sends. It refuses the envelopes that were the last to be accepted.
"""

import asyncio
import json
import logging

from api.handover import Handover
from api.vast.signature import ReplayGuard
from api.vast.workload import Workload

_INTERVAL_S = 0.25
"""What happened in this time before the process dies of a signal may be missing in the books."""

logger = logging.getLogger(__name__)


class Books:
    """Keeps the books of this worker in `handover`, and begins with those of the one before."""

    def __init__(self, handover: Handover, workload: Workload, replays: ReplayGuard) -> None:
        self._handover = handover
        self._workload = workload
        self._replays = replays
        if handover.books:
            before = json.loads(handover.books)
            workload.restore(before["workload"])
            replays.accepted.extend(bytes.fromhex(digest) for digest in before["accepted"])

    def save(self) -> None:
        books = {
            "workload": self._workload.snapshot(),
            "accepted": [digest.hex() for digest in self._replays.accepted],
        }
        try:
            self._handover.write_books(json.dumps(books).encode())
        except ValueError as error:
            logger.warning("the books cannot be saved: %s", error)

    async def keep(self) -> None:
        """Save the books again and again, until cancelled."""
        while True:
            self.save()
            await asyncio.sleep(_INTERVAL_S)
