#!/usr/bin/env bash
# The environment in which TRL's RewardTrainer is measured: its own, so that nothing of it can change ours.
#
#   bash benchmarks/setup_trl.sh
#
# Reads benchmarks/requirements-trl.txt and constraints.txt (the same torch, transformers, accelerate and datasets as ours).
# Writes TRL_VENV. A finished environment is left as it is; a changed pin installs again. TRL_VENV moves it; PYTHON=python3.12
# builds it with another Python; TRL_TORCH names another torch (a GPU node: the one that suits its driver).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# --- knobs ------------------------------------------------------------------------------------------------------
TRL_VENV="${TRL_VENV:-output/benchmarks/trl-venv}"
PYTHON="${PYTHON:-python3}"
TRL_TORCH="${TRL_TORCH:-$(grep -E '^torch==' constraints.txt)}"
# ----------------------------------------------------------------------------------------------------------------

stamp="$TRL_VENV/.contrastrm-requirements"
log="$TRL_VENV/setup.log"
wanted="$(cat benchmarks/requirements-trl.txt constraints.txt - <<<"$TRL_TORCH" | cksum)"

say() { printf '[setup_trl] %s\n' "$*" >&2; }

if [[ -x "$TRL_VENV/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
  say "$TRL_VENV is ready"
  exit 0
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "$PYTHON is missing or older than 3.11. Name another one: PYTHON=/path/to/python3"
  exit 1
fi
"$PYTHON" -m venv --clear "$TRL_VENV"

# The pin of torch is ours to replace, so it must not stand among the constraints a second time.
constraints="$TRL_VENV/constraints.txt"
{
  grep -v -E '^torch==' constraints.txt
  printf '%s\n' "$TRL_TORCH"
} >"$constraints"
say "installing into $TRL_VENV (a few minutes; log: $log)"
if ! "$TRL_VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$constraints" \
  -r benchmarks/requirements-trl.txt >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  say "failed; the end of $log is above. Check the connection to your package index (pip config list) and the disk space."
  exit 1
fi
"$TRL_VENV/bin/python" -c 'from trl import RewardConfig, RewardTrainer' >>"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  say "TRL was installed but cannot be imported; the end of $log is above."
  exit 1
}
printf '%s\n' "$wanted" >"$stamp"
say "done"
