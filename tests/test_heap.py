"""Memory between blocks that are in use goes back to the system."""

import subprocess
import sys

from dmpq.checkpoints.heap import return_freed_memory

CODE = """
import gc, psutil, sys, torch
from dmpq.checkpoints.heap import return_freed_memory

if sys.argv[1] == "told":
    return_freed_memory()
torch.ones(1 << 21)  # 8 MiB, freed: from here on glibc serves such blocks from its heap
blocks = [torch.ones(1 << 21) for _ in range(40)]
resident = psutil.Process().memory_info().rss
del blocks[::2]
gc.collect()
print(resident - psutil.Process().memory_info().rss)
"""


def given_back(how):
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_holes_between_blocks_are_given_back():
    freed = 20 * (8 << 20)
    if return_freed_memory():
        assert given_back("told") > 0.9 * freed
        assert given_back("not told") < 0.5 * freed
