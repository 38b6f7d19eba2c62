#!/usr/bin/env bash
# Everything that a GPU can show, on a bare machine without network, what matters most first: see bench/gpu_all.py.
#
#   bench/gpu_all.sh OUT [MINUTES] [--dry-run]
#
# PYTHON chooses the interpreter.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
exec "${PYTHON:-python3}" "$root/bench/gpu_all.py" "$@"
