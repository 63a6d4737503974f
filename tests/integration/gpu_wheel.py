"""What `engine/vllm.py` relies on, looked up in vLLM's source by syntax tree: nothing of it is imported or run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


class Source:
    """Files of a vLLM package: a wheel, or an installed one; `changed` replaces the text of files."""

    def __init__(self, path: Path, changed: Mapping[str, Callable[[str], str]] | None = None) -> None:
        self.path, self.changed = path, changed or {}
        self._trees: dict[str, ast.Module] = {}

    @cached_property
    def _wheel(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def text(self, name: str) -> str:
        folder = self.path.is_dir()
        found = (self.path / name).read_text() if folder else self._wheel.read(f"vllm/{name}").decode()
        return self.changed.get(name, lambda text: text)(found)

    def tree(self, name: str) -> ast.Module:
        if name not in self._trees:
            self._trees[name] = ast.parse(self.text(name))
        return self._trees[name]

    def named(self, file: str, name: str) -> ast.AST:
        """A class or function by its dotted name within a file."""
        node: ast.AST = self.tree(file)
        for part in name.split("."):
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            node = next(n for n in ast.walk(node) if isinstance(n, kinds) and n.name == part)
        return node

    def code(self, file: str, name: str) -> str:
        return ast.unparse(self.named(file, name))

    def fields(self, file: str, name: str) -> dict[str, str]:
        """Annotated fields of a class and their defaults as written."""
        node = self.named(file, name)
        assert isinstance(node, ast.ClassDef)
        annotated = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return {n.target.id: ast.unparse(n.value) if n.value else "" for n in annotated}  # type: ignore[union-attr]

    def arguments(self, file: str, name: str) -> list[str]:
        node = self.named(file, name)
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]

    def attributes(self, file: str, name: str) -> dict[str, str]:
        """What methods of a class assign to `self`, as written; of several assignments the last."""
        found: dict[str, str] = {}
        for node in ast.walk(self.named(file, name)):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" and node.value is not None:  # type: ignore[attr-defined]
                    found[target.attr] = ast.unparse(node.value)  # type: ignore[attr-defined]
        return found


# ------------------------------------------------------------------------------------------------ the wheel
def pinned_version() -> str:
    """Version of the GPU build that pyproject.toml pins."""
    found = re.search(r'"vllm==([\d.]+)"', PYPROJECT.read_text())
    assert found
    return found[1]


def wheel_folder() -> Path:
    """Where downloaded wheels are kept between runs: CVL_WHEELS, by default in the user's cache."""
    return Path(os.environ.get("CVL_WHEELS") or Path.home() / ".cache/cv_lightning/wheels")


