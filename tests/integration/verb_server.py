"""Runs `cv-lightning` commands in children of one process that has imported the libraries, so that each starts at once.

    verb_server.py SOCKET

`bin_folder` writes a `cv-lightning` that asks such a server; a shell finds it on its PATH. A command has the working
folder, environment, arguments and streams of its caller, and its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(8) or b"1"))
"""


@contextmanager
def bin_folder(folder: Path) -> Iterator[Path]:
    """A folder with a `cv-lightning` that runs in a server of its own.

    Args:
        folder: A short path: the server's socket lies in it.
    """
    address, program = folder / "s", folder / "bin" / "cv-lightning"
    program.parent.mkdir()
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address)])
    try:
        end = time.monotonic() + 600
        while not address.exists():
            assert server.poll() is None and time.monotonic() < end, "the server of commands did not start"
            time.sleep(0.05)
        yield program.parent
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Import what commands need, then answer until the process is ended."""
    sys.path = [entry for entry in sys.path if entry and Path(entry) != Path(__file__).parent]
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    import vllm.entrypoints.llm  # noqa: F401

    import cv_lightning.cli
    import cv_lightning.commands.chat
    import cv_lightning.engines.vllm  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:  # waits for the command, so that the server can take the next one
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command in a child, and send its exit code."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code % 256).encode())
        return
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["cv-lightning", *request["argv"]]
    code = 1
    try:
        _run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run() -> None:
    from cv_lightning.__main__ import run
    from cv_lightning.environment import prepare_environment

    prepare_environment()  # what a module does when it is imported, which was before
    run()


if __name__ == "__main__":
    serve(sys.argv[1])
