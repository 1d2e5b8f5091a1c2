#!/bin/sh
# The image's one entry point, for Docker and Apptainer, under any user id and a read-only root.
#
#   run                    the embedded main job: critics at N=0 and N=2, compared
#   run COMMAND ARGS...    python -m job.COMMAND ARGS...
set -eu

package=/opt/venv/lib/python3.11/site-packages/job
configs=/opt/critic/configs
scratch=${TMPDIR:-/tmp}

commands=
for file in "$package"/[a-z]*.py "$package"/*/__main__.py; do
  name=${file#"$package"/}
  name=${name%/__main__.py}
  commands="$commands ${name%.py}"
done

# Apptainer hands the caller's environment on, and a path of the host's Python has no place here.
unset PYTHONPATH PYTHONHOME
# A user id that the image does not know has no name, and its home may be no folder to write to.
export USER="${USER:-$(id -u)}"
if [ ! -w "${HOME:-/}" ]; then
  HOME=$scratch/critic-home-$(id -u)
  mkdir -p "$HOME" || { echo "error: no folder to write to: neither HOME nor $scratch" >&2; exit 78; }
  export HOME
fi
export MPLCONFIGDIR="$HOME/.config/matplotlib"

python() { exec /opt/venv/bin/python -m "$@"; }

if [ $# -eq 0 ]; then
  [ -w . ] || cd "$(mktemp -d "$scratch/critic-run-XXXXXX")"
  echo "the embedded main job; its runs go to $PWD/runs"
  python job.compare --config $configs/critic/critic_local.yaml --unfreeze 0 2 \
    --override model.recipe=$configs/pretrain/arithmetic.yaml
fi

case " $commands " in
*" $1 "*)
  command=$1
  shift
  python "job.$command" "$@"
  ;;
esac
echo "error: no command '$1'; there are:$commands (and without one: the embedded main job)" >&2
exit 78
