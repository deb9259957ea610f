#!/usr/bin/env bash
# Train a reward model:  a preference file -> OUTPUT_DIR
#
#   bash run_training.sh                     contrastive, on the embedded base model
#   MODE=pairwise bash run_training.sh       the pairwise baseline
#
# Edit a line of the block or prefix the environment. Further flags go to codes.train.train_reward_model: docs/training.md lists
# them, `python -m codes.train.train_reward_model --help` too.
# Paths are relative to the repository. DRY_RUN=1 prints the command.
# All visible GPUs are used (choose them with CUDA_VISIBLE_DEVICES); without a GPU it runs on the CPU.
# SIGTERM or SIGUSR1: a checkpoint after the running step, exit code 75; RESUME=auto goes on. SIGTERM again stops at once.
#
# The published recipe (arXiv 2603.08091), on one node of 8 GPUs; every other knob has the recipe's value already:
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct TRAIN_FILE=output/construct/train.jsonl GRADIENT_CHECKPOINTING=1 bash run_training.sh
# and its pairwise ablation (hinge with margin 1):
#   MODE=pairwise MODEL_PATH=Qwen/Qwen2.5-7B-Instruct TRAIN_FILE=output/construct/train.jsonl GRADIENT_CHECKPOINTING=1 \
#     bash run_training.sh
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- knobs ------------------------------------------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-embedded}"               # embedded | a folder | a hub id
# file.jsonl | file.parquet | a folder | hub:org/name[/config][@revision][:split], each with [:weight], commas between; or mix.json
TRAIN_FILE="${TRAIN_FILE:-data/train/own_train.jsonl}"
MODE="${MODE:-contrastive}"                        # contrastive | pairwise
OUTPUT_DIR="${OUTPUT_DIR:-output/$MODE}"
NEGATIVES="${NEGATIVES:-all}"                      # all | original (without the bias-injected ones)
MAX_REJECTED="${MAX_REJECTED:-0}"                  # rejected answers of a group, drawn anew each epoch; 0: all
TEMPERATURE="${TEMPERATURE:-0.5}"                  # of the contrastive loss
MARGIN="${MARGIN:-1.0}"                            # of the pairwise loss
LEARNING_RATE="${LEARNING_RATE:-5e-6}"
WARMUP_STEPS="${WARMUP_STEPS:-100}"
EPOCHS="${EPOCHS:-2}"
MAX_STEPS="${MAX_STEPS:-0}"                        # 0: what EPOCHS gives
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-64}"       # groups in a step, over all processes
SEED="${SEED:-42}"
LORA_RANK="${LORA_RANK:-0}"                        # 0: train all weights
CHAT_TEMPLATE="${CHAT_TEMPLATE:-}"                # a Jinja file | chatml: for a tokenizer without template; empty: its own
MAX_LENGTH="${MAX_LENGTH:-1024}"                   # tokens of a conversation
OVERLENGTH="${OVERLENGTH:-drop}"                   # drop | left | keep_end | error
LIMIT="${LIMIT:-0}"                                # 0: all records (of each source)
MAX_BAD_ROWS="${MAX_BAD_ROWS:-0}"
CACHE_DIR="${CACHE_DIR:-output/cache}"             # of tokenised data
ESTIMATE="${ESTIMATE:-0}"                          # 1: report on the data, train nothing
MAX_TOKENS_PER_BATCH="${MAX_TOKENS_PER_BATCH:-0}" # computed tokens in a forward pass of one process; 0: automatic
PACKING="${PACKING:-auto}"                         # auto | shared | packed | off (padded rows)
PRECISION="${PRECISION:-auto}"                     # auto | bf16 | fp16 | fp32
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-0}"
SAVE_STEPS="${SAVE_STEPS:-0}"                      # 0: only at the end
SAVE_MINUTES="${SAVE_MINUTES:-0}"                  # a checkpoint at least this often; 0: not by time
RESUME="${RESUME:-none}"                           # none | auto | a checkpoint folder
# Seen while training (README: "See what is learned")
HELD_OUT_SHARE="${HELD_OUT_SHARE:-auto}"           # of the training questions; auto: 5 %, at most 1000, none below 10; 0: none
EVAL_STEPS="${EVAL_STEPS:-auto}"                   # steps between evaluations; auto: 5 a run; 0: only at the end
METRIC_FOR_BEST="${METRIC_FOR_BEST:-constrained_accuracy}" # accuracy x (1 - BSR); none: no best checkpoint
LOAD_BEST_AT_END="${LOAD_BEST_AT_END:-0}"          # 1: OUTPUT_DIR gets the best weights instead of the last
REPORT_TO="${REPORT_TO:-tensorboard}"              # tensorboard,wandb,swanlab | none
# Processes and machines
NUM_PROCESSES="${NUM_PROCESSES:-}"                 # on this machine; empty: one for each visible GPU
NUM_MACHINES="${NUM_MACHINES:-1}"                  # the same command runs on each, with the same number of processes
MACHINE_RANK="${MACHINE_RANK:-0}"                  # 0, 1, ... of this machine
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-}"             # of machine 0; needed for several machines
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-0}"        # 0: a free one; several machines: a free one of machine 0
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-configs/ds_z3_config.json}" # none: plain data parallelism (DDP)
# ----------------------------------------------------------------------------------------------------------------

