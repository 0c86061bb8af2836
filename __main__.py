"""Runs the command line. Ctrl-C before it is imported ends the process without a traceback."""

from __future__ import annotations

import signal
from typing import NoReturn

_INTERRUPT = signal.getsignal(signal.SIGINT)
if _INTERRUPT is signal.default_int_handler:  # else it is ignored, or another program imports this
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    """The console script."""
    from microvllm import cli

    signal.signal(signal.SIGINT, _INTERRUPT)
    cli.main()


if __name__ == "__main__":
    main()
