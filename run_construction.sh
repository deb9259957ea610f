#!/usr/bin/env bash
# Build bias-injected preference data:  gptout -> (USE_GPTINST=1: gptinst) -> verify_correctness -> report
#
#   OPENAI_API_KEY=… API_MODEL=MODEL bash run_construction.sh   any OpenAI-compatible API (API_BASE_URL names another)
#   GENERATOR=embedded bash run_construction.sh                 the small embedded model: no key, no network
#   STRATEGY=template bash run_construction.sh                  cues by rule: no model at all, and no judge
#
# Edit a line of the block or prefix the environment: LIMIT=20 bash run_construction.sh. Further flags go to every step, and
# each reads its own (python -m codes.construct.STEP --help): --orders 3 --drop_bad_negatives 1 --cue_gate off --seed 7
# --temperature 0.9 (the judge's is JUDGE_TEMPERATURE) --max_attempts 3 --requests_per_minute 60 --retry_failed …
# Paths are relative to the repository. DRY_RUN=1 prints the commands. The key is read from the environment only.
# Exit code 3: everything is written, but some requests brought no answer; the same command asks them again.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- knobs ------------------------------------------------------------------------------------------------------
GENERATOR="${GENERATOR:-api}"                      # api | embedded
INPUT_FILE="${INPUT_FILE:-data/train-unified-feedback/own_sample.jsonl}"
OUTPUT_FILE="${OUTPUT_FILE:-output/construct/train.jsonl}" # the training file
WORK_DIR="${WORK_DIR:-output/construct}"           # intermediate files; a second run resumes from them
STRATEGY="${STRATEGY:-wrong_answer}"               # wrong_answer | rewrite_rejected | template
BIAS_TYPES="${BIAS_TYPES:-all}"                    # all | length,authority,beauty,…
BIASES_PER_RECORD="${BIASES_PER_RECORD:-2}"
USE_GPTINST="${USE_GPTINST:-0}"                    # 1: also answers to a similar but different question
VERIFY_FILTER="${VERIFY_FILTER:-auto}"             # auto | on | off
LIMIT="${LIMIT:-0}"                                # 0: all records
MAX_BAD_ROWS="${MAX_BAD_ROWS:-0}"                  # more malformed rows than this stop the run
API_MODEL="${API_MODEL:-}"                         # the model's name at the API
API_BASE_URL="${API_BASE_URL:-${OPENAI_BASE_URL:-}}" # empty: the API's own address
JUDGE_MODEL="${JUDGE_MODEL:-}"                     # empty: API_MODEL judges its own texts, with a warning
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-1024}"           # of a written text; of a verdict: JUDGE_MAX_NEW_TOKENS in the environment
CONCURRENCY="${CONCURRENCY:-16}"
# Budget of one launch, over all its steps; answers found in the ledger cost nothing. Empty: no limit.
MAX_REQUESTS="${MAX_REQUESTS:-}"
MAX_TOKENS_BUDGET="${MAX_TOKENS_BUDGET:-}"         # prompt and completion tokens together
MAX_COST="${MAX_COST:-}"                           # needs both prices
PRICE_IN="${PRICE_IN:-}"                           # per million prompt tokens, in any currency
PRICE_OUT="${PRICE_OUT:-}"                         # per million completion tokens
JUDGE_PRICE_IN="${JUDGE_PRICE_IN:-}"               # of JUDGE_MODEL, where that is another model
JUDGE_PRICE_OUT="${JUDGE_PRICE_OUT:-}"
ESTIMATE="${ESTIMATE:-0}"                          # 1: print requests, tokens and cost of each step; ask nothing
# ----------------------------------------------------------------------------------------------------------------

refuse() {
  echo "run_construction.sh: $1" >&2
  exit 2
}

case "$GENERATOR" in
  api | embedded) ;;
  *) refuse "GENERATOR=$GENERATOR is unknown. Allowed: api, embedded" ;;
esac
[[ "$GENERATOR" == api || -z "$JUDGE_MODEL" ]] ||
  refuse "JUDGE_MODEL=$JUDGE_MODEL with GENERATOR=embedded: the embedded server has one model. Leave JUDGE_MODEL empty."

if [[ -z "$JUDGE_MODEL" || "$JUDGE_MODEL" == "$API_MODEL" ]]; then
  JUDGE_PRICE_IN="${JUDGE_PRICE_IN:-$PRICE_IN}" JUDGE_PRICE_OUT="${JUDGE_PRICE_OUT:-$PRICE_OUT}"
fi
# Found out by the last step, it would be too late for what the others have cost.
[[ -z "$MAX_COST" || -z "$PRICE_IN" || (-n "$JUDGE_PRICE_IN" && -n "$JUDGE_PRICE_OUT") ]] ||
  refuse "MAX_COST needs the prices of JUDGE_MODEL=$JUDGE_MODEL too: set JUDGE_PRICE_IN and JUDGE_PRICE_OUT."

# Rules write the template strategy; a model comes in only where one was asked for.
uses_model=1
[[ "$STRATEGY" != template || "$GENERATOR" == embedded || "$USE_GPTINST" == 1 || -n "$JUDGE_MODEL" ]] || uses_model=0

if [[ "$uses_model" == 1 && "$GENERATOR" == api && -z "${OPENAI_API_KEY:-}" && "${DRY_RUN:-0}" != 1 &&
  "$ESTIMATE" != 1 ]]; then
  cat >&2 <<'MESSAGE'
