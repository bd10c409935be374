"""Measurements of the library against PyTorch and its peers, with goals: ``python -m benchmarks``."""

import os

# The profiler counts memory; what it says about itself on standard error helps nobody.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
