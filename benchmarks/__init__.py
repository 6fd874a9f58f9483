"""Measurements of crossdock beside named peers, interleaved in one run: `python -m benchmarks NAME`."""
