"""``fastdllm-triton``, and ``python -m fastdllm_triton``. Imports nothing of weight before it can answer Ctrl-C."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line and ends with its status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else, as under nohup, it is not to be answered
        signal.signal(signal.SIGINT, _interrupt)
    # Threads that wait for each other sleep. By default they spin, and where a core is taken by another process, two are then
    # many times slower than one. OpenMP reads this when it is loaded, with torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from .cli.app import app

        app(prog_name="fastdllm-triton")
    except KeyboardInterrupt:  # Before a command runs; the command line answers those after that.
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; in the middle of an import, ends the process.

    Extension modules swallow exceptions while they are initialised, and go on half made.
    """
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            sys.stderr.write("interrupted\n")
            sys.stderr.flush()
            os._exit(130)
        at = at.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
