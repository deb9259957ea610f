#!/usr/bin/env bash
# Every check of the project: ruff, mypy, shellcheck, pytest. All of them run; any failure gives a non-zero exit code.
#
#   bash run_tests.sh            bash run_tests.sh -k losses -x        (further flags go to pytest)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# Read by env.sh: the test tools are needed too.
export SETUP_TESTS=1
source scripts/env.sh

failed=0
# Args: the check's name, then its command.
check() {
  is_dry_run || printf '=== %s\n' "$1"
  run_step "${@:2}" || {
    echo "=== $1: FAILED" >&2
    failed=1
  }
}

shopt -s nullglob # a folder without scripts gives none, not its pattern
shell_files=(run_*.sh scripts/*.sh benchmarks/*.sh .ci/run)
shopt -u nullglob
check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
check "mypy" "$PYTHON" -m mypy codes
check "shellcheck" shellcheck --external-sources "${shell_files[@]}"
# Two processes of one thread each are twice as fast as one of two threads, on two cores. A file's tests stay together,
# because they share what they build. pytest comes last: its closing line is this script's.
check "pytest" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
exit "$failed"
