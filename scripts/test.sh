#!/usr/bin/env bash
# Everything that is checked: lint, types, import rules, unit tests, one smoke run, integration tests.
#
#   bash scripts/test.sh [--full] [--no-install]
#
# --full        the slow tests too
# --no-install  use the environment as it is
# TEST_PROCESSES  test processes at a time (2)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

full=0 install=1
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    --no-install) install=0 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "test.sh: no option $argument (see --help)" >&2; exit 2 ;;
  esac
done
if [[ $install == 1 ]]; then
  bash scripts/install.sh || exit 1
fi
source scripts/environment.sh
export PATH=$environment/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of several test processes would only get in each other's way
# A file's tests stay in one process, in order: they share checkpoints and engines. Files start in the order given.
parallel=(--numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
export CVL_SMOKE_RUN=$results/run # the notebooks read what the smoke stage left

stages=0 failed_stages=()
stage() { # stage NAME COMMAND...: run, time, remember; later stages run anyway
  local name=$1 begun=$SECONDS code=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || code=$?
  stages=$((stages + 1))
  timings+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - begun)) "$([[ $code == 0 ]] && echo ok || echo "FAILED ($code)")")")
  [[ $code == 0 ]] || failed_stages+=("$name")
}
timings=()
slow=()
[[ $full == 0 ]] || slow=(--run-slow)

stage "ruff check" ruff check --output-format concise .
stage "ruff format" ruff format --check --output-format concise .
stage "mypy" mypy
stage "import rules" lint-imports --config setup.cfg --no-logo
smoke=tests/integration/test_quickstart.py # the longest file, so it comes first
stage "smoke, unit" pytest "$smoke" tests/unit tests/golden tests/plugins "${parallel[@]}" "${slow[@]}" -q --junitxml "$results/unit.xml"
stage "integration" pytest tests/integration --ignore "$smoke" "${parallel[@]}" "${slow[@]}" -q --junitxml "$results/integration.xml"

printf '\n'
printf '%s\n' "${timings[@]}"
# The closing line counts every test, and each of the other stages as one.
python - "$results" "$stages" "${failed_stages[@]}" <<'COUNT'
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

folder, stages, *failed_stages = sys.argv[1:]
suites = [suite for path in Path(folder).glob("*.xml") for suite in ElementTree.parse(path).iter("testsuite")]
total, bad, skipped = (sum(int(s.get(k, 0)) for s in suites for k in keys) for keys in (("tests",), ("failures", "errors"), ("skipped",)))
pytest_stages = {"smoke, unit", "integration"}
plain_bad = len(set(failed_stages) - pytest_stages)
plain = int(stages) - len(pytest_stages)
if not bad and pytest_stages & set(failed_stages):
    bad = 1  # a test run that ended without saying which test failed
print(f"{total - bad - skipped + plain - plain_bad} passed, {bad + plain_bad} failed, {skipped} skipped")
COUNT
[[ ${#failed_stages[@]} == 0 ]]
