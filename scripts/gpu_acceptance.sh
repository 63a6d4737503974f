#!/usr/bin/env bash
# The first half hour on a GPU: everything that no CPU can show, each finding with a verdict. Offline, random weights.
#
#   bash scripts/gpu_acceptance.sh [--only SECTION]... [--cpu] [--out FOLDER] [--again] [--list] [--model NAME]
#
# --only SECTION  run this section only (may be repeated): tests, engine, sync, update, zero, quickstart
# --cpu           every section at tiny size on a CPU; what a CPU cannot run is named with the reason, and its control
#                 flow runs against a stand-in engine
# --out FOLDER    results (default runs/gpu_acceptance); parts that are done there are not run again
# --again         run everything again
# --list          name the sections
# --model NAME    published model whose shapes are taken (default Qwen/Qwen3-VL-8B)
#
# Prints a table, writes FOLDER/result.json, continues after a failure; exit code 1 if anything failed. A section takes at
# most eight minutes. It runs from the source tree with whatever torch and transformers the active environment has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
python=$environment/bin/python
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$python" scripts/acceptance/run.py "$@"
