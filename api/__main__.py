"""`python -m api`: serve, in a process that is started again when its engine has died.

Nothing is imported here that is not needed to supervise: it would stay in memory for good.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from api.handover import Handover
from api.supervisor import leave, supervise

_FALSE = ("0", "f", "false", "n", "no", "off")


def is_supervised(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the setting `supervise` is on. Flags and variables are read here as by
    `api.settings`, which is too large to be imported.
    """
    values = {name.lower(): value for name, value in environment.items()}
    return "--no-supervise" not in argv and values.get("supervise", "").lower() not in _FALSE


def _serve(handover: Handover | None = None) -> int:
    from api.process import main

    return main(sys.argv[1:], handover)


def _report_failure(reason: str) -> int:
    from api.process import report_until_stopped

    return report_until_stopped(reason)


if __name__ == "__main__":
    if is_supervised(sys.argv[1:], os.environ):
        sys.exit(supervise(_serve, _report_failure))
    leave(_serve)
