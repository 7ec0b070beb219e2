"""Seeds that stay inside a search."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def generators_left_alone() -> Iterator[None]:
    """Give the caller's global generators back as they were: SB3 seeds and draws from them."""
    import torch as th

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with th.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
