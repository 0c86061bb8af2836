"""How OpenMP's threads wait for each other; decided in the environment, before torch is loaded."""

from __future__ import annotations

import os

# By default libgomp's threads spin at every barrier for as long as they have a core. With any other
# process on the machine, a spinning thread uses up its time slice and the thread it waits for is the
# one that is off the processor: a step then takes a hundred times as long. A short spin covers the
# gap between two operators of a step; after it the thread sleeps until it is woken.
_WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def thread_environment(num_threads: int | None = None) -> dict[str, str]:
    """Environment variables for a process with `num_threads` compute threads (None: OpenMP's default).

    What the user has set already stays.
    """
    wanted = dict(_WAITING)
    if num_threads is not None:
        wanted["OMP_NUM_THREADS"] = str(num_threads)
    return {name: value for name, value in wanted.items() if name not in os.environ}
