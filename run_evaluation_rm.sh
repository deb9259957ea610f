#!/usr/bin/env bash
# Measure how biased a reward model is:  data/eval -> RESULTS_DIR/<model>/bias_summary.json, report.md, report.html
#
#   MODEL_PATH=output/contrastive bash run_evaluation_rm.sh
#
# Edit a line of the block or prefix the environment. Further flags go to codes.evaluate.eval_rm.
# Paths are relative to the repository. DRY_RUN=1 prints the command.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- knobs ------------------------------------------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-output/contrastive}"     # a reward model: a folder or a hub id
DATA_DIR="${DATA_DIR:-data/eval}"                  # holds {bias}_bias.jsonl
BIAS_TYPE="${BIAS_TYPE:-all}"                      # all | length | authority | …
RESULTS_DIR="${RESULTS_DIR:-results}"
CHAT_TEMPLATE="${CHAT_TEMPLATE:-}"                # a Jinja file | chatml: for a tokenizer without template; empty: its own
MAX_LENGTH="${MAX_LENGTH:-0}"                      # 0: the model's own limit
OVERLENGTH="${OVERLENGTH:-left}"                   # left | drop | keep_end | error
MAX_TOKENS_PER_BATCH="${MAX_TOKENS_PER_BATCH:-0}" # 0: what suits the device
PACKING="${PACKING:-auto}"                         # auto | shared | packed | off (padded batches)
DTYPE="${DTYPE:-auto}"                             # auto | float32 | bfloat16 | float16
DEVICE="${DEVICE:-auto}"
LIMIT_PER_BIAS="${LIMIT_PER_BIAS:-0}"              # 0: all pairs
SEED="${SEED:-42}"
MAX_BAD_ROWS="${MAX_BAD_ROWS:-0}"
SCORE_STORE="${SCORE_STORE:-auto}"                 # a file of scores computed once; auto: in the results folder; none
NUM_PROCESSES="${NUM_PROCESSES:-}"                 # empty: one for each visible GPU (one where DEVICE is named)
# ----------------------------------------------------------------------------------------------------------------

source scripts/env.sh

exec_on_processes -m codes.evaluate.eval_rm \
  --model_path "$MODEL_PATH" --data_dir "$DATA_DIR" --bias_type "$BIAS_TYPE" --results_dir "$RESULTS_DIR" \
  --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" --overlength "$OVERLENGTH" --max_tokens_per_batch "$MAX_TOKENS_PER_BATCH" --packing "$PACKING" \
  --dtype "$DTYPE" --device "$DEVICE" --limit_per_bias "$LIMIT_PER_BIAS" --seed "$SEED" \
  --max_bad_rows "$MAX_BAD_ROWS" --score_store "$SCORE_STORE" "$@"
