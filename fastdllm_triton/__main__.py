"""``fastdllm-triton``, and ``python -m fastdllm_triton``. Imports nothing before it can answer Ctrl-C."""

import sys


def main() -> None:
    """Runs the command line and ends with its status."""
    try:
        from .cli import app

        app(prog_name="fastdllm-triton")
    except KeyboardInterrupt:
        # While something was imported; once a command runs, the command line answers by itself.
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
