# shellcheck shell=bash
# The environment of every launcher, and the way in which they run commands. Sourced, never executed:
#
#   source scripts/env.sh && python -m codes.train.train_reward_model --help
#
# Reads requirements.txt (tested ranges), requirements-test.txt (with SETUP_TESTS=1) and constraints.txt (exact
# versions). Uses the active Python when it satisfies the ranges, so that a GPU node keeps its own torch; else
# creates .venv with the exact versions. Exports PYTHON, PYTHONPATH and PATH.
#
#   PYTHON=python3.12   the Python to look at first, and to build .venv with
#   SKIP_SETUP=1        check and install nothing
#   DRY_RUN=1           print the commands; check, install and run nothing

# What another launcher left in this shell must not change what ours start: they say everything themselves.
unset WORLD_SIZE RANK LOCAL_RANK MPLBACKEND "${!ACCELERATE_@}" "${!FSDP_@}" "${!PET_@}"

CONTRASTRM_ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$CONTRASTRM_ROOT/.venv"
STAMP="$VENV/.contrastrm-requirements"
SETUP_LOG="$VENV/setup.log"
CONSTRAINTS="$CONTRASTRM_ROOT/constraints.txt"
STEP_PID=""
STEP_SIGNAL=""
EXIT_STOPPED=75 # asked to stop, and stopped with everything saved (codes/common/cli.py)
RANKS_FILE=""
STOP_ASKED_AT=""
REMINDER_PID=""

say() { printf '[setup] %s\n' "$*" >&2; }

is_dry_run() { [[ "${DRY_RUN:-0}" == 1 ]]; }

# One command as one shell-quoted line that can be pasted, without the secrets that an address in it may hold.
print_command() {
  local line
  printf -v line '%q ' "$@"
  sed -E -e 's#(://)[^/@ ]*@#\1...@#g' -e 's#(\?|\&)([a-z_-]*(token|key|secret|sig|pass)[a-z_-]*=)[^& \]*#\1\2...#Ig' \
    <<<"${line% }"
}

# For a launcher with one command: become that command, so that signals reach it and its exit code is ours.
exec_command() {
  if is_dry_run; then
    print_command "$@"
    exit 0
  fi
  exec "$@"
}

forward_signal() {
  STEP_SIGNAL="$1"
  [[ -z "$STEP_PID" ]] || kill -s "$1" -- "-$STEP_PID" 2>/dev/null || true
}

# For a launcher with several commands: run one and return its exit code. bash delays a signal until a foreground
# command ends, so the command runs in the background, in a process group of its own (set -m: also the only way in
# which a background command still sees Ctrl-C), and the signal is passed on to that group exactly once.
run_step() {
  if is_dry_run; then
    print_command "$@"
    return 0
  fi
  local status=0 name
  for name in INT TERM HUP USR1; do
    # shellcheck disable=SC2064  # the name is meant to be expanded now
    trap "forward_signal $name" "$name"
  done
  set -m
  "$@" </dev/null &
  STEP_PID=$!
  set +m
  while true; do
    status=0
    wait "$STEP_PID" || status=$?
    kill -0 "$STEP_PID" 2>/dev/null || break # still there: the wait was cut short by a signal
  done
  STEP_PID=""
  trap - INT TERM HUP USR1
  if ((status == EXIT_STOPPED)); then
    printf '%s: stopped as asked, with a checkpoint\n' "$(basename -- "$0")" >&2
    exit "$status"
  fi
  if [[ -n "$STEP_SIGNAL" ]]; then
    printf '%s: stopped by SIG%s\n' "$(basename -- "$0")" "$STEP_SIGNAL" >&2
    exit $((128 + $(kill -l "$STEP_SIGNAL")))
  fi
  return "$status"
}

# The lines of RANKS_FILE are "rank PID", written when a process is ready for signals, and "exit CODE".
told_by_ranks() { awk -v what="$1" '$1 == what { print $2 }' "$RANKS_FILE" 2>/dev/null || true; }

# Ask the processes, not their launcher, and go on asking: some may not be ready for signals yet. A process takes a
# repeated SIGUSR1 as one request.
remind_ranks() {
  local pid
  while true; do
    for pid in $(told_by_ranks rank); do kill -s USR1 "$pid" 2>/dev/null || true; done
    sleep 1
  done
}

# The first request asks for a checkpoint; SIGTERM later than the echoes of the first one ends everything.
stop_ranks() {
  local pid
  if [[ -z "$STOP_ASKED_AT" ]]; then
    STOP_ASKED_AT=$SECONDS
    remind_ranks &
    REMINDER_PID=$!
  elif [[ "$1" == TERM ]] && ((SECONDS - STOP_ASKED_AT >= 2)); then
    STEP_SIGNAL=TERM
    # Each process leads a session of its own. The launcher ends on Ctrl-C, with those that have not named themselves.
    for pid in $(told_by_ranks rank); do kill -s KILL -- "-$pid" 2>/dev/null || true; done
    kill -s INT -- "-$STEP_PID" 2>/dev/null || true
  fi
}

