#!/bin/bash

# Parameters
#SBATCH --array=0-3%4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=a100:1
#SBATCH --job-name=depth-20260102-030405
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=100G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/HERE/runs/depth-20260102-030405/slurm/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
export PYTHONPATH=/PROJECT"${PYTHONPATH:+:$PYTHONPATH}"
srun() { local code; until command srun "$@"; do code=$?; case $code in 138 | 140 | 143) ;; *) return $code ;; esac; done; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /HERE/runs/depth-20260102-030405/slurm/%A_%a_%t_log.out --export=ALL --cpus-per-task=8 --cpu-bind=cores --kill-on-bad-exit=0 --wait=0 bash -c 'command -v "$1" >/dev/null || { echo "error: $(hostname) has no $1, the Python that has submitted: install the project on a file system that all nodes see" >&2; exit 78; }; trap "" TERM USR1 USR2; exec "$@"' bash /PYTHON -u -m submitit.core._submit /HERE/runs/depth-20260102-030405/slurm
