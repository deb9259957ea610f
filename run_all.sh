#!/usr/bin/env bash
# Everything on a fresh machine, with no key, no hub and no GPU:  construct -> train -> evaluate -> compare
#
#   bash run_all.sh
#
# Ends with a table: the debiased (contrastive) model beside the pairwise baseline, per bias. The settings suit two CPU
# cores and a 135M-parameter model; run_training.sh and run_construction.sh have the ones for real work.
# Edit a line of the block or prefix the environment. Paths are relative to the repository. DRY_RUN=1 prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- knobs ------------------------------------------------------------------------------------------------------
# GENERATOR=api (with OPENAI_API_KEY and API_MODEL) has a real model write the constructed records.
export GENERATOR="${GENERATOR:-embedded}"
export MODEL_PATH="${MODEL_PATH:-embedded}"        # the base model of both reward models
export TRAIN_FILE="${TRAIN_FILE:-data/train/own_train.jsonl}"
export RESULTS_DIR="${RESULTS_DIR:-results}"
CONSTRUCT_LIMIT="${CONSTRUCT_LIMIT:-12}"           # records that are constructed live; training does not read them
CONSTRUCT_MAX_NEW_TOKENS="${CONSTRUCT_MAX_NEW_TOKENS:-96}"
CONSTRUCT_CONCURRENCY="${CONSTRUCT_CONCURRENCY:-8}"
export GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-8}"
export EPOCHS="${EPOCHS:-1}"                           # more epochs learn more
export LEARNING_RATE="${LEARNING_RATE:-3e-5}"
export WARMUP_STEPS="${WARMUP_STEPS:-2}"
MAX_LENGTH="${MAX_LENGTH:-512}"                     # of training; the evaluation reads texts whole
export DTYPE="${DTYPE:-bfloat16}"                   # of the evaluation; the score head computes in float32 in any case
CONTRASTIVE_DIR="${CONTRASTIVE_DIR:-output/contrastive}"
PAIRWISE_DIR="${PAIRWISE_DIR:-output/pairwise}"
# ----------------------------------------------------------------------------------------------------------------

if (($# > 0)); then
  echo "run_all.sh: it takes no flags ($*), because it runs several commands. Set knobs in the environment." >&2
  exit 2
fi

source scripts/env.sh
export SKIP_SETUP=1 # made above, once, for all stages

# Args: the stage's name, then its command.
stage() {
  local status=0 start=$SECONDS
  is_dry_run || printf '\n=== %s\n' "$1"
  if is_dry_run && [[ "$2" == env ]]; then
    "${@:2}" # a launcher: it prints its own commands
    return
  fi
  run_step "${@:2}" || status=$?
  # Construction: everything is written, but some requests brought no answer. Training does not read these records.
  if ((status == 3)) && [[ "$1" == construct* ]]; then
    echo "=== $1: some rows are missing (above), the other stages go on" >&2
  elif ((status != 0)); then
    echo "=== $1 FAILED after $((SECONDS - start)) s (exit code $status); the later stages were not run." \
      "The error is above; run the same command again after mending it." >&2
    exit "$status"
  fi
  is_dry_run || printf '=== %s: %d s\n' "$1" "$((SECONDS - start))"
}

stage "construct $CONSTRUCT_LIMIT records ($GENERATOR generator)" env LIMIT="$CONSTRUCT_LIMIT" \
  MAX_NEW_TOKENS="$CONSTRUCT_MAX_NEW_TOKENS" CONCURRENCY="$CONSTRUCT_CONCURRENCY" bash run_construction.sh
stage "train the contrastive model" env MODE=contrastive NEGATIVES=all OUTPUT_DIR="$CONTRASTIVE_DIR" \
  MAX_LENGTH="$MAX_LENGTH" bash run_training.sh
stage "train the pairwise baseline" env MODE=pairwise NEGATIVES=original OUTPUT_DIR="$PAIRWISE_DIR" \
  MAX_LENGTH="$MAX_LENGTH" bash run_training.sh
# A prefixed MAX_LENGTH would reach the evaluation too.
unset MAX_LENGTH
for model in "$CONTRASTIVE_DIR" "$PAIRWISE_DIR"; do
  stage "evaluate $model: bias" env MODEL_PATH="$model" bash run_evaluation_rm.sh
  stage "evaluate $model: RewardBench sample" env MODEL_PATH="$model" bash run_evaluation_rewardbench.sh
done

# A model that was trained again does not overwrite the results of the first one, so their folder's name may carry a
# part of the weight hash: ask the module that chose it.
results_folder() {
  if is_dry_run; then
    printf '%s/%s\n' "$RESULTS_DIR" "$(basename -- "$1")"
    return
  fi
  "$PYTHON" -c 'import sys
from codes.common.base_model import model_hash
from codes.evaluate.scorer_setup import model_results_folder
print(model_results_folder(sys.argv[1], sys.argv[2], model_hash(sys.argv[2])))' "$RESULTS_DIR" "$1"
}
contrastive_results="$(results_folder "$CONTRASTIVE_DIR")"
pairwise_results="$(results_folder "$PAIRWISE_DIR")"
stage "compare" "$PYTHON" -m codes.evaluate.compare_models "$contrastive_results" "$pairwise_results" \
  --output_file "$RESULTS_DIR/comparison.md"
is_dry_run || printf '\nrun_all.sh: finished in %d s. Models: %s, %s. Reports: %s, %s, %s\n' \
  "$SECONDS" "$CONTRASTIVE_DIR" "$PAIRWISE_DIR" "$contrastive_results" "$pairwise_results" "$RESULTS_DIR/comparison.md"
