#!/usr/bin/env bash
#SBATCH --job-name=sequence
#SBATCH --nodes=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --kill-on-invalid-dep=yes
#
# A whole sequence as one Slurm job that goes on by itself after a preemption or its time limit:
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/run_sequence.sh RECIPE [--set A.B=C ...]
#
#   --chain     (not with sbatch) submit one job per stage, each waiting for the one before, with SBATCH_OPTIONS
#   --submit    (not with sbatch) check the recipe, then submit the one job with SBATCH_OPTIONS
#   --prepare   prepare the data first, in one task of the job
#   --train     train without evaluating
#   --evaluate  (with a run's folder instead of a recipe) fill in what is missing of its accuracy matrix
#   --dry-run   print what would run
#
# Everything else goes to `python -m pipeline run` (train, evaluate). Without a recipe: --prepare nano, the embedded default. Outside a
# job the same call starts the ranks on this machine with the deepspeed launcher. Differences between sites are in
# slurm/site.env (or $SITE_ENV), explained in slurm/site.env.example. Submit from the root of the repository. sbatch looks at
# no recipe: `slurm/submit.sh` in its place, with the same arguments, checks it first.
#
# Exit codes: those of `pipeline run` (0 done, 2 wrong input, 75 stopped and resumable), else the highest of srun's.
set -euo pipefail
shopt -s inherit_errexit

STOPPED=75         # pipeline's: saved, the same command goes on
KILLED_BY_USR1=138 # a rank that was still starting and had nothing to save
KILLED_BY_TERM=143 # the same, where the job was told to stop; else a rank was killed
ATTEMPTS=5         # to reach a controller that is busy

usage() {
    sed -n '/^# A whole/,/^# Exit/ s/^# \{0,1\}//p' "$script"
}

# ---------------------------------------------------------------------------------------------------- inside a job

# Sets `per_node`: one task per GPU, or what --ntasks-per-node said, or one task per node; `cpus` of a task, and all of a
# node, `on_node`.
count_tasks() {
    # Only batch jobs know what is on a node; the shell of salloc has "16(x2)" and what was asked for.
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
    on_node=${SLURM_CPUS_ON_NODE:-${SLURM_JOB_CPUS_PER_NODE:-1}}
    gpus=${gpus##*:} on_node=${on_node%%[(,]*}
    [[ $gpus =~ ^[0-9]+$ ]] || gpus=1
    per_node=${SLURM_NTASKS_PER_NODE:-$gpus}
    cpus=$((on_node / per_node))
    [ "$cpus" -ge 1 ] || fail "this job has $on_node CPUs per node for $per_node tasks; submit it with" \
        "--cpus-per-gpu=N, or with --ntasks-per-node=$per_node --cpus-per-task=N."
}

# Where rank 0 is and listens. The names of nodes need not be known to the resolver; their addresses are Slurm's own.
meeting_point() {
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${head%%$'\n'*}
    if ! getent hosts "$head" >/dev/null; then
        head=$(scontrol show node --oneliner "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
    export MASTER_ADDR=$head
    # Below the range of ports that systems hand out, another one for every job and every start of it.
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 20000))
}

# From now on the signals reach the step that runs, as one signal; a step that has not begun by then does not begin.
listen() {
    passed_on=$1 step='' signalled=0 broken_off=0
    shift
    trap pass_on "$@"
}

pass_on() {
    signalled=1 broken_off=1
    [ -z "$step" ] || kill -s "$passed_on" "$step" 2>/dev/null || true
}

# Run a step and wait for it; a bare `srun` in the foreground would hold signals back until it ends.
run_step() {
    local code=0
    if [ "$dry_run" = 1 ]; then
        print_or_run "$@"
        return
    fi
    [ "$signalled" = 0 ] || return "$STOPPED"
    "$@" &
    step=$!
    [ "$signalled" = 0 ] || pass_on # it came before `step` was known
    while true; do
        broken_off=0 code=0
        wait "$step" || code=$?
        # A signal breaks waiting off; waiting again also gives the code of a step that has ended by then.
        [ "$broken_off" = 1 ] || break
    done
    step=
    return "$code"
}