# What the module gets: --model_path "$MODEL_PATH" and so on.
flags=()
for knob in MODEL_PATH TRAIN_FILE MODE OUTPUT_DIR NEGATIVES MAX_REJECTED TEMPERATURE MARGIN LEARNING_RATE WARMUP_STEPS EPOCHS \
  MAX_STEPS GLOBAL_BATCH_SIZE SEED LORA_RANK CHAT_TEMPLATE MAX_LENGTH OVERLENGTH LIMIT MAX_BAD_ROWS CACHE_DIR ESTIMATE \
  MAX_TOKENS_PER_BATCH PACKING PRECISION GRADIENT_CHECKPOINTING SAVE_STEPS SAVE_MINUTES RESUME HELD_OUT_SHARE EVAL_STEPS \
  METRIC_FOR_BEST LOAD_BEST_AT_END REPORT_TO; do
  flags+=("--${knob,,}" "${!knob}")
done

source scripts/env.sh

gpus="$(count_gpus)"
processes="$(count_processes "$gpus" "$((gpus > 0 ? gpus : 1))")" || exit
if [[ ! "$NUM_MACHINES" =~ ^[1-9][0-9]*$ ]]; then
  echo "run_training.sh: NUM_MACHINES=$NUM_MACHINES must be a whole number of at least 1" >&2
  exit 2
fi
if [[ ! "$MACHINE_RANK" =~ ^[0-9]+$ ]] || ((MACHINE_RANK >= NUM_MACHINES)); then
  echo "run_training.sh: MACHINE_RANK=$MACHINE_RANK must be one of 0 to $((NUM_MACHINES - 1)) (NUM_MACHINES=$NUM_MACHINES)" >&2
  exit 2
fi
if ((NUM_MACHINES > 1)) && [[ -z "$MAIN_PROCESS_IP" || "$MAIN_PROCESS_PORT" == 0 ]]; then
  echo "run_training.sh: NUM_MACHINES=$NUM_MACHINES needs MAIN_PROCESS_IP and MAIN_PROCESS_PORT: the address and a free port" >&2
  echo "of machine 0, the same on every machine" >&2
  exit 2
fi

module=(-m codes.train.train_reward_model)
on_ranks=(accelerate launch --config_file configs/accelerate.yaml
  --num_processes "$((processes * NUM_MACHINES))" --num_machines "$NUM_MACHINES"
  --main_process_port "$MAIN_PROCESS_PORT" --mixed_precision no --dynamo_backend no)
if ((NUM_MACHINES > 1)); then
  on_ranks+=(--machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP")
fi
run=run_ranks
if ((processes * NUM_MACHINES == 1)) && { ((gpus == 0)) || [[ "$DEEPSPEED_CONFIG" == none ]]; }; then
  start=("$PYTHON" "${module[@]}")
  run=exec_command
elif [[ "$DEEPSPEED_CONFIG" == none ]]; then
  # --multi_gpu means one process per rank. Without a GPU the ranks find each other only when told to use the CPU;
  # accelerate's own --cpu would start one process.
  start=("${on_ranks[@]}" --multi_gpu "${module[@]}")
  ((gpus > 0)) || start=(env ACCELERATE_USE_CPU=true "${start[@]}")
else
  if [[ ! -f "$DEEPSPEED_CONFIG" ]]; then
    echo "run_training.sh: DEEPSPEED_CONFIG=$DEEPSPEED_CONFIG does not exist. Name a file, or none for plain DDP." >&2
    exit 2
  fi
  # "standard": every machine starts its own processes; DeepSpeed's other ways log in from machine 0 to the rest.
  start=("${on_ranks[@]}" --use_deepspeed --deepspeed_config_file "$DEEPSPEED_CONFIG"
    --deepspeed_multinode_launcher standard "${module[@]}")
  # DeepSpeed looks for an accelerator by itself and may find the wrong one on a machine without a GPU.
  ((gpus > 0)) || start=(env DS_ACCELERATOR=cpu "${start[@]}")
fi

"$run" "${start[@]}" "${flags[@]}" "$@"
