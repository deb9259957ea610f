#!/usr/bin/env bash
# All four stages on public data:  construct -> train both modes -> evaluate both -> compare
#
#   CONTRASTRM_EXTERNAL_DATA=/path/to/data bash benchmarks/real_input.sh
#
# Reads train_pool.jsonl, judgebias_dev/ and rewardbench_style.jsonl from that folder (public data with licences of their own:
# they are never copied into the repository). Subsets are chosen by a hash of seed and id or question. Writes OUTPUT_DIR and
# RESULTS_DIR. A finished stage is not run again. About an hour and a half on two CPU cores.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# --- knobs ------------------------------------------------------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-output/real_input}"
export RESULTS_DIR="${RESULTS_DIR:-results/real_input}"
N_LIVE="${N_LIVE:-64}"                             # records that get injected answers
N_REST="${N_REST:-100}"                            # further groups, as they are
MAX_CHARS="${MAX_CHARS:-2600}"                     # longest training record
LIMIT_PER_BIAS="${LIMIT_PER_BIAS:-40}"
LIMIT_PER_SUBSET="${LIMIT_PER_SUBSET:-20}"
DTYPE="${DTYPE:-bfloat16}"                         # of the evaluation
export GENERATOR="${GENERATOR:-embedded}"
# ----------------------------------------------------------------------------------------------------------------

data="${CONTRASTRM_EXTERNAL_DATA:?set CONTRASTRM_EXTERNAL_DATA to the folder with train_pool.jsonl and judgebias_dev/}"
source scripts/env.sh
export SKIP_SETUP=1
mkdir -p "$OUTPUT_DIR"

sample() { # args: output file, rows, rows to skip
  "$PYTHON" scripts/sample_records.py --input_file "$data/train_pool.jsonl" --output_file "$1" --n "$2" --skip "$3" \
    --max_chars "$MAX_CHARS"
}
sample "$OUTPUT_DIR/live.jsonl" "$N_LIVE" 0
sample "$OUTPUT_DIR/rest.jsonl" "$N_REST" "$N_LIVE"
cat "$OUTPUT_DIR/live.jsonl" "$OUTPUT_DIR/rest.jsonl" >"$OUTPUT_DIR/original.jsonl"

training=(MAX_LENGTH=768 OVERLENGTH=left LEARNING_RATE=3e-5 WARMUP_STEPS=2 EPOCHS=1 GLOBAL_BATCH_SIZE=16
  PRECISION=bf16)
[[ -f "$OUTPUT_DIR/pairwise/config.json" ]] || env "${training[@]}" MODE=pairwise NEGATIVES=original \
  TRAIN_FILE="$OUTPUT_DIR/original.jsonl" OUTPUT_DIR="$OUTPUT_DIR/pairwise" bash run_training.sh

[[ -f "$OUTPUT_DIR/constructed.jsonl" ]] || env INPUT_FILE="$OUTPUT_DIR/live.jsonl" MAX_NEW_TOKENS=96 CONCURRENCY=8 \
  OUTPUT_FILE="$OUTPUT_DIR/constructed.jsonl" WORK_DIR="$OUTPUT_DIR/construct" REQUEST_TIMEOUT=600 bash run_construction.sh
cat "$OUTPUT_DIR/constructed.jsonl" "$OUTPUT_DIR/rest.jsonl" >"$OUTPUT_DIR/injected.jsonl"

[[ -f "$OUTPUT_DIR/contrastive/config.json" ]] || env "${training[@]}" MODE=contrastive NEGATIVES=all \
  TRAIN_FILE="$OUTPUT_DIR/injected.jsonl" OUTPUT_DIR="$OUTPUT_DIR/contrastive" bash run_training.sh

for model in contrastive pairwise; do
  [[ -f "$RESULTS_DIR/$model/bias_summary.json" ]] || env MODEL_PATH="$OUTPUT_DIR/$model" DATA_DIR="$data/judgebias_dev" \
    LIMIT_PER_BIAS="$LIMIT_PER_BIAS" DTYPE="$DTYPE" bash run_evaluation_rm.sh
  [[ -f "$RESULTS_DIR/$model/reward_bench_summary.json" ]] || env MODEL_PATH="$OUTPUT_DIR/$model" \
    DATA_FILE="$data/rewardbench_style.jsonl" LIMIT_PER_SUBSET="$LIMIT_PER_SUBSET" DTYPE="$DTYPE" \
    bash run_evaluation_rewardbench.sh
done
"$PYTHON" -m codes.evaluate.compare_models "$RESULTS_DIR/contrastive" "$RESULTS_DIR/pairwise" \
  --output_file "$RESULTS_DIR/comparison.md"
