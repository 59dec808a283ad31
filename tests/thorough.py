"""How thorough the tests of many examples are: `make thorough` tries ten times as many."""

import os

THOROUGH = int(os.environ.get("THOROUGH", "1"))
