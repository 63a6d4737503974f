# Sourced by the sbatch files: one torchrun on each node, which starts a rank for each of its GPUs.

run_on() { # run_on "NODES" VERB ARGUMENTS...: the ranks of these nodes run one verb together
  local nodes
  read -ra nodes <<<"$1"
  shift
  local gpus=${SLURM_GPUS_ON_NODE:-8}
  local environment=${VIRTUAL_ENV:-$PWD/.venv}
  # torchrun ends all ranks when one ends, and starts them again; `--ckpt_path auto` then goes on from the last checkpoint.
  srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 --nodelist "$(IFS=,; echo "${nodes[*]}")" \
    --kill-on-bad-exit=1 "$environment/bin/python" -m torch.distributed.run \
    --nnodes "${#nodes[@]}" --nproc-per-node "$gpus" --max-restarts "${CVL_RESTARTS:-2}" \
    --rdzv-id "${SLURM_JOB_ID:-0}" --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:29500" \
    -m cv_lightning "$@" --trainer.devices "$gpus" --trainer.num_nodes "${#nodes[@]}"
}
