#!/usr/bin/env bash
# An environment for the tests against a real SGLang server on a CPU: SGLang without its dependencies, over this project's.
#
#   bash scripts/sglang_environment.sh FOLDER
#   CVL_SGLANG_PYTHON=FOLDER/bin/python pytest tests/integration -k sglang --run-slow
#
# It needs 430 MB and changes nothing in the environment below it.
set -euo pipefail
[[ $# == 1 ]] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
below=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$environment/bin/python" -m venv "$1"
own=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$below" >"$own/below.pth"
"$1/bin/python" -m pip install --disable-pip-version-check --no-deps sglang==0.5.23 gguf soundfile
SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=tests/integration/sglang_kernels "$1/bin/python" -W ignore -c 'import sglang.launch_server'
echo "CVL_SGLANG_PYTHON=$1/bin/python pytest tests/integration -k sglang --run-slow"
