"""What the sbatch files start, on a cluster whose commands only write down how they were called."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >> calls
case $* in *serve_judge*) touch judge-7.log.up; exec sleep 30 ;; esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text("#!/bin/bash\nprintf '%s\\n' node0 node1 node2\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


def calls(cluster: Path, script: str, **environment: str) -> list[str]:
    given = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_NODELIST": "node[0-2]", "SLURM_JOB_ID": "7"}
    given |= {"SLURM_GPUS_ON_NODE": "8", "PATH": f"{cluster}/bin:{os.environ['PATH']}"} | environment
    command = ["bash", str(ROOT / "scripts/slurm" / script), "--config", "grpo.yaml"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return (cluster / "calls").read_text().splitlines()


def test_sft_job_uses_every_node(cluster: Path) -> None:
    python = cluster / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    (training,) = calls(cluster, "sft.sbatch", VIRTUAL_ENV=str(cluster / "env"))
    assert "--nodelist node0,node1,node2 " in training and f"{python} -m torch.distributed.run" in training
    assert "--shutdown-timeout 290" in training, "30 s by default, in which no iteration ends"
    assert "--nnodes 3 --nproc-per-node 8" in training and "--rdzv-endpoint node0:29500" in training
    assert training.endswith(
        "-m cv_lightning fit --ckpt_path auto --config grpo.yaml --trainer.devices 8 --trainer.num_nodes 3"
    )


def test_grpo_job_runs_the_judge_on_the_last_node(cluster: Path) -> None:
    judge, training = calls(cluster, "grpo.sbatch", CVL_JUDGE_MODEL="some/judge")
    assert "--nodelist node2 " in judge and "--model 'some/judge' --tp 8 --host 0.0.0.0" in judge
    assert "--nodelist node0,node1 " in training and "--nnodes 2" in training
    assert "reward.judge.base_url http://node2:8000/v1" in training
    assert "reward.judge.model some/judge" in training
    assert training.endswith("--trainer.devices 8 --trainer.num_nodes 2")
    assert not (cluster / "judge-7.log.up").exists(), "a later job must wait for its own"


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty for a process that is not reaped yet
    return False


@pytest.mark.parametrize(("of_step", "code"), [(0, 0), (1, 143), (143, 143), (75, 75)])
def test_signalled_job_saves_a_checkpoint_before_the_judge_stops(cluster: Path, of_step: int, code: int) -> None:
    """srun hands SIGTERM on to its tasks; here it is the task, which takes a second to save its checkpoint."""
    (cluster / "bin/srun").write_text(
        """#!/bin/bash
case $* in *serve_judge*)
  trap 'echo judge >> killed; exit' TERM; echo $$ > judge.pid; touch judge-7.log.up; while :; do sleep 0.1; done ;;
esac
trap 'sleep 1; [[ -e killed ]] || echo saved >> calls; exit CODE' TERM
touch started
while :; do sleep 0.1; done
""".replace("CODE", str(of_step))
    )
    given = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7"}
    command = ["bash", str(ROOT / "scripts/slurm/grpo.sbatch"), "--config", "grpo.yaml"]
    environment = given | {"PATH": f"{cluster}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as job:
        try:
            wait_until(lambda: (cluster / "started").exists() or job.poll() is not None)
            assert job.poll() is None
            job.send_signal(signal.SIGTERM)
            assert job.wait(timeout=30) == code
            judge = (cluster / "judge.pid").read_text().strip()
            wait_until(lambda: not runs(judge))
        finally:
            with contextlib.suppress(ProcessLookupError):  # everything has ended
                os.killpg(job.pid, signal.SIGKILL)
    assert (cluster / "calls").read_text() == "saved\n"
    for script in ("grpo.sbatch", "sft.sbatch"):
        assert "#SBATCH --signal=B:TERM@300\n" in (ROOT / "scripts/slurm" / script).read_text()


def test_grpo_job_without_its_own_judge(cluster: Path) -> None:
    (training,) = calls(cluster, "grpo.sbatch", CVL_JUDGE_NODES="0")
    assert "--nnodes 3" in training and "reward.judge" not in training
