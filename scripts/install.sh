#!/usr/bin/env bash
# Install everything into .venv (or into the environment that is active) and show what works. Safe to run again.
#
#   bash scripts/install.sh [--force | --check] [--cpu | --gpu] [--no-doctor]
#
# --force      install again although nothing has changed
# --check      change nothing; exit code 1 if there is something to install
# --cpu/--gpu  the stack to install; by default what the machine has
# --no-doctor  leave out the closing table
# PYTHON       the interpreter that makes .venv (3.11 or later)
# CVL_INSTALLER=pip  install by pip; by default uv installs, and pip where uv fails
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The pins stand in pyproject.toml only; scripts/lock.sh resolves them to scripts/locks/.
pin() { sed -n "s/^$1 = .*\"$2==\([0-9.]*\)\".*/\1/p" pyproject.toml; }
TORCH_CPU=$(pin cpu torch)
TORCH_GPU=$(pin gpu-core torch)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
force=0 check=0 stack=auto doctor=1
for argument in "$@"; do
  case $argument in
    --force) force=1 ;;
    --check) check=1 ;;
    --cpu) stack=cpu ;;
    --gpu) stack=gpu ;;
    --no-doctor) doctor=0 ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "install.sh: no option $argument (see --help)" >&2; exit 2 ;;
  esac
done
say() { printf '[install %3ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------------- environment, stack
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or later is needed; name one with PYTHON=/path/to/python3.11 bash scripts/install.sh"
}
source scripts/environment.sh
if [[ -x $environment/bin/python && $environment == "$PWD/.venv" ]] && ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
  [[ $check == 1 ]] || rm -rf "$environment" # an install that was cut off, or a Python without the module that makes it
fi
if [[ ! -x $environment/bin/python ]]; then
  if [[ $check == 1 ]]; then
    say "$environment does not exist yet"
    exit 1
  fi
  made_by=$(find_python)
  say "making $environment with $("$made_by" --version)"
  "$made_by" -m venv "$environment"
fi
python=$environment/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$environment has $("$python" --version); Python 3.11 or later is needed (deactivate it, or remove the folder)"
if [[ $stack == auto ]]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then stack=gpu; else stack=cpu; fi
fi
export TORCH_EXTENSIONS_DIR=$environment/torch_extensions
export PATH=$environment/bin:$PATH