# For a launcher whose one command starts several processes (accelerate launch): run it to its end and exit with the code
# that its processes name in a file, because it reports every failure as 1. SIGTERM and SIGUSR1 become a request to the
# processes: the launcher itself would give them 30 s after a SIGTERM, and die alone of a SIGUSR1. It is told to
# ignore both, because a scheduler signals every process of a job.
run_ranks() {
  if is_dry_run; then
    print_command "$@"
    exit 0
  fi
  local status=0 told name
  if ! { RANKS_FILE="$(mktemp)" && echo "launcher $$" >"$RANKS_FILE"; }; then
    echo "$(basename -- "$0"): no temporary file can be made in ${TMPDIR:-/tmp}: free some space, or set TMPDIR to a folder with more" >&2
    rm -f "$RANKS_FILE"
    exit 2
  fi
  for name in TERM USR1; do
    # shellcheck disable=SC2064  # the name is meant to be expanded now
    trap "stop_ranks $name" "$name"
  done
  for name in INT HUP; do
    # shellcheck disable=SC2064
    trap "forward_signal $name" "$name"
  done
  set -m
  (
    trap '' TERM USR1
    export CONTRASTRM_RANKS_FILE="$RANKS_FILE" PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
    exec "$@"
  ) </dev/null &
  STEP_PID=$!
  set +m
  while true; do
    status=0
    wait "$STEP_PID" || status=$?
    kill -0 "$STEP_PID" 2>/dev/null || break # still there: the wait was cut short by a signal
  done
  trap '' INT TERM HUP USR1
  [[ -z "$REMINDER_PID" ]] || { kill "$REMINDER_PID" && wait "$REMINDER_PID"; } 2>/dev/null || true
  told="$(told_by_ranks exit | head -n 1)"
  rm -f "$RANKS_FILE"
  if [[ -n "$STEP_SIGNAL" ]]; then
    printf '%s: stopped by SIG%s\n' "$(basename -- "$0")" "$STEP_SIGNAL" >&2
    exit $((128 + $(kill -l "$STEP_SIGNAL")))
  elif [[ -n "$told" ]]; then
    exit "$told"
  elif ((status != 0)); then
    printf '%s: a process of the run died (exit code %s of the launcher, its account is above). %s\n' \
      "$(basename -- "$0")" "$status" "RESUME=auto continues from the newest checkpoint, or from the start without one" >&2
  fi
  exit "$status"
}

count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    # An empty list or -1 hides all GPUs.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk 'NF == 0 || $1 ~ /^-/ { exit } { n++ } END { print n + 0 }'
  elif command -v nvidia-smi >/dev/null; then
    { nvidia-smi -L 2>/dev/null || true; } | awk '/^GPU / { n++ } END { print n + 0 }'
  else
    echo 0
  fi
}

# Args: the number of visible GPUs, how many processes there are where NUM_PROCESSES is empty.
count_processes() {
  local processes="${NUM_PROCESSES:-$2}"
  if [[ ! "$processes" =~ ^[1-9][0-9]*$ ]]; then
    echo "$(basename -- "$0"): NUM_PROCESSES=$processes must be a whole number of at least 1" >&2
    return 2
  fi
  if (($1 > 0 && processes > $1)); then
    echo "$(basename -- "$0"): NUM_PROCESSES=$processes, but only $1 GPU(s) are visible. Lower it or leave it empty." >&2
    return 2
  fi
  printf '%s\n' "$processes"
}

# For an evaluation: become one process, or one for each visible GPU. Args: -m, a module, its flags.
exec_on_processes() {
  local gpus processes wanted=1 launch=("$PYTHON")
  gpus="$(count_gpus)"
  # A device that was named is one device.
  if [[ "${DEVICE:-auto}" == auto ]] && ((gpus > 0)); then wanted="$gpus"; fi
  processes="$(count_processes "$gpus" "$wanted")" || exit
  if ((processes > 1)); then
    # --multi_gpu means one process per rank, without a GPU too.
    launch=(accelerate launch --config_file "$CONTRASTRM_ROOT/configs/accelerate.yaml" --multi_gpu)
    launch+=(--num_processes "$processes" --num_machines 1 --main_process_port 0)
    launch+=(--mixed_precision no --dynamo_backend no)
    ((gpus > 0)) || launch=(env ACCELERATE_USE_CPU=true "${launch[@]}")
  fi
  exec_command "${launch[@]}" "$@"
}

