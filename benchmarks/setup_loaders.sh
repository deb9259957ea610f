#!/usr/bin/env bash
# The environment in which the rewardbench package loads a trained folder: its own, because it pins an older transformers.
#
#   bash benchmarks/setup_loaders.sh
#
# Reads benchmarks/requirements-loaders.txt; torch is the one of constraints.txt. Writes LOADERS_VENV. A finished environment is
# left as it is; a changed pin installs again. LOADERS_VENV moves it; PYTHON=python3.12 builds it with another Python.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# --- knobs ------------------------------------------------------------------------------------------------------
LOADERS_VENV="${LOADERS_VENV:-output/benchmarks/loaders-venv}"
PYTHON="${PYTHON:-python3}"
LOADERS_TORCH="${LOADERS_TORCH:-$(grep -E '^torch==' constraints.txt)}"
# ----------------------------------------------------------------------------------------------------------------

source benchmarks/venv.sh
make_venv "$LOADERS_VENV" benchmarks/requirements-loaders.txt "$LOADERS_TORCH" 'from rewardbench import REWARD_MODEL_CONFIG' rewardbench