def download_wheel(timeout_s: float = 600) -> Path | str:
    """The pinned wheel without its dependencies, from the cache or the index; a text says why there is none."""
    folder, version = wheel_folder(), pinned_version()
    if found := sorted(folder.glob(f"vllm-{version}-*x86_64.whl")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", str(folder), "-q"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"vllm {version} was not downloaded within {timeout_s:g} s"
    found = sorted(folder.glob(f"vllm-{version}-*x86_64.whl"))
    return found[0] if found else f"vllm {version} cannot be downloaded here: {done.stderr.strip()[-300:]}"


# ------------------------------------------------------------------------------------------------ the contract
LLM, ENGINE, CORE, CLIENT = (
    "entrypoints/llm.py",
    "v1/engine/llm_engine.py",
    "v1/engine/core.py",
    "v1/engine/core_client.py",
)
WORKER, SAMPLING, SLEEP = "v1/worker/gpu_worker.py", "sampling_params.py", "device_allocator/sleep_mode_backend.py"
RUNNERS = ("v1/worker/gpu/model_runner.py", "v1/worker/gpu_model_runner.py")
"""Version 2 of the model runner, and version 1."""
MODELS = {
    "model_executor/models/qwen3_vl.py": "Qwen3VLForConditionalGeneration",
    "model_executor/models/qwen2_5_vl.py": "Qwen2_5_VLForConditionalGeneration",
}
METHODS = {
    (LLM, "LLM.sleep"): ["level"],
    (LLM, "LLM.wake_up"): ["tags"],
    (LLM, "LLM.collective_rpc"): ["method", "args"],
    (LLM, "LLM.reset_prefix_cache"): [],
    (LLM, "LLM.get_tokenizer"): [],
    (ENGINE, "LLMEngine.add_request"): ["request_id", "prompt", "params"],
    (ENGINE, "LLMEngine.step"): [],
    (ENGINE, "LLMEngine.has_unfinished_requests"): [],
    (ENGINE, "LLMEngine.abort_request"): ["request_ids"],
    (ENGINE, "LLMEngine.reset_encoder_cache"): [],
    (CLIENT, "InprocClient.shutdown"): [],
    (CORE, "EngineCore.step_with_batch_queue"): [],
    ("renderers/base.py", "BaseRenderer.render_cmpl"): ["prompts"],
    ("inputs/engine.py", "tokens_input"): ["prompt_token_ids"],
    ("inputs/engine.py", "mm_input"): ["prompt_token_ids", "mm_kwargs", "mm_hashes", "mm_placeholders"],
    ("device_allocator/cumem.py", "CuMemAllocator.get_current_usage"): [],
    (WORKER, "Worker.reload_weights"): [],
    **{(file, f"GPUModelRunner.{name}"): wanted for file in RUNNERS
       for name, wanted in (("get_model", []), ("reload_weights", ["weights_iterator"]))},
}  # fmt: skip
"""Methods that are called, with the arguments that they are given."""
DEFAULTS = {
    (SAMPLING, "SamplingParams"): {
        "n": "1", "top_k": "0", "min_p": "0.0", "presence_penalty": "0.0", "frequency_penalty": "0.0",
        "repetition_penalty": "1.0", "min_tokens": "0", "ignore_eos": "False", "logit_bias": "None",
        "bad_words": "None", "allowed_token_ids": "None", "max_tokens": "16", "temperature": "1.0", "top_p": "1.0",
        "seed": "None", "stop_token_ids": "None", "logprobs": "None", "flat_logprobs": "False", "detokenize": "True",
    },
    ("config/model.py", "ModelConfig"): {"enable_sleep_mode": "False", "sleep_mode_offload_cudagraph": "False"},
    ("config/scheduler.py", "SchedulerConfig"): {"async_scheduling": "None"},
    ("config/parallel.py", "ParallelConfig"): {"data_parallel_size": "1, ge=1"},
}  # fmt: skip
"""Fields with the defaults that hold where nothing is passed: other ones would change the sampled distribution."""
ATTRIBUTES = {
    (LLM, "LLM"): ["llm_engine", "renderer", "model_config"],
    (ENGINE, "LLMEngine"): ["engine_core", "vllm_config"],
    (CLIENT, "InprocClient"): ["engine_core"],
    (CORE, "EngineCore"): ["batch_queue"],
}
FIELDS = {
    ("outputs.py", "CompletionOutput"): ["token_ids", "logprobs", "finish_reason"],
    ("logprobs.py", "FlatLogprobs"): ["logprobs"],
    ("inputs/llm.py", "TokensPrompt"): ["prompt_token_ids"],
    ("multimodal/inputs.py", "MultiModalFieldElem"): ["data", "field"],
    ("multimodal/inputs.py", "PlaceholderRange"): ["offset", "length"],
    ("inputs/llm.py", "_PromptOptions"): ["multi_modal_data", "multi_modal_uuids"],
}
UNIPROC = "v1/executor/uniproc_executor.py"
CODE = {
    "model runner V2 is the default": ("config/vllm.py", "VllmConfig.use_v2_model_runner", "return True"),
    "VLLM_USE_V2_MODEL_RUNNER chooses the model runner": (
        "config/vllm.py",
        "use_v2_model_runner",
        "envs.VLLM_USE_V2_MODEL_RUNNER",
    ),
    "an executor of one process schedules asynchronously": (
        UNIPROC,
        "UniProcExecutor.supports_async_scheduling",
        "return True",
    ),
    "a rank of an external launcher takes the GPU LOCAL_RANK": (
        UNIPROC,
        "ExecutorWithExternalLauncher._distributed_args",
        "int(os.environ['LOCAL_RANK'])",
    ),
    "a single process takes the first GPU": (UNIPROC, "UniProcExecutor._distributed_args", "else 0"),
    "level 1 copies the weights": (
        SLEEP,
        "CuMemBackend.suspend",
        "if level == 1:\n        offload_tags = ('weights', *offload_tags)",
    ),
    "CUDA graphs are copied at every level": (SLEEP, "CuMemBackend.suspend", "'cudagraph'"),
    "level 2 saves named buffers": (WORKER, "Worker.sleep", "model.named_buffers()"),
    "waking restores them with the weights": (WORKER, "Worker.wake_up", "buffer.data.copy_"),
    "weights are in a pool of that tag": (WORKER, "Worker.load_model", "tag='weights'"),
    "one engine a process holds the pool": (
        WORKER,
        "Worker._maybe_get_memory_pool_context",
        "get_current_usage() == 0",
    ),
    "building sets torch's threads": (WORKER, "Worker.load_model", "set_torch_threads_for_runtime()"),
    "shutting down destroys the default process group": (
        "distributed/parallel_state.py",
        "destroy_distributed_environment",
        "torch.distributed.destroy_process_group()",
    ),
    "an engine core does so": (CORE, "EngineCore.shutdown", "cleanup_dist_env_and_memory()"),
    "a prefix cache that is in use is kept, and reported": (
        "v1/core/block_pool.py",
        "BlockPool.reset_prefix_cache",
        "return False",
    ),
    "a batch may be in flight without requests": (CORE, "EngineCore.step_with_batch_queue", "batch_queue.appendleft"),
    "rendered prompts are taken as they are": (
        "v1/engine/input_processor.py",
        "InputProcessor.process_inputs",
        "'type' in prompt",
    ),
}
"""What is relied on, and the statement in the source that shows it."""
UNNAMED_BUFFERS = {"deepstack_input_embeds"}
"""Tensors in plain attributes of the models, lost at sleep level 2; the engine clears these after waking."""


def problems(source: Source, arguments: set[str]) -> list[str]:
    """Everything in which a vLLM differs from what the engine relies on.

    Args:
        source: Of vLLM.
        arguments: Names of the arguments that `vllm.LLM` is given.
    """
    checks = (_arguments(source, arguments), _methods(source), _members(source), _code(source), _models(source))
    return [line for check in checks for line in check]


def _arguments(source: Source, given: set[str]) -> Iterator[str]:
    known = {*source.fields("engine/arg_utils.py", "EngineArgs"), *source.arguments(LLM, "LLM.__init__")}
    yield from (f"vllm.LLM: no argument {name}" for name in sorted(given - known))


def _methods(source: Source) -> Iterator[str]:
    for (file, name), wanted in METHODS.items():
        try:
            found = source.arguments(file, name)
        except (StopIteration, KeyError, FileNotFoundError):
            yield f"{file}: no {name}"
            continue
        yield from (f"{file}: {name} has no argument {argument}" for argument in wanted if argument not in found)
    first = source.arguments(ENGINE, "LLMEngine.add_request")[:3]
    if first != ["request_id", "prompt", "params"]:
        yield f"{ENGINE}: add_request begins with {first}"


def _members(source: Source) -> Iterator[str]:
    for (file, name), wanted in DEFAULTS.items():
        found = source.fields(file, name)
        for field, default in wanted.items():
            if found.get(field, "absent").removeprefix("Field(default=").removesuffix(")") != default:
                yield f"{file}: {name}.{field} is {found.get(field, 'absent')}, not {default}"
    for table, look in ((ATTRIBUTES, source.attributes), (FIELDS, source.fields)):
        for (file, name), members in table.items():
            try:
                there = look(file, name)
            except (StopIteration, KeyError, FileNotFoundError):
                yield f"{file}: no {name}"
                continue
            yield from (f"{file}: {name} has no {member}" for member in members if member not in there)
    if "FINAL_ONLY" not in source.code(SAMPLING, "RequestOutputKind"):
        yield f"{SAMPLING}: no RequestOutputKind.FINAL_ONLY"


def _code(source: Source) -> Iterator[str]:
    for meaning, (file, name, statement) in CODE.items():
        try:
            found = source.code(file, name)
        except (StopIteration, KeyError, FileNotFoundError):
            yield f"{file}: no {name} ({meaning})"
            continue
        if re.sub(r"\s+", " ", statement) not in re.sub(r"\s+", " ", found):
            yield f"{file}: {name} does not say {statement!r} ({meaning})"
    chosen = re.search(r"async_scheduling is None:.*?else:\s+self\.scheduler_config\.async_scheduling = True",
                       ast.unparse(source.tree("config/vllm.py")), re.DOTALL)  # fmt: skip
    if not chosen:
        yield "config/vllm.py: async scheduling is not on by default"


def _models(source: Source) -> Iterator[str]:
    for file, name in MODELS.items():
        body = source.code(file, name)
        yield from (
            f"{file}: {name} has no {part}"
            for part in ("packed_modules_mapping", "hf_to_vllm_mapper")
            if part not in body
        )
        for node in source.tree(file).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for attribute, value in source.attributes(file, node.name).items():
                made = re.search(r"torch\.(zeros|empty|ones|full|arange|tensor|randn)\(", value)
                if made and "nn.Parameter" not in value and attribute not in UNNAMED_BUFFERS:
                    yield f"{file}: {node.name}.{attribute} is a tensor that sleep level 2 loses"