run_construction.sh: there is no API key. Three ways out:
  1. OPENAI_API_KEY=<your key> API_MODEL=<model> bash run_construction.sh
     (a server of your own: add API_BASE_URL=http://localhost:8000/v1 and any non-empty key)
  2. GENERATOR=embedded bash run_construction.sh
     (a 135M-parameter model on this machine: shows that the pipeline works, not good data)
  3. STRATEGY=template bash run_construction.sh
     (cues added by rule, no model: for ablations)
MESSAGE
  exit 2
fi

source scripts/env.sh

inside_server="${CONTRASTRM_EMBEDDED_SERVER:-0}"
# An estimate asks nothing, so it needs the server's model name and not the server.
if [[ "$GENERATOR" == embedded && "$inside_server" != 1 && "$ESTIMATE" != 1 ]]; then
  server=("$PYTHON" -m codes.construct.embedded_server --model_path embedded --work_dir "$WORK_DIR" --)
  # The second start of this script finds the same knobs in the environment, and the environment already made.
  if is_dry_run; then
    print_command "${server[@]}" bash run_construction.sh "$@"
  else
    export SKIP_SETUP=1
    exec "${server[@]}" bash run_construction.sh "$@"
  fi
fi

flags=()
add_flag() { [[ -z "$2" ]] || flags+=("--$1" "$2"); } # none for an empty value
add_knobs() {
  local name
  for name in "$@"; do add_flag "${name,,}" "${!name}"; done
}
add_knobs WORK_DIR MAX_BAD_ROWS CONCURRENCY MAX_REQUESTS MAX_COST
add_flag max_tokens "$MAX_TOKENS_BUDGET"
[[ "$ESTIMATE" != 1 ]] || flags+=(--estimate)
shared_flags=("${flags[@]}")

writer="$API_MODEL" judge="${JUDGE_MODEL:-$API_MODEL}"
if [[ "$GENERATOR" == embedded ]]; then
  # The embedded server puts its own address and model into the environment: nothing may override them.
  writer="" judge=""
  [[ "$ESTIMATE" != 1 ]] || writer=embedded judge=embedded
elif [[ -n "$API_BASE_URL" ]]; then
  # Through the environment: command lines are seen by every user of the machine.
  export OPENAI_BASE_URL="$API_BASE_URL"
fi
flags=()
add_flag api_model "$writer"
add_knobs MAX_NEW_TOKENS PRICE_IN PRICE_OUT
writer_flags=("${flags[@]}")
flags=(--temperature "${JUDGE_TEMPERATURE:-0}")
add_flag api_model "$judge"
add_flag price_in "$JUDGE_PRICE_IN"
add_flag price_out "$JUDGE_PRICE_OUT"
[[ "$uses_model" == 1 ]] || flags+=(--judge none)
judge_flags=("${flags[@]}")

exit_code=0
# The steps of this launch share its budget: each finds what the others have spent under this name.
CONTRASTRM_LAUNCH="$(date +%s).$$"
export CONTRASTRM_LAUNCH

# Args: the module's name, then its flags.
construct() {
  local status=0
  run_step "$PYTHON" -m "codes.construct.$1" "${@:2}" || status=$?
  case "$status" in
    0) ;;
    3) exit_code=3 ;; # rows are missing, the others are written: the later steps can work with them
    *)
      echo "run_construction.sh: $1 failed (exit code $status), the later steps were not run. The error is above;" \
        "the same command continues from $WORK_DIR." >&2
      exit "$status"
      ;;
  esac
}

flags=()
add_knobs INPUT_FILE STRATEGY BIAS_TYPES BIASES_PER_RECORD LIMIT
written="$WORK_DIR/gptout.jsonl"
construct gptout "${flags[@]}" --output_file "$written" "${writer_flags[@]}" "${shared_flags[@]}" "$@"
# Nothing is written in an estimate: the later steps count with the input, and with the answers to come.
expected="$BIASES_PER_RECORD" later=()
[[ "$ESTIMATE" != 1 ]] || written="$INPUT_FILE" later=(--limit "$LIMIT")
if [[ "$USE_GPTINST" == 1 ]]; then
  construct gptinst "$@" --input_file "$written" --output_file "$WORK_DIR/gptinst.jsonl" "${writer_flags[@]}" \
    "${shared_flags[@]}" ${later[@]+"${later[@]}"}
  [[ "$ESTIMATE" == 1 ]] || written="$WORK_DIR/gptinst.jsonl"
  expected=$((expected + 1))
fi
[[ "$ESTIMATE" != 1 ]] || later+=(--expected_negatives "$expected")
construct verify_correctness "$@" --input_file "$written" --output_file "$WORK_DIR/verified.jsonl" \
  --train_file "$OUTPUT_FILE" --verify_filter "$VERIFY_FILTER" "${judge_flags[@]}" "${shared_flags[@]}" \
  ${later[@]+"${later[@]}"}
[[ "$ESTIMATE" != 1 ]] || exit "$exit_code"
construct report --work_dir "$WORK_DIR"
is_dry_run && exit 0
echo "run_construction.sh: the training file is $OUTPUT_FILE, the report $WORK_DIR/construction_report.md"
[[ "$exit_code" == 0 ]] ||
  echo "run_construction.sh: some requests brought no answer ($WORK_DIR/failed.jsonl); the same command asks again." >&2
exit "$exit_code"
