# Sourced by the sbatch files: one torchrun on each node, which starts a rank for each of its GPUs.

run_on() { # run_on "NODES" VERB ARGUMENTS...: the ranks of these nodes run one verb together
  local nodes
  read -ra nodes <<<"$1"
  shift
  local gpus=${SLURM_GPUS_ON_NODE:-8}
  local environment
  source scripts/environment.sh
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take from the job since Slurm 22.05
  fi
  # torchrun ends all ranks when one ends, and starts them again; `--ckpt_path auto` then resumes from the last checkpoint.
  # On SIGTERM it would kill them after 30 s, in which no iteration ends and no checkpoint is written.
  srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 --nodelist "$(IFS=,; echo "${nodes[*]}")" \
    --kill-on-bad-exit=1 "$environment/bin/python" -m torch.distributed.run \
    --nnodes "${#nodes[@]}" --nproc-per-node "$gpus" --max-restarts "${CVL_RESTARTS:-2}" \
    --shutdown-timeout 290 --rdzv-id "${SLURM_JOB_ID:-0}" --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:29500" \
    -m cv_lightning "$@" --trainer.devices "$gpus" --trainer.num_nodes "${#nodes[@]}" &
  # The job's SIGTERM comes to this shell alone (B: in the sbatch file) and goes to the training step alone: the judge is
  # still needed by the iteration that is being finished.
  # A training that was told to end has saved its checkpoint and exits with 143, as `fit` does without torchrun, which
  # makes a 1 of it; 0 is left to a training that has finished. The same job, submitted again, continues.
  local step=$! code=0 told=0
  trap 'told=1; kill -TERM "$step" 2>/dev/null || true' TERM
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do # the wait was interrupted by the signal
    code=0
    wait "$step" || code=$?
  done
  trap - TERM
  ((told && code == 1)) && code=143
  return "$code"
}
