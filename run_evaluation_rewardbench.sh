#!/usr/bin/env bash
# Measure a reward model on RewardBench:  a RewardBench file -> RESULTS_DIR/<model>/reward_bench_summary.json
#
#   python data/eval/reward_bench/load_reward_bench.py            fetches the public file where the hub is reachable
#   MODEL_PATH=output/contrastive DATA_FILE=… bash run_evaluation_rewardbench.sh
#
# Files of RewardBench 2, RM-Bench, LLMBar and JudgeBench are known by their keys -> RESULTS_DIR/<model>/<format>_summary.json
# The default DATA_FILE is the project's own offline sample, not the public benchmark; its results say so.
# Edit a line of the block or prefix the environment. Further flags go to codes.evaluate.eval_reward_bench.
# Paths are relative to the repository. DRY_RUN=1 prints the command.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- knobs ------------------------------------------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-output/contrastive}"     # a reward model: a folder or a hub id
DATA_FILE="${DATA_FILE:-data/eval/reward_bench/own_sample.jsonl}"
FORMAT="${FORMAT:-auto}"                           # auto | reward_bench | reward_bench_2 | rm_bench | llmbar | judgebench
CATEGORY="${CATEGORY:-all}"                        # all | Chat | Chat Hard | Safety | Reasoning | another format's subset
RESULTS_DIR="${RESULTS_DIR:-results}"
CHAT_TEMPLATE="${CHAT_TEMPLATE:-}"                # a Jinja file | chatml: for a tokenizer without template; empty: its own
MAX_LENGTH="${MAX_LENGTH:-0}"                      # 0: the model's own limit
OVERLENGTH="${OVERLENGTH:-left}"                   # left | drop | keep_end | error
MAX_TOKENS_PER_BATCH="${MAX_TOKENS_PER_BATCH:-0}" # 0: what suits the device
PACKING="${PACKING:-auto}"                         # auto | shared | packed | off (padded batches)
DTYPE="${DTYPE:-auto}"                             # auto | float32 | bfloat16 | float16
DEVICE="${DEVICE:-auto}"
LIMIT_PER_SUBSET="${LIMIT_PER_SUBSET:-0}"          # 0: all pairs
SEED="${SEED:-42}"
MAX_BAD_ROWS="${MAX_BAD_ROWS:-0}"
SCORE_STORE="${SCORE_STORE:-auto}"                 # a file of scores computed once; auto: in the results folder; none
NUM_PROCESSES="${NUM_PROCESSES:-}"                 # empty: one for each visible GPU (one where DEVICE is named)
# ----------------------------------------------------------------------------------------------------------------

source scripts/env.sh

exec_on_processes -m codes.evaluate.eval_reward_bench \
  --model_path "$MODEL_PATH" --data_file "$DATA_FILE" --format "$FORMAT" --category "$CATEGORY" --results_dir "$RESULTS_DIR" \
  --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" --overlength "$OVERLENGTH" --max_tokens_per_batch "$MAX_TOKENS_PER_BATCH" --packing "$PACKING" \
  --dtype "$DTYPE" --device "$DEVICE" --limit_per_subset "$LIMIT_PER_SUBSET" --seed "$SEED" \
  --max_bad_rows "$MAX_BAD_ROWS" --score_store "$SCORE_STORE" "$@"
