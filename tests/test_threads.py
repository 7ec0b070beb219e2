"""Threads asked for are those of every pool."""

import torch
from threadpoolctl import threadpool_info, threadpool_limits

from dmpq.threads import use_threads


def blas_threads():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def test_every_pool_has_as_many_threads_as_are_asked_for():
    before = torch.get_num_threads()
    with threadpool_limits():  # puts back what it finds
        try:
            use_threads(2)
            assert torch.get_num_threads() == 2
            assert blas_threads() == {2}
            use_threads(None)
            assert blas_threads() == {2}
        finally:
            torch.set_num_threads(before)


def test_tests_have_one_thread():
    assert torch.get_num_threads() == 1
    assert blas_threads() == {1}
