"""The engine, played through for GPUs that are not there: fills Triton's cache for them."""
