"""A warm, sealed process that executes plans: checked operations on pixels, never model code.

It serves one plan after another, because nothing of a snippet is evaluated in it that could stay behind. A plan that
cannot be executed is answered `not_plan`, and a fresh child runs the snippet.
"""

from __future__ import annotations

import os
import socket

from cv_lightning.sandbox import plan
from cv_lightning.sandbox.child import load_input, unpack_job, write_error, write_result
from cv_lightning.sandbox.plan_rules import NotPlannable
from cv_lightning.sandbox.wire import JOB, KIND_NOT_PLAN

DONE = b"d"


def serve(control: socket.socket) -> None:
    """Answer plans until the fork server hangs up."""
    while True:
        packet, fds, _, _ = socket.recv_fds(control, JOB.size, 2)
        if len(fds) != 2:
            return
        try:
            _answer(packet, fds[0], fds[1])
        finally:
            # Closed before the answer: whoever reads the result is then its only holder.
            for fd in fds:
                os.close(fd)
        control.send(DONE)


def _answer(packet: bytes, input_fd: int, output_fd: int) -> None:
    job = unpack_job(packet, input_fd, memory_mb=0)
    prepared = plan.prepare(job.code, (job.width, job.height))
    try:
        if prepared is None:
            raise NotPlannable("not a plan here")
        result, trace = plan.execute(prepared, load_input(input_fd, job.width, job.height))
        write_result(output_fd, result, trace)
    except (NotPlannable, *plan.FAILURES) as error:
        write_error(output_fd, KIND_NOT_PLAN, f"{type(error).__name__}: {error}")
