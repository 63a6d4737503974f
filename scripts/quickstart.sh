#!/usr/bin/env bash
# From nothing to a model that learned to use the tool: install, a tiny Qwen-VL, SFT, GRPO, tests on held-out digits, a report.
#
#   bash scripts/quickstart.sh [--task T] [--seed N] [--smoke] [--ablation] [--model M] [--ranks N] [--out FOLDER] [--force]
#
# --task T      digits (default): read rotated and small numbers; measure: answer with what the model's code prints
# --seed N      another model, other scenes, other samples (default 0)
# --smoke       every stage once, small: about three minutes, no learning claimed
# --ablation    train once more with the accuracy and format reward only, shown beside the first; with --task measure
#               with a tool that returns images and no text
# --model M     qwen3_vl (default) or qwen2_5_vl
# --ranks N     N processes under ZeRO-3, an engine in each (default 1)
# --out FOLDER  default runs/quickstart-seedN, with --smoke runs/quickstart-smoke
# --force       start from scratch; without it finished stages are kept and the others run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
  case $argument in -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
done

bash scripts/install.sh
source scripts/environment.sh
exec "$environment/bin/python" -m cv_lightning quickstart "$@"
