#!/usr/bin/env bash
# Serve a judge with vLLM and return once it answers. The server continues in the background; its log and process id are
# in --log and --log.pid. Stop it with: kill "$(cat judge.log.pid)"
#
#   scripts/serve_judge.sh --model Qwen/Qwen3-30B-A3B-Instruct-2507 --tp 2 --port 8000
set -euo pipefail

model=Qwen/Qwen3-30B-A3B-Instruct-2507
name=
tp=1
port=8000
host=127.0.0.1
wait_s=900
log=judge.log
python=${PYTHON:-python}

usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  echo "  --model M    Hugging Face name or folder          (default $model)"
  echo "  --name N     name under which it is served        (default the model's; reward.judge.model)"
  echo "  --tp N       tensor-parallel size                 (default $tp)"
  echo "  --port P     port                                 (default $port)"
  echo "  --host H     address to listen on                 (default $host)"
  echo "  --wait S     seconds to wait until it answers     (default $wait_s)"
  echo "  --log FILE   log of the server                    (default $log)"
  echo "  --           everything behind goes to 'vllm serve'"
}

while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2; shift 2 ;;
    --name) name=$2; shift 2 ;;
    --tp) tp=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --host) host=$2; shift 2 ;;
    --wait) wait_s=$2; shift 2 ;;
    --log) log=$2; shift 2 ;;
    -h|--help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done

name=${name:-$model} # verdicts are cached by this name: one name, one model

if [ -n "${JUDGE_API_KEY:-}" ]; then
  export VLLM_API_KEY=$JUDGE_API_KEY # by the environment: an argument could be read in the process list
fi

nohup "$python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name "$name" \
  --tensor-parallel-size "$tp" --host "$host" --port "$port" --max-model-len 8192 "$@" >"$log" 2>&1 &
pid=$!
echo "$pid" >"$log.pid"

root=$(cd "$(dirname "$0")/.." && pwd)
end=$((SECONDS + wait_s))
while [ $SECONDS -lt $end ]; do
  if ! kill -0 "$pid" 2>/dev/null; then
    echo "the server ended before it answered; the last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
  if "$python" - "http://$host:$port/health" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=2)  # no proxy reaches this machine
PY
  then
    (cd "$root" && "$python" -m cv_lightning judge --check true --judge.base_url "http://$host:$port/v1" \
      --judge.model "$name") || echo "it answers, but see the line above" >&2
    echo "judge $name ($model) is up at http://$host:$port/v1, process $pid"
    exit 0
  fi
  sleep 2
done
echo "no answer within $wait_s s; see $log. The server (process $pid) is stopped" >&2
kill "$pid"
exit 1
