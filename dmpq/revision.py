"""Which revision of this code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """Return the revision of the checkout that this code belongs to, if it does to one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()

    try:
        # Installed into somebody's own checkout, these files are not what its revision names.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
