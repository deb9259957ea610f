#!/usr/bin/env bash
# Train a reward model:  a preference file -> OUTPUT_DIR
#
#   bash run_training.sh                     contrastive, on the embedded base model
#   MODE=pairwise bash run_training.sh       the pairwise baseline
#
# Edit a line of the block or prefix the environment. Further flags go to codes.train.train_reward_model.
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
TEMPERATURE="${TEMPERATURE:-0.5}"                  # of the contrastive loss
MARGIN="${MARGIN:-1.0}"                            # of the pairwise loss
LEARNING_RATE="${LEARNING_RATE:-5e-6}"
WEIGHT_DECAY="${WEIGHT_DECAY:-0.01}"
WARMUP_STEPS="${WARMUP_STEPS:-100}"
EPOCHS="${EPOCHS:-2}"
MAX_STEPS="${MAX_STEPS:-0}"                        # 0: what EPOCHS gives
CHAT_TEMPLATE="${CHAT_TEMPLATE:-}"                # a Jinja file | chatml: for a tokenizer without template; empty: its own
MAX_LENGTH="${MAX_LENGTH:-1024}"                   # tokens of a conversation
OVERLENGTH="${OVERLENGTH:-drop}"                   # drop | left | keep_end | error
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-64}"       # groups in a step, over all processes
MAX_TOKENS_PER_BATCH="${MAX_TOKENS_PER_BATCH:-0}" # computed tokens in a forward pass of one process; 0: automatic
MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-0}"          # most groups in a forward pass; 0: the token budget alone
PACKING="${PACKING:-auto}"                         # auto | shared | packed | off (padded rows)
MAX_GRAD_NORM="${MAX_GRAD_NORM:-1.0}"
PRECISION="${PRECISION:-auto}"                     # auto | bf16 | fp16 | fp32
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-0}"
SEED="${SEED:-42}"
SAVE_STEPS="${SAVE_STEPS:-0}"                      # 0: only at the end
SAVE_MINUTES="${SAVE_MINUTES:-0}"                  # a checkpoint at least this often; 0: not by time
KEEP_CHECKPOINTS="${KEEP_CHECKPOINTS:-2}"
RESUME="${RESUME:-none}"                           # none | auto | a checkpoint folder
LOGGING_STEPS="${LOGGING_STEPS:-1}"
LIMIT="${LIMIT:-0}"                                # 0: all records (of each source)
MAX_BAD_ROWS="${MAX_BAD_ROWS:-0}"
# Data: what an epoch sees of it, where its tokens are kept, and what is checked.
MAX_REJECTED="${MAX_REJECTED:-0}"                  # rejected answers of a group, drawn anew each epoch; 0: all
CACHE_DIR="${CACHE_DIR:-output/cache}"
ESTIMATE="${ESTIMATE:-0}"                          # 1: report on the data, train nothing
CONTAMINATION_FILES="${CONTAMINATION_FILES:-data/eval/*.jsonl,data/eval/public/*.jsonl,data/eval/reward_bench/*.jsonl}"
FAIL_ON_CONTAMINATION="${FAIL_ON_CONTAMINATION:-0}" # 1: stop where a training question stands in one of them
# The objective beyond MODE, TEMPERATURE and MARGIN.
PAIRWISE_LOSS="${PAIRWISE_LOSS:-hinge}"            # hinge | bradley_terry
BIAS_WEIGHTS="${BIAS_WEIGHTS:-}"                   # of rejected answers, e.g. length=2,original=0.5
BIAS_MARGINS="${BIAS_MARGINS:-}"                   # added to their margin, e.g. length=0.5
ROW_MARGINS="${ROW_MARGINS:-use}"                  # use | ignore the records' own
CENTERING="${CENTERING:-0.0}"                      # coefficient that pulls scores towards 0
LABEL_SMOOTHING="${LABEL_SMOOTHING:-0.0}"
# Model and adapter
LORA_RANK="${LORA_RANK:-0}"                        # 0: train all weights
LORA_ALPHA="${LORA_ALPHA:-32}"
LORA_DROPOUT="${LORA_DROPOUT:-0}"
LORA_TARGET_MODULES="${LORA_TARGET_MODULES:-all-linear}" # all-linear | q_proj,v_proj
MERGE_LORA="${MERGE_LORA:-1}"                      # 0: save the adapter alone
REWARD_STATS_GROUPS="${REWARD_STATS_GROUPS:-256}"  # training groups that give reward_mean and reward_std
ATTN_IMPLEMENTATION="${ATTN_IMPLEMENTATION:-auto}" # auto | sdpa | eager | flash_attention_2
# Seen while training (README: "See what is learned")
HELD_OUT_SHARE="${HELD_OUT_SHARE:-auto}"           # of the training questions; auto: 5 %, at most 1000, none below 10; 0: none
EVAL_FILE="${EVAL_FILE:-}"                         # held-out preference records instead of a split
BIAS_EVAL_DIR="${BIAS_EVAL_DIR:-}"                 # <bias>_bias.jsonl files instead of the held-out injected answers
EVAL_STEPS="${EVAL_STEPS:-auto}"                   # steps between evaluations; auto: 5 a run; 0: only at the end
EVAL_ON_START="${EVAL_ON_START:-0}"                # 1: evaluate the untrained model too
METRIC_FOR_BEST="${METRIC_FOR_BEST:-constrained_accuracy}" # accuracy x (1 - BSR); none: no best checkpoint
LOAD_BEST_AT_END="${LOAD_BEST_AT_END:-0}"          # 1: OUTPUT_DIR gets the best weights instead of the last
EARLY_STOPPING_PATIENCE="${EARLY_STOPPING_PATIENCE:-0}" # evaluations without a better one; 0: never stop
REPORT_TO="${REPORT_TO:-tensorboard}"              # tensorboard,wandb,swanlab | none
# Processes and machines
NUM_PROCESSES="${NUM_PROCESSES:-}"                 # on this machine; empty: one for each visible GPU
NUM_MACHINES="${NUM_MACHINES:-1}"                  # the same command runs on each, with the same number of processes
MACHINE_RANK="${MACHINE_RANK:-0}"                  # 0, 1, ... of this machine
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-}"             # of machine 0; needed for several machines
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG:-configs/ds_z3_config.json}" # none: plain data parallelism (DDP)
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-0}"        # 0: a free one; several machines: a free one of machine 0
# ----------------------------------------------------------------------------------------------------------------

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

