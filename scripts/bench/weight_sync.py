"""Measures a weight sync from ZeRO-3 shards on two ranks into the engine of each, next to what it cannot do without.

    python scripts/bench/weight_sync.py --json FILE

The floor is a bare gather of the same buckets, with nothing done to what is gathered, plus vLLM's bare
`reload_weights` from whole tensors that are in memory already. A sync interleaves the two. A random Qwen3-VL of half a
billion parameters in bfloat16 (memory: about 7 GB for both ranks), and the quickstart's tiny one in float32. Medians of
interleaved rounds; a round takes as long as its slower rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.engines import EngineConfig  # noqa: E402
from cv_lightning.models.adapters.tiny import TinyModelConfig  # noqa: E402
from cv_lightning.models.gather import buckets_of, gather_full_params  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy  # noqa: E402

RANKS = 2
HALF_BILLION = TinyModelConfig(hidden_size=1536, num_layers=20, head_dim=128, num_key_value_heads=12)
MODELS = {"large": (HALF_BILLION, "bfloat16"), "tiny": (TinyModelConfig(), "float32")}
BARS = {"sync_over_floor": 1.5, "sync_tiny_s": 0.5}


def worker(folder: Path, dtype: str, repeats: int, out: Path) -> None:
    """One rank: build engine and sharded policy, time the three in turn; the first rank writes medians to `out`."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from cv_lightning.engines.vllm import VLLMEngine

    deepspeed.init_distributed("gloo")
    sizes = EngineConfig(max_model_len=256, max_num_seqs=4, max_images=1)
    config = PolicyConfig(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    adapter = load_adapter(config)
    engine = VLLMEngine(str(folder), sizes, adapter, dtype=dtype)
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    kept = HfDeepSpeedConfig(zero | {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == "bfloat16"}})
    policy = load_policy(config)
    del kept
    bucket_bytes = int(sizes.sync_bucket_gb * 1e9)
    in_memory = list(_whole(policy, bucket_bytes, folder / "whole.safetensors").items())

    def gather() -> None:
        for bucket in buckets_of(policy, bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for weight in bucket for p in weight.parameters]):
                pass

    def reload() -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(in_memory)})

    def sync() -> None:
        engine.update_weights(adapter.engine_weights(gather_full_params(policy, bucket_bytes)), version=0)

    seconds: dict[str, list[float]] = {"gather": [], "reload": [], "sync": []}
    for _ in range(repeats + 1):
        for name, call in (("gather", gather), ("reload", reload), ("sync", sync)):
            seconds[name].append(_timed(call))
    if torch.distributed.get_rank() == 0:
        medians = {f"{name}_s": statistics.median(values[1:]) for name, values in seconds.items()}
        medians["parameters"] = float(sum(tensor.numel() for _, tensor in in_memory))
        out.write_text(json.dumps(medians))
    torch.distributed.barrier()


def _whole(policy: torch.nn.Module, bucket_bytes: int, file: Path) -> dict[str, torch.Tensor]:
    """All whole tensors, in memory that the ranks share: a file that both have mapped and read once."""
    if torch.distributed.get_rank() == 0:
        save_file({name: tensor.clone() for name, tensor in gather_full_params(policy, bucket_bytes)}, file)
    else:
        for _ in gather_full_params(policy, bucket_bytes):
            pass
    torch.distributed.barrier()
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.sum()
    return tensors


def _timed(call: Callable[[], None]) -> float:
    """Seconds until all ranks are done."""
    torch.distributed.barrier()
    begun = time.perf_counter()
    call()
    torch.distributed.barrier()
    return time.perf_counter() - begun


def measure(repeats: int) -> dict[str, float]:
    """Figures of both models."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for model, (sizes, dtype) in MODELS.items():
            folder, out = Path(name, model), Path(name, f"{model}.json")
            write(TinyCheckpoint(out=folder, model=sizes))
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
            worker_args = ["--worker", str(folder), "--dtype", dtype, "--repeats", str(repeats), "--json", str(out)]
            subprocess.run([*launch, __file__, *worker_args], check=True, timeout=1200)
            figures |= {
                f"{key}" if model == "large" else f"tiny_{key}": v for key, v in json.loads(out.read_text()).items()
            }
    figures["sync_over_floor"] = figures["sync_s"] / (figures["gather_s"] + figures["reload_s"])
    figures["sync_gb_per_s"] = 2 * figures["parameters"] / 1e9 / figures["sync_s"]
    figures["sync_tiny_s"] = figures.pop("tiny_sync_s")
    return figures


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.dtype, options.repeats, options.json)
        return 0
    figures = measure(options.repeats)
    for name, value in figures.items():
        print(f"{name:20} {value:16.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and any(figures[name] > bar for name, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
