#!/usr/bin/env bash
# Everything that a GPU can show, on a bare machine without network, in the order of importance and within a time limit.
#
#   bench/gpu_all.sh OUT [MINUTES] [--dry-run]
#
# OUT      where results go, case by case; run again with the same OUT to go on where the last run ended
# MINUTES  nothing is begun after, and what runs is stopped (default 120)
# --dry-run  the same path on a CPU: the quick part of one op in Triton's interpreter, no speed
#
# OUT/<gpu>/<date>-<commit>/ is what belongs into bench/results, OUT/tuned/ into kernels/tuned. A step that has ended is not
# run again; delete its line in OUT/status.tsv to repeat it. PYTHON chooses the interpreter, FASTDLLM_COMMIT names the commit
# where the copy has no repository.
set -uo pipefail

usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
[ $# -ge 1 ] || usage
OUT=""; MINUTES=""; DRY=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY=1 ;;
    -*) echo "gpu_all: unknown option $argument" >&2; usage ;;
    *) if [ -z "$OUT" ]; then OUT=$argument; elif [ -z "$MINUTES" ]; then MINUTES=$argument; else usage; fi ;;
  esac
done
MINUTES=${MINUTES:-120}
[[ "$MINUTES" =~ ^[0-9]+$ ]] || { echo "gpu_all: MINUTES must be a whole number, got $MINUTES" >&2; exit 2; }

mkdir -p "$OUT/logs" || { echo "gpu_all: $OUT cannot be made" >&2; exit 2; }
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export FASTDLLM_COMMIT=${FASTDLLM_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
END=$((SECONDS + MINUTES * 60))
STATUS="$OUT/status.tsv"
touch "$STATUS"

# step NAME PERCENT COMMAND...: runs a command, for at most so much of the time that is left, and notes how it ended.
step() {
  local name=$1 share=$2 left code began=$SECONDS word
  shift 2
  if grep -q "^$name	\(ok\|failed\|skipped\)" "$STATUS"; then echo "== $name: done before"; return; fi
  left=$(((END - SECONDS) * share / 100))
  if [ "$left" -lt 5 ]; then echo "== $name: no time left"; note "$name" "no time" 0; return; fi
  echo "== $name, at most $((left / 60)) min $((left % 60)) s"
  LEFT_MINUTES=$(awk "BEGIN { print $left / 60 * 0.95 }") timeout --kill-after=20 "$left" "$@" >>"$OUT/logs/$name.log" 2>&1
  code=$?
  case $code in 0) word=ok ;; 75) word=skipped ;; 3 | 124 | 137) word=stopped ;; *) word=failed ;; esac
  note "$name" "$word" $((SECONDS - began))
  [ "$word" = ok ] || tail -n 3 "$OUT/logs/$name.log"
}

note() {
  grep -v "^$1	" "$STATUS" >"$STATUS.part"
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$STATUS.part"
  mv "$STATUS.part" "$STATUS"
}

cli() { "$PYTHON" -m fastdllm_triton "$@"; }

install() {
  if [ "$DRY" = 1 ]; then echo "a dry run imports the checkout as it is"; exit 75; fi
  "$PYTHON" -m pip install --editable . --no-deps --no-build-isolation
}

environment() {
  nvidia-smi || echo "no nvidia-smi"
  "$PYTHON" -m pip list
}

verify() { cli verify "${QUICK[@]}" "${OPS[@]}" --out "$OUT/verify.json"; }

tests() {
  "$PYTHON" -c 'import pytest, hypothesis' || { echo "pytest or hypothesis is not installed"; exit 75; }
  if [ "$DRY" = 1 ]; then "$PYTHON" -m pytest -q -m gpu --collect-only tests/test_swiglu.py
  else "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider; fi
}

benches() {
  cli bench all "${QUICK[@]}" "${OPS[@]}" --out "$RESULTS" --resume --minutes "$LEFT_MINUTES"
}

tune() { "$PYTHON" bench/tune.py --out "$OUT/tuned" --minutes "$LEFT_MINUTES"; }

# The small cases of every kernel under a tool of compute-sanitizer, each op in a process of its own.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; exit 75; }
  local bad=0
  for op in $("$PYTHON" -c 'from fastdllm_triton.verify.grids import GRIDS; print(*GRIDS)'); do
    echo "-- $1 $op"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
      "$PYTHON" -m fastdllm_triton verify --quick --op "$op" || bad=1
  done
  return $bad
}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - <<'CHECK' || exit 2
import importlib.util, sys
needed = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "einops", "numpy", "typer", "rich")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_all: {sys.executable} lacks {', '.join(missing)}, and nothing is fetched here")
CHECK
if [ "$DRY" = 0 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_all: torch sees no GPU here; --dry-run tries the path without one" >&2
  exit 2
fi
QUICK=(); OPS=()
if [ "$DRY" = 1 ]; then
  export TRITON_INTERPRET=1
  QUICK=(--quick --device cpu); OPS=(--op rms_norm)
fi
if [ ! -s "$OUT/folder" ]; then
  "$PYTHON" -c 'import torch; from fastdllm_triton import machine
print(machine.folder_name(machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))' >"$OUT/folder" || exit 2
fi
RESULTS="$OUT/$(cat "$OUT/folder")"
mkdir -p "$RESULTS"
export OUT RESULTS DRY PYTHON
export -f cli install environment verify tests benches tune sanitize
export QUICK_WORDS="${QUICK[*]}" OPS_WORDS="${OPS[*]}"
# timeout starts a new shell, which knows the functions but not the arrays.
in_shell() { bash -c 'QUICK=($QUICK_WORDS); OPS=($OPS_WORDS); "$@"' step "$@"; }
export -f in_shell
run() { local name=$1 share=$2; shift 2; step "$name" "$share" bash -c 'in_shell "$@"' run "$@"; }

run install 50 install
run environment 50 environment
run verify 40 verify
run bench 65 benches
run tests 60 tests
run tune 70 tune
run memcheck 50 sanitize memcheck
run racecheck 90 sanitize racecheck
"$PYTHON" bench/summary.py "$OUT" | tee "$OUT/summary.txt"
! grep -q "	failed	" "$STATUS"
