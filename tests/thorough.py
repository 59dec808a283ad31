"""A factor for the number of random examples. `make thorough` sets it to 10."""

import os

THOROUGH = int(os.environ.get("THOROUGH", "1"))