# ------------------------------------------------------------------------------------------------ nothing to do?
stamp=$environment/.cv_lightning_installed
wanted="$stack $PWD $("$python" --version) $(cat pyproject.toml scripts/install.sh scripts/fix_torchvision.py "scripts/locks/$stack.txt" | sha256sum | cut -c1-64)"
if [[ $force == 0 && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  say "$environment is up to date (--force installs again)"
  exit 0
fi
if [[ $check == 1 ]]; then
  say "$environment is not up to date; $stamp should say:"
  echo "$wanted"
  exit 1
fi
rm -f "$stamp"
say "installing the $stack stack into $environment"

# -------------------------------------------------------------------------------------------------------- packages
log=$environment/install.log
: >"$log"
# The locked versions, where they were resolved for; elsewhere, or where pip is capped to others, what the pins allow.
lock=()
if [[ $(uname -sm) == "Linux x86_64" ]] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  lock=(--constraint "scripts/locks/$stack.txt")
fi
# uv installs where it is available, pip where it is not or fails. Their output goes to the log; an error shows its last lines.
uv=
try_install() {
  if [[ -n $uv ]]; then
    # indexes as pip reads them, not those of pyproject.toml
    local options=(--python "$python" --no-progress --no-sources --index-strategy unsafe-best-match)
    [[ -z ${PIP_FIND_LINKS:-} ]] || options+=(--find-links "$PIP_FIND_LINKS")
    [[ $stack != cpu ]] || options+=(--excludes "$environment/unloadable.txt") # where pip installs, they are removed below
    "$uv" pip install "${options[@]}" "${lock[@]}" "$@" >>"$log" 2>&1 && return
    echo "uv did not install $*: pip tries" >>"$log"
  fi
  "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "${lock[@]}" "$@" >>"$log" 2>&1
}
install_or_fail() {
  try_install "$@" && return
  if [[ ${#lock[@]} -gt 0 ]]; then
    say "the locked versions do not fit here: installing what the pins of pyproject.toml allow (details in $log)"
    lock=()
    try_install "$@" && return
  fi
  grep -v 'is ignored: it is\|^Looking in\|already satisfied' "$log" | tail -n 25 >&2
  fail "installing $* failed; the whole output is in $log$(caps)"
}
pip_setting() { "$python" -m pip config get "global.$1" 2>/dev/null | tr '\n' ' ' || true; } # uv does not read pip's settings
caps() { # a cap that a machine puts on pip is the usual reason for a pin that cannot be met
  local found
  found=$("$python" -m pip config list 2>/dev/null | grep -i "constraint" || true)
  if [[ -n ${PIP_CONSTRAINT:-}$found ]]; then echo "; pip is capped on this machine: ${PIP_CONSTRAINT:-$found}"; fi
}

if [[ ${CVL_INSTALLER:-uv} == uv ]] && try_install uv; then
  uv=$environment/bin/uv
  export UV_DEFAULT_INDEX=${PIP_INDEX_URL:-$(pip_setting index-url)}
  export UV_INDEX="${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}"
  [[ -n $UV_DEFAULT_INDEX ]] || unset UV_DEFAULT_INDEX
fi
printf 'torchaudio\ntorchcodec\n' >"$environment/unloadable.txt"
installer=pip
[[ -z $uv ]] || installer=uv
say "tools for packages built here, by $installer"
install_or_fail "setuptools>=77.0.3,<81" wheel ninja "packaging>=24" py-cpuinfo
if [[ $stack == cpu ]]; then
  say "torch $TORCH_CPU, CPU build"
  try_install "torch==$TORCH_CPU+cpu" ||
    try_install "torch==$TORCH_CPU+cpu" --extra-index-url "$TORCH_CPU_INDEX" ||
    install_or_fail "torch==$TORCH_CPU" # systems whose only build is a CPU build name it without +cpu
  core=cpu
else
  say "torch $TORCH_GPU"
  install_or_fail "torch==$TORCH_GPU"
  core=gpu-core
fi
# Both builds look at the torch that is installed; DeepSpeed's operators are built below or when first used.
say "DeepSpeed"
DS_BUILD_OPS=0 install_or_fail --no-build-isolation "$(grep -o 'deepspeed==[0-9.]*' pyproject.toml)"
building=
if [[ $stack == cpu ]]; then # compiles while the rest is downloaded
  say "DeepSpeed's shared-memory operator, built in the background"
  rm -rf "$TORCH_EXTENSIONS_DIR"
  "$python" -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load(verbose=False)" \
    >"$environment/build.log" 2>&1 &
  building=$!
fi
say "everything else (about a minute)"
install_or_fail -e ".[$core,dev]"

# ---------------------------------------------------------------------------------------------------------- fixes
if [[ $stack == cpu ]]; then
  # torchaudio and torchcodec are CUDA builds that do not load beside a CPU torch; nothing here needs sound.
  "$python" -m pip uninstall --disable-pip-version-check -y torchaudio torchcodec >>"$log" 2>&1
  "$python" scripts/fix_torchvision.py
  if ! wait "$building"; then
    rm -rf "$TORCH_EXTENSIONS_DIR"
    say "the operator could not be built (is g++ installed? see $environment/build.log); ZeRO on several CPU ranks falls back to gloo or builds it later"
  fi
else
  say "flash-attn, if a wheel fits"
  if ! try_install --no-build-isolation --only-binary flash-attn "flash-attn>=2.8.3"; then
    say "no flash-attn wheel for this torch: PyTorch's own varlen_attn is used (doctor names the kernel)"
    say "(to compile flash-attn: pip install --no-build-isolation flash-attn; takes an hour and a CUDA toolkit)"
  fi
fi

if [[ $doctor == 1 ]]; then
  say "what works here:"
  "$python" -m cv_lightning doctor || fail "training could not work here; the lines above say what is missing"
fi
echo "$wanted" >"$stamp"
say "done; activate with: source $environment/bin/activate"
