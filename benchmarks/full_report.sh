#!/usr/bin/env bash
# The joint report of three models on public data: the base model with a seeded head, a pairwise and a contrastive one
#
#   CONTRASTRM_EXTERNAL_DATA=/path/to/data bash benchmarks/full_report.sh
#
# Reads judgebias_dev/, rewardbench_style.jsonl and, to train on, train_pool.jsonl from that folder (public data with licences of
# their own: they are never copied into the repository); the contrastive model trains on the constructed rows of data/train.
# Writes OUTPUT_DIR, RESULTS_DIR/<model> and RESULTS_DIR/report/report.html.
# A finished stage is not run again. A model of one's own takes the place of a trained one: PAIRWISE_MODEL, CONTRASTIVE_MODEL.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# --- knobs ------------------------------------------------------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-output/full_report}"
RESULTS_DIR="${RESULTS_DIR:-results/full_report}"
BASE_MODEL="${BASE_MODEL:-$OUTPUT_DIR/base-seeded-head}"     # missing folders are made
PAIRWISE_MODEL="${PAIRWISE_MODEL:-$OUTPUT_DIR/pairwise}"
CONTRASTIVE_MODEL="${CONTRASTIVE_MODEL:-$OUTPUT_DIR/contrastive}"
N_TRAIN="${N_TRAIN:-100}"                          # rows of train_pool.jsonl to train the pairwise model on
MAX_CHARS="${MAX_CHARS:-2600}"                     # longest training record
EPOCHS="${EPOCHS:-1}"
LIMIT_PER_BIAS="${LIMIT_PER_BIAS:-40}"             # pairs a bias; 0: all
LIMIT_PER_SUBSET="${LIMIT_PER_SUBSET:-20}"         # RewardBench-style rows a subset; 0: all
DTYPE="${DTYPE:-bfloat16}"                         # of the evaluation
MAX_PAIRS="${MAX_PAIRS:-300}"                      # pairs that the page shows with their texts
# ----------------------------------------------------------------------------------------------------------------

data="${CONTRASTRM_EXTERNAL_DATA:?set CONTRASTRM_EXTERNAL_DATA to the folder with train_pool.jsonl and judgebias_dev/}"
source scripts/env.sh
export SKIP_SETUP=1
mkdir -p "$OUTPUT_DIR"

training=(MAX_LENGTH=768 OVERLENGTH=left LEARNING_RATE=3e-5 WARMUP_STEPS=2 EPOCHS="$EPOCHS" GLOBAL_BATCH_SIZE=16 PRECISION=bf16)

[[ -f "$BASE_MODEL/config.json" ]] || run_step "$PYTHON" -m benchmarks.common --output_dir "$BASE_MODEL"

if [[ ! -f "$PAIRWISE_MODEL/config.json" ]]; then
  run_step "$PYTHON" scripts/sample_records.py --input_file "$data/train_pool.jsonl" --output_file "$OUTPUT_DIR/original.jsonl" \
    --n "$N_TRAIN" --skip 0 --max_chars "$MAX_CHARS"
  run_step env "${training[@]}" MODE=pairwise NEGATIVES=original TRAIN_FILE="$OUTPUT_DIR/original.jsonl" \
    OUTPUT_DIR="$PAIRWISE_MODEL" bash run_training.sh
fi
[[ -f "$CONTRASTIVE_MODEL/config.json" ]] || run_step env "${training[@]}" MODE=contrastive NEGATIVES=all \
  OUTPUT_DIR="$CONTRASTIVE_MODEL" bash run_training.sh

results=()
for model in "$BASE_MODEL" "$PAIRWISE_MODEL" "$CONTRASTIVE_MODEL"; do
  folder="$RESULTS_DIR/$(basename "$model")"
  [[ -f "$folder/bias_summary.json" ]] || run_step env MODEL_PATH="$model" DATA_DIR="$data/judgebias_dev" \
    RESULTS_DIR="$RESULTS_DIR" LIMIT_PER_BIAS="$LIMIT_PER_BIAS" DTYPE="$DTYPE" bash run_evaluation_rm.sh
  [[ -f "$folder/reward_bench_summary.json" ]] || run_step env MODEL_PATH="$model" DATA_FILE="$data/rewardbench_style.jsonl" \
    RESULTS_DIR="$RESULTS_DIR" LIMIT_PER_SUBSET="$LIMIT_PER_SUBSET" DTYPE="$DTYPE" bash run_evaluation_rewardbench.sh
  results+=("$folder")
done
run_step "$PYTHON" -m codes.evaluate.report "${results[@]}" --output "$RESULTS_DIR/report" --max_pairs "$MAX_PAIRS"