# Call Slurm until it answers; its controller may be busy or just starting again.
patiently() {
    local attempt
    for attempt in $(seq "$ATTEMPTS"); do
        ! "$@" || return 0
        [ "$attempt" = "$ATTEMPTS" ] || sleep "${RETRY_S:-5}"
    done
    return 1
}

requeue() {
    local shown state
    shown=$(patiently scontrol show job --oneliner "$SLURM_JOB_ID") || shown=
    state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$shown")
    # A job that Slurm is ending (cancelled, out of time, making room for another) is COMPLETING already, and would be
    # queued again all the same. Where Slurm itself queues it again, it needs nobody's help.
    if [ "$state" = CANCELLED ]; then
        echo "stopped: the job was cancelled and what it had done is saved; submit it again to resume." >&2
    elif [ -n "$state" ] && [ "$state" != RUNNING ]; then
        echo "stopped: Slurm is ending the job (its state is $state) and what it had done is saved; it goes on when" \
            "Slurm queues it again (a preemption, a node that failed), and after scancel when you submit it again." >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "stopped: the job was started ${MAX_RESTARTS:-100} times again (MAX_RESTARTS in site.env); submit it" \
            "again to resume." >&2
    elif [[ $shown == *" Requeue=0 "* ]]; then
        echo "stopped: this job may not be queued again (--no-requeue); submit it again to resume." >&2
    elif patiently scontrol requeue "$SLURM_JOB_ID"; then
        echo "stopped: the job is queued again and goes on from here." >&2
    else
        echo "stopped: Slurm does not queue this job again (see the line above); submit it again to resume." >&2
    fi
    exit "$STOPPED"
}

in_job() {
    local code=0 threads=${OMP_NUM_THREADS:-} common
    [ -d "${SLURM_SUBMIT_DIR:?}" ] || fail "the folder the job was submitted from, $SLURM_SUBMIT_DIR, is not on this" \
        "node; submit from a folder that all nodes see."
    count_tasks
    meeting_point
    # Lines appear as they are printed. Not by srun's --unbuffered, which gives the tasks a terminal to draw bars on.
    export LOCAL_WORLD_SIZE=$per_node OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} PYTHONUNBUFFERED=1
    # --export: also for a job that was submitted with --export=NONE. --input: no task may wait for a keyboard.
    # --distribution: the ranks of a node are neighbours, as hpZ takes them to be, whatever the site's default is.
    common=(--export=ALL --input=none --distribution=block "${srun_options[@]}")
    unset SLURM_CPUS_PER_GPU # srun takes it for a second answer to --cpus-per-task
    if [ "$prepare" = 1 ]; then
        # Alone on its node, it decodes and computes with all of its processors.
        OMP_NUM_THREADS=${threads:-$on_node} run_step srun --nodes=1 --ntasks=1 --cpus-per-task="$on_node" "${common[@]}" \
            "${python[@]}" -m pipeline prepare "${arguments[@]}" || code=$?
    fi
    if [ "$code" = 0 ]; then
        # A rank that fails ends the others at once. --wait=0: rank 0 may write its report after the others have left.
        run_step srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$per_node" \
            --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --kill-on-bad-exit=1 --wait=0 \
            --cpus-per-task="$cpus" "${common[@]}" \
            "${python[@]}" -m pipeline "$verb" "${arguments[@]}" "${until[@]}" || code=$?
    fi
    case $code:$signalled in
        "$STOPPED":* | "$KILLED_BY_USR1":* | "$KILLED_BY_TERM":1) requeue ;;
        *) exit "$code" ;;
    esac
}

# --------------------------------------------------------------------------------------------------- outside a job

