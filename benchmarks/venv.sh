# shellcheck shell=bash
# Sourced by the setup_*.sh scripts here: an environment of its own for a peer, so that nothing of it can change ours.

# Args: the environment's folder, its requirements file, the constraints (one text), what must be importable, its name in messages.
# A finished environment is left as it is; a changed pin installs again.
make_venv() {
  local venv="$1" requirements="$2" constraints="$3" import="$4" name="$5"
  local stamp="$venv/.contrastrm-requirements" log="$venv/setup.log" wanted
  wanted="$(cat "$requirements" - <<<"$constraints" | cksum)"

  if [[ -x "$venv/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    say "$venv is ready"
    return
  fi
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$PYTHON is missing or older than 3.11. Name another one: PYTHON=/path/to/python3"
    return 1
  fi
  "$PYTHON" -m venv --clear "$venv"
  printf '%s\n' "$constraints" >"$venv/constraints.txt"
  say "installing into $venv (a few minutes; log: $log)"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$venv/constraints.txt" \
    -r "$requirements" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    say "failed; the end of $log is above. Check the connection to your package index (pip config list) and the disk space."
    return 1
  fi
  "$venv/bin/python" -c "$import" >>"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    say "$name was installed but cannot be imported; the end of $log is above."
    return 1
  }
  printf '%s\n' "$wanted" >"$stamp"
  say "done"
}

say() { printf '[%s] %s\n' "$(basename -- "$0" .sh)" "$*" >&2; }
