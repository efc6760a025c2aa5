# Sourced by the scripts beside it: where the checkout is, which Python runs it, how to speak.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="${FXFUSE_PYTHON:-$venv/bin/python}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

say() { printf 'fxfuse: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# Prints the path of a tool: the one beside the chosen Python, else the one on PATH.
tool() {
  local beside
  beside="$(dirname "$python")/$1"
  if [[ -x "$beside" ]]; then
    printf '%s\n' "$beside"
  else
    command -v "$1"
  fi
}

# Runs a command whose output matters only when it fails.
quietly() {
  local log="$root/build/log.txt"
  mkdir -p "$root/build"
  if ! "$@" >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    return 1
  fi
}
