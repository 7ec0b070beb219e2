"""CPU threads: torch's, and those of the linear algebra under numpy and scipy."""

from __future__ import annotations


def use_threads(count: int | None) -> None:
    """Use so many threads from now on.

    torch, numpy and scipy each bring a pool of their own, and pools of more threads than there are
    free cores wait for each other: small factorizations become many times slower.

    Args:
        count: Threads; ``None`` leaves each library its own choice.
    """
    if count is None:
        return
    import scipy.linalg  # noqa: F401  # its BLAS is not numpy's, and can be limited once loaded
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    threadpool_limits(limits=count, user_api="blas")
