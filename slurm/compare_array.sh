#!/usr/bin/env bash
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --kill-on-invalid-dep=yes
#
# Methods compared on a recipe by many jobs at once; call it on the login node, from the root of the repository:
#
#   slurm/compare_array.sh RECIPE --methods A,B --seeds 0,1,2 [--set A.B=C ...]
#
#   --dry-run   print what would be submitted
#
# It submits two jobs: an array with one task per run, each on the GPUs of one node, and one that writes the page of those
# that are done, whether or not others failed. The data has to be prepared. A run that is done is not run again, and one that
# was stopped goes on: after a failure the same call goes on. Options for sbatch are COMPARE_OPTIONS in slurm/site.env.
#
# Exit codes of a task: those of `pipeline compare` (0 done, 1 failed, 2 wrong input, 75 stopped and queued again).
set -euo pipefail
shopt -s inherit_errexit

script=slurm/compare_array.sh
STOPPED=75 # pipeline's: saved, the same command goes on
cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [ ! -f "$script" ]; then
    echo "error: there is no $script in $PWD; call it from the root of the repository." >&2
    exit 2
fi
# shellcheck source=slurm/site.sh
. slurm/site.sh

# Submit a job for one step, after the job `previous` if there is one; sets `job`.
submit() {
    local what=$1 previous=$2
    shift 2
    # afterany: the page is written of what is done, and says which runs are not.
    submit_step compare "$what" afterany "$previous" "${COMPARE_OPTIONS:-}" "--of=$runs" "$@"
}

submit_all() {
    runs=$("${login_python[@]}" -m pipeline compare "${arguments[@]}" --count) || exit $?
    submit runs '' "--array=1-$runs"
    submit page "$job"
}

in_job() {
    local command=(compare "${arguments[@]}") code=0 step_id='' broken_off=1
    case $step in
        runs) command+=(--share "$SLURM_ARRAY_TASK_ID/$runs") ;;
        page) command+=(--only-page) ;;
        *) fail "--step is '$step'; expected runs or page." ;;
    esac
    choose_one_task
    set -- "${one_task[@]}" pipeline "${command[@]}"
    if [ "$dry_run" = 1 ]; then
        print_or_run "$@"
        return
    fi
    # The signal before the time limit reaches this shell alone, which hands it on; the run then saves and ends with 75.
    trap 'broken_off=1; [ -z "$step_id" ] || kill -s TERM "$step_id" 2>/dev/null || true' USR1 TERM
    "$@" &
    step_id=$!
    while [ "$broken_off" = 1 ]; do # a signal ends the wait
        broken_off=0 code=0
        wait "$step_id" || code=$?
    done
    if [ "$code" = "$STOPPED" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" || true
    fi
    exit "$code"
}

step='' runs='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) sed -n '/^# Methods/,/^# Exit/ s/^# \{0,1\}//p' "$script" && exit ;;
        --dry-run) dry_run=1 ;;
        --step | --of)
            [ $# -ge 2 ] || fail "$1 needs a value."
            if [ "$1" = --of ]; then runs=$2; else step=$2; fi
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
[ "${#arguments[@]}" -gt 0 ] || fail "expected a recipe; see $script --help."

step_or_submit "$step" compare