# A line of constraints.txt as a requirement: `constraint_of torch` prints torch==2.13.0.
constraint_of() { grep -E "^$1==" "$CONSTRAINTS"; }

requirements_hash() {
  "$1" -c 'import hashlib, pathlib, sys
print(hashlib.sha256(b"\0".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest())' \
    "$CONTRASTRM_ROOT/requirements.txt" "$CONTRASTRM_ROOT/requirements-test.txt" "$CONSTRAINTS"
}

satisfies() { "$1" "$CONTRASTRM_ROOT/scripts/check_environment.py" "${@:2}"; }

venv_is_current() { [[ -x "$VENV/bin/python" && "$(cat "$STAMP" 2>/dev/null)" == "$1" ]]; }

pip_install() {
  say "$1"
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$CONSTRAINTS" "${@:2}" \
    >>"$SETUP_LOG" 2>&1; then
    tail -n 20 "$SETUP_LOG" >&2
    say "failed: $1. The end of $SETUP_LOG is above. Check the connection to your package index (pip config list)"
    say "and the free disk space, then run the same command again; finished packages are kept."
    return 1
  fi
}

# Args: the Python to build with, the hash to stamp. Caller holds the lock.
install_venv() {
  local without_deepspeed="$VENV/requirements-without-deepspeed.txt"
  venv_is_current "$2" && return 0 # another process has just installed it
  if ! "$VENV/bin/python" -c '' 2>/dev/null; then
    say "creating .venv with $1"
    if ! "$1" -m venv --clear "$VENV"; then
      say "could not create $VENV. On Debian and Ubuntu: apt-get install python3-venv. Or set PYTHON to another Python."
      return 1
    fi
  fi
  if ! satisfies "$VENV/bin/python" --quiet "$CONSTRAINTS"; then
    say "installing into .venv, once, in 3 steps (a few minutes; log: $SETUP_LOG)"
    cat "$CONTRASTRM_ROOT/requirements.txt" "$CONTRASTRM_ROOT/requirements-test.txt" | grep -v '^deepspeed' \
      >"$without_deepspeed" || return 1
    # torch comes first because deepspeed imports it while it is built.
    pip_install "1/3 torch" "$(constraint_of torch)" || return 1
    pip_install "2/3 the other packages" -r "$without_deepspeed" || return 1
    DS_BUILD_OPS=0 pip_install "3/3 deepspeed" --no-build-isolation "$(constraint_of deepspeed)" || return 1
    satisfies "$VENV/bin/python" "$CONSTRAINTS" || return 1
    say "done"
  fi
  printf '%s\n' "$2" >"$STAMP.new" && mv -f "$STAMP.new" "$STAMP"
}

# The subshell holds the lock: two launchers that start at the same time install once.
install_venv_locked() (
  if command -v flock >/dev/null; then
    exec 9>"$CONTRASTRM_ROOT/.venv.lock"
    flock -n 9 || { say "another process is installing .venv: waiting for it" && flock 9; }
  fi
  install_venv "$@"
)

# Make a Python the one that `python`, `accelerate`, `ruff` … mean.
use_python() {
  PYTHON="$1"
  PATH="$("$1" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
  export PYTHON PATH
}

setup_environment() {
  local python="${PYTHON:-python3}" wanted hash
  export PYTHONPATH="$CONTRASTRM_ROOT${PYTHONPATH:+:$PYTHONPATH}"
  if is_dry_run; then
    PYTHON="$python"
    return 0
  fi
  if [[ "${SKIP_SETUP:-0}" == 1 ]]; then
    [[ -n "${PYTHON:-}${VIRTUAL_ENV:-}" || ! -e "$STAMP" ]] || python="$VENV/bin/python"
  fi
  if ! command -v "$python" >/dev/null; then
    say "$python was not found. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3"
    return 1
  fi
  if [[ "${SKIP_SETUP:-0}" == 1 ]]; then
    use_python "$python"
    return 0
  fi
  wanted=("$CONTRASTRM_ROOT/requirements.txt")
  [[ "${SETUP_TESTS:-0}" != 1 ]] || wanted+=("$CONTRASTRM_ROOT/requirements-test.txt")
  if satisfies "$python" --quiet "${wanted[@]}"; then
    use_python "$python"
    return 0
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$("$python" --version) is too old. Name a Python 3.11 or newer: PYTHON=/path/to/python3"
    return 1
  fi
  hash="$(requirements_hash "$python")" || return 1
  if ! venv_is_current "$hash"; then
    satisfies "$python" --brief "${wanted[@]}" || true # says why the active Python is not used
    if [[ $- == *i* ]]; then install_venv_locked "$python" "$hash"; else run_step install_venv_locked "$python" "$hash"; fi ||
      return 1
  fi
  use_python "$VENV/bin/python"
}

setup_environment
