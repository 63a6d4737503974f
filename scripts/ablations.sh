#!/usr/bin/env bash
# The effect of parts of reward and recipe, on handwritten digits: 10 arms x 3 seeds, hours on a CPU.
#
#   bash scripts/ablations.sh [--seeds 0 1 2] [--arms full no_process ...] [--iterations N] [--per-kind N] [--out FOLDER]
#       [--no-tests] [--smoke] [--table]
#
# --iterations N  iterations of RL (default 100, as in the quickstart)
# --per_kind N    held-out scenes of each kind (default the quickstart's 602 in all)
# --no_tests      train only: the table then has the figures of the last training iterations
# --table         only write the table of the finished arms
#
# Finished stages are kept and the others run; seeds may run side by side in separate processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
  case $argument in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
done

source scripts/environment.sh
exec "$environment/bin/python" -m cv_lightning ablations "$@"
