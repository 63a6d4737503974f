# Sourced by the other scripts: which environment is installed into and run from, $environment. The active one (of conda
# any but base, into which nobody wants 5 GB), else .venv.
if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
  environment=$VIRTUAL_ENV
elif [[ -n ${CONDA_PREFIX:-} && -x $CONDA_PREFIX/bin/python && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
  environment=$CONDA_PREFIX
else
  environment=$PWD/.venv
fi
