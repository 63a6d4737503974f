"""scripts/serve_judge.sh, with a small server instead of vLLM: it waits, checks, and reports failures."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = sys.argv[1:]
print("served with", arguments, "key", "VLLM_API_KEY" in os.environ, flush=True)
if "--die" in arguments:
    sys.exit("no such model")
time.sleep(1 if "--never" not in arguments else 600)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(b"{}")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = "1" if "four" in asked["messages"][0]["content"] else "0"
        self.reply(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""

PYTHON = """#!/bin/sh
if [ "$1" = -m ] && [ "$2" = vllm.entrypoints.openai.api_server ]; then
  shift 2
  exec {python} {server} "$@"
fi
exec {python} "$@"
"""


@pytest.fixture
def serve(tmp_path: Path) -> list[str]:
    """The command, with a Python that starts the small server instead of vLLM's."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable, server=tmp_path / "server.py"))
    (tmp_path / "python").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["bash", str(ROOT / "scripts/serve_judge.sh"), "--port", str(port), "--log", str(tmp_path / "judge.log")]


def run(command: list[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(folder / "python"), "JUDGE_API_KEY": "sk-very-secret"}
    whole = [*command, *arguments]
    return subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_script_returns_when_the_judge_is_ready(serve: list[str], tmp_path: Path) -> None:
    ran = run(serve, tmp_path, "--model", "some/model", "--tp", "2", "--", "--max-num-seqs", "7")
    try:
        assert ran.returncode == 0, ran.stderr
        assert "some/model at http://127.0.0.1" in ran.stdout and "judges" in ran.stdout
        log = (tmp_path / "judge.log").read_text()
        assert "'--served-model-name', 'some/model', '--tensor-parallel-size', '2'" in log
        assert "'--max-num-seqs', '7'" in log
        assert "key True" in log
        assert "sk-very-secret" not in log + ran.stdout + ran.stderr
    finally:
        os.kill(int((tmp_path / "judge.log.pid").read_text()), signal.SIGKILL)


def test_a_server_that_exits_is_reported(serve: list[str], tmp_path: Path) -> None:
    ran = run(serve, tmp_path, "--", "--die")
    assert ran.returncode == 1
    assert "no such model" in ran.stderr


def test_a_server_that_never_answers_is_stopped(serve: list[str], tmp_path: Path) -> None:
    ran = run(serve, tmp_path, "--wait", "3", "--", "--never")
    assert ran.returncode == 1
    assert "no answer within 3 s" in ran.stderr
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "judge.log.pid").read_text()), 0)
            subprocess.run(["sleep", "0.05"], check=True)