"$run" "${start[@]}" \
  --model_path "$MODEL_PATH" --train_file "$TRAIN_FILE" --output_dir "$OUTPUT_DIR" \
  --mode "$MODE" --negatives "$NEGATIVES" --temperature "$TEMPERATURE" --margin "$MARGIN" \
  --learning_rate "$LEARNING_RATE" --weight_decay "$WEIGHT_DECAY" --warmup_steps "$WARMUP_STEPS" \
  --epochs "$EPOCHS" --max_steps "$MAX_STEPS" --max_length "$MAX_LENGTH" --overlength "$OVERLENGTH" \
  --chat_template "$CHAT_TEMPLATE" \
  --global_batch_size "$GLOBAL_BATCH_SIZE" --micro_batch_size "$MICRO_BATCH_SIZE" \
  --max_tokens_per_batch "$MAX_TOKENS_PER_BATCH" --packing "$PACKING" --max_grad_norm "$MAX_GRAD_NORM" \
  --precision "$PRECISION" --gradient_checkpointing "$GRADIENT_CHECKPOINTING" --seed "$SEED" \
  --save_minutes "$SAVE_MINUTES" \
  --held_out_share "$HELD_OUT_SHARE" --eval_file "$EVAL_FILE" --bias_eval_dir "$BIAS_EVAL_DIR" \
  --eval_steps "$EVAL_STEPS" --eval_on_start "$EVAL_ON_START" --metric_for_best "$METRIC_FOR_BEST" \
  --load_best_at_end "$LOAD_BEST_AT_END" --early_stopping_patience "$EARLY_STOPPING_PATIENCE" --report_to "$REPORT_TO" \
  --save_steps "$SAVE_STEPS" --keep_checkpoints "$KEEP_CHECKPOINTS" --resume "$RESUME" \
  --max_rejected "$MAX_REJECTED" --cache_dir "$CACHE_DIR" --estimate "$ESTIMATE" \
  --contamination_files "$CONTAMINATION_FILES" --fail_on_contamination "$FAIL_ON_CONTAMINATION" \
  --pairwise_loss "$PAIRWISE_LOSS" --bias_weights "$BIAS_WEIGHTS" \
  --bias_margins "$BIAS_MARGINS" --row_margins "$ROW_MARGINS" --centering "$CENTERING" \
  --label_smoothing "$LABEL_SMOOTHING" \
  --logging_steps "$LOGGING_STEPS" --limit "$LIMIT" --max_bad_rows "$MAX_BAD_ROWS" \
  --lora_rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" \
  --lora_target_modules "$LORA_TARGET_MODULES" --merge_lora "$MERGE_LORA" \
  --reward_stats_groups "$REWARD_STATS_GROUPS" --attn_implementation "$ATTN_IMPLEMENTATION" "$@"