submit() {
    local options job
    split_options "${SBATCH_OPTIONS:-}"
    if [ "$dry_run" = 1 ]; then
        print_or_run sbatch "${options[@]}" "$@" "$script" "${own[@]}" "${arguments[@]}" "${until[@]}" >&2
        job="JOB${until[1]:-}"
    else
        job=$(sbatch --parsable "${options[@]}" "$@" "$script" "${own[@]}" "${arguments[@]}" "${until[@]}")
    fi
    echo "${job%%;*}"
}

chain() {
    local names number=0 job='' name dependency
    names=$("${login_python[@]}" slurm/stages.py "${arguments[@]}") || {
        [ $? != 2 ] || exit 2 # it has said what is wrong with the recipe
        fail "the stages cannot be read with ${login_python[*]} (see above); --chain needs a Python here, outside jobs," \
            "that has requirements.txt: set PYTHON, or with pyxis LOGIN_PYTHON, in slurm/site.env."
    }
    if [ -z "$names" ]; then # a method without stages, which only evaluates
        submit
        return
    fi
    while read -r name; do
        number=$((number + 1))
        until=(--until "$number")
        dependency=()
        [ -z "$job" ] || dependency=("--dependency=afterok:$job")
        job=$(submit --job-name="$(printf '%02d' "$number")-$name" "${dependency[@]}")
        [ "$dry_run" = 1 ] || echo "stage $number ($name): job $job"
        [ "$verb" = run ] && own=() || own=("--$verb") # only the first job prepares
    done <<<"$names"
}

without_slurm() {
    local command=("${python[@]}" -m pipeline)
    if [ "$prepare" = 1 ]; then
        listen TERM TERM INT HUP
        run_step "${command[@]}" prepare "${arguments[@]}"
        [ "$signalled" = 0 ] || exit "$STOPPED"
        trap - TERM INT HUP
    fi
    # `run` starts the deepspeed launcher with one rank per GPU, or with as many as train.processes says. It takes this
    # script's place, so that a signal to the script is one to it.
    command+=("$verb" "${arguments[@]}" "${until[@]}")
    [ "$dry_run" = 1 ] || exec "${command[@]}"
    print_or_run "${command[@]}"
}

# --------------------------------------------------------------------------------------------------------- options

script=slurm/run_sequence.sh
cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [ ! -f "$script" ]; then
    echo "error: there is no $script in $PWD; call or submit it from the root of the repository." >&2
    exit 2
fi
# shellcheck source=slurm/site.sh
. slurm/site.sh

own_job=0 # whether this is the shell of a job, which starts steps
[ -z "${SLURM_JOB_ID:-}" ] || [ -n "${SLURM_STEP_ID:-}" ] || own_job=1
[ "$own_job" = 0 ] || listen USR1 USR1 TERM

mode=run verb=run prepare=0
arguments=() own=() until=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --chain | --submit) mode=${1#--} ;;
        --dry-run) dry_run=1 ;;
        --prepare) prepare=1 own+=(--prepare) ;;
        --train | --evaluate) verb=${1#--} own+=("$1") ;;
        --until)
            [ $# -ge 2 ] || fail "--until needs the number of a stage."
            until=(--until "$2")
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [ "${#arguments[@]}" = 0 ]; then
    [ "$verb" != evaluate ] || fail "--evaluate needs the folder of a run."
    arguments=(nano) prepare=1 own+=(--prepare)
fi
[ "$verb:$mode" != evaluate:chain ] || fail "--evaluate is one job; use --submit."

load_site
choose_python
if [ "$mode" != run ]; then
    [ -z "${SLURM_JOB_ID:-}" ] || fail "--$mode submits jobs; call it outside a job."
    [ "$dry_run" = 1 ] || command -v sbatch >/dev/null || fail "--$mode needs Slurm, and there is no sbatch here."
    split_options "${SBATCH_OPTIONS:-}"
    [ "$mode" = chain ] || [ "$dry_run" = 1 ] || check_first "${arguments[@]}"
    if [ "$mode" = chain ]; then chain; else submit; fi
elif [ "$own_job" = 1 ]; then
    in_job
else
    without_slurm
fi
