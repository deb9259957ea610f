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

source benchmarks/venv.sh
# The pin of torch is replaced by TRL_TORCH, so it must not stand among the constraints a second time.
constraints="$(grep -v -E '^torch==' constraints.txt)"$'\n'"$TRL_TORCH"
make_venv "$TRL_VENV" benchmarks/requirements-trl.txt "$constraints" 'from trl import RewardConfig, RewardTrainer' TRL
