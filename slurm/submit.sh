#!/usr/bin/env bash
# Submits a job after its recipe has been checked here, so that a mistake is found before it has waited in the queue. Write
# it in place of `sbatch`, with the same arguments, from the root of the repository:
#
#   slurm/submit.sh --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/run_sequence.sh RECIPE [--set A.B=C ...]
#
# It is `python -m pipeline check` for as many ranks as the options say, with the memory of the GPUs if GPU_MEMORY is set in
# slurm/site.env, and then `sbatch`. Where something is wrong nothing is submitted, and the exit code is 2.
set -euo pipefail
shopt -s inherit_errexit

script=slurm/submit.sh job_script=slurm/run_sequence.sh
if [ ! -f "$script" ]; then
    echo "error: there is no $script in $PWD; call it from the root of the repository." >&2
    exit 2
fi
# shellcheck source=slurm/site.sh
. slurm/site.sh

options=() arguments=() verb=run prepare=0 given=("$@")
while [ $# -gt 0 ] && [ "${1#./}" != "$job_script" ] && [ "$1" != "$PWD/$job_script" ]; do
    case $1 in
        --help | -h) sed -n '/^# Submits/,/^# slurm/ s/^# \{0,1\}//p' "$script" && exit ;;
    esac
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail "expected sbatch's options, then $job_script and a recipe; see $script --help."
shift
while [ $# -gt 0 ]; do
    case $1 in
        --chain | --submit) fail "$1 submits by itself; call $job_script $1 without $script." ;;
        --prepare) prepare=1 ;;
        --train | --evaluate) verb=${1#--} ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
[ -z "${SLURM_JOB_ID:-}" ] || fail "$script submits a job; call it outside a job."
command -v sbatch >/dev/null || fail "there is no sbatch here; without Slurm: python -m pipeline run RECIPE."

load_site
choose_python
check_first "${arguments[@]}"
exec sbatch "${given[@]}"
