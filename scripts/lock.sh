#!/usr/bin/env bash
# Resolve the pins of pyproject.toml to exact versions of everything, for Python 3.11 on Linux, x86-64.
#
#   bash scripts/lock.sh [--check]
#
# Writes scripts/locks/cpu.txt and scripts/locks/gpu.txt, which scripts/install.sh installs. Run it after every change of
# a pin: they move together. Nothing is installed; it takes seconds.
# --check  write nothing; exit code 1 where a lock file is not what the pins resolve to, 3 where no index is reachable
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

check=0
for argument in "$@"; do
  case $argument in
    --check) check=1 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "lock.sh: no option $argument (see --help)" >&2; exit 2 ;;
  esac
done
source scripts/environment.sh
export PATH=$environment/bin:$PATH
command -v uv >/dev/null || { echo "lock.sh: uv is not installed (pip install uv)" >&2; exit 3; }
# The CPU build of torch is not on PyPI.
if [[ -n ${PIP_FIND_LINKS:-} ]]; then
  torch_wheels=(--find-links "$PIP_FIND_LINKS")
else
  torch_wheels=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
code=0
for stack in cpu gpu; do
  lock=scripts/locks/$stack.txt
  options=(--extra dev --no-sources --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet)
  case $stack in
    cpu) options+=(--extra cpu "${torch_wheels[@]}") ;;
    gpu) options+=(--extra gpu-core) ;;
  esac
  [[ $check == 0 ]] || options+=(--constraint "$lock")
  if ! uv pip compile pyproject.toml "${options[@]}" -o "$resolved" >/dev/null 2>"$resolved.err"; then
    cat "$resolved.err" >&2
    if grep -qiE 'dns error|error sending request|connect|timed out|offline' "$resolved.err"; then exit 3; fi
    echo "lock.sh: the pins of the $stack extra do not fit together" >&2
    code=1
  elif [[ $check == 0 ]]; then
    mkdir -p scripts/locks
    cp "$resolved" "$lock"
    echo "$lock: $(wc -l <"$lock") packages"
  elif ! diff "$lock" "$resolved"; then
    echo "lock.sh: $lock is not what pyproject.toml resolves to: run scripts/lock.sh" >&2
    code=1
  fi
  rm -f "$resolved.err"
  : >"$resolved" # an existing output file would be taken as preferences
done
exit $code
