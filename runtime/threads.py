"""How the engine's OpenMP threads wait; decided in the environment, before torch is loaded."""

from __future__ import annotations

import os


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment variables for an engine process with `num_threads` compute threads.

    What the user has set already stays.
    """
    wanted = {"OMP_NUM_THREADS": str(num_threads)}
    return {name: value for name, value in wanted.items() if name not in os.environ}
