#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=a100:1
#SBATCH --job-name=critic-1gpu-n4-20260102-030405
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=4G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/HERE/runs/critic-1gpu-n4-20260102-030405/slurm/%j_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --signal=USR2@20
#SBATCH --time=30

# setup
export PYTHONPATH=/PROJECT"${PYTHONPATH:+:$PYTHONPATH}"
srun() { local code; until command srun "$@"; do code=$?; case $code in 138 | 140 | 143) ;; *) return $code ;; esac; done; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /HERE/runs/critic-1gpu-n4-20260102-030405/slurm/%j_%t_log.out --export=ALL --cpus-per-task=1 --cpu-bind=cores --kill-on-bad-exit=0 --wait=0 bash -c 'command -v "$1" >/dev/null || { echo "error: $(hostname) has no $1, the Python that has submitted: install the project on a file system that all nodes see" >&2; exit 78; }; trap "" TERM USR1 USR2; exec "$@"' bash /PYTHON -u -m submitit.core._submit /HERE/runs/critic-1gpu-n4-20260102-030405/slurm
