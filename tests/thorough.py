"""How thorough the tests of many examples are: `make thorough` tries many times as many."""

import os

THOROUGH = int(os.environ.get("THOROUGH", "1"))
