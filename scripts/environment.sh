# Sourced by the other scripts; sets $environment, the environment to install into and run from: the active one (of conda
# any but base, to which 5 GB should not be added), else .venv.
if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
  environment=$VIRTUAL_ENV
elif [[ -n ${CONDA_PREFIX:-} && -x $CONDA_PREFIX/bin/python && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
  environment=$CONDA_PREFIX
else
  environment=$PWD/.venv
fi
