#!/usr/bin/env bash
#SBATCH --job-name=prepare
#SBATCH --ntasks=1
#SBATCH --output=%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#
# A recipe's data prepared by many jobs at once; call it on the login node, from the root of the repository:
#
#   slurm/prepare_array.sh --tasks 100 RECIPE [--set A.B=C ...]
#
#   --tasks N   tasks of each of the two arrays (10)
#   --dry-run   print what would be submitted
#
# It submits four jobs, each waiting for the one before: an array that writes the shards, one that puts the index beside
# them, an array that computes the CLIP keys, one that puts everything together and verifies it. Every shard is whole or
# not there, and what is there is kept: after a failure the same call goes on. Options for sbatch are PREPARE_OPTIONS,
# and KEYS_OPTIONS for the keys, in slurm/site.env.
set -euo pipefail
shopt -s inherit_errexit

script=slurm/prepare_array.sh
cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [ ! -f "$script" ]; then
    echo "error: there is no $script in $PWD; call it from the root of the repository." >&2
    exit 2
fi
# shellcheck source=slurm/site.sh
. slurm/site.sh

# Submit a job for one step after the job `previous`; sets `job`.
submit() {
    local what=$1 previous=$2 options=${PREPARE_OPTIONS:-}
    shift 2
    [ "$what" != keys ] || options=${KEYS_OPTIONS:-$options}
    submit_step prepare "$what" afterok "$previous" "$options" "--tasks=$tasks" "$@"
}

submit_all() {
    # Read here, so that a mistake in the recipe is not found by a hundred tasks in the queue.
    [ "$dry_run" = 1 ] || "${login_python[@]}" slurm/stages.py "${arguments[@]}" >/dev/null || {
        echo "error: the recipe cannot be read (see above); nothing was submitted." >&2
        exit 2
    }
    submit shards '' "--array=1-$tasks"
    submit join "$job"
    submit keys "$job" "--array=1-$tasks"
    submit together "$job"
}

in_job() {
    local command
    case $step in
        shards | keys) command=(data_prep "$step" "${arguments[@]}" --share "$SLURM_ARRAY_TASK_ID/$tasks") ;;
        join) command=(data_prep join "${arguments[@]}") ;;
        together) command=(pipeline prepare "${arguments[@]}") ;;
        *) fail "--step is '$step'; expected shards, join, keys or together." ;;
    esac
    choose_one_task
    print_or_run "${one_task[@]}" "${command[@]}"
}

tasks=10 step='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) sed -n '/^# A recipe/,/^# and KEYS/ s/^# \{0,1\}//p' "$script" && exit ;;
        --dry-run) dry_run=1 ;;
        --tasks | --step)
            [ $# -ge 2 ] || fail "$1 needs a value."
            if [ "$1" = --tasks ]; then tasks=$2; else step=$2; fi
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
for one in "${arguments[@]}"; do
    case $one in
        --skip-bad | --skip-bad=* | data.skip_bad=*) fail "several processes together cannot leave bad records out" \
            "($one); prepare this recipe in one job: python -m pipeline prepare RECIPE --skip-bad N." ;;
    esac
done
[ "${#arguments[@]}" -gt 0 ] || fail "expected a recipe; see $script --help."
[[ $tasks =~ ^[1-9][0-9]*$ ]] || fail "--tasks is '$tasks'; expected a number from 1."

step_or_submit "$step" prepare
