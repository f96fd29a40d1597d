# shellcheck shell=bash
# What the scripts in this folder share: how a site starts Python. Read, not run.
# shellcheck disable=SC2034 # what is set here is for the scripts that read this file

# 1 prints commands instead of running them.
dry_run=0

fail() {
    echo "error: $*" >&2
    exit 2
}

print_or_run() {
    if [ "$dry_run" = 1 ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

load_site() {
    local file=${SITE_ENV:-slurm/site.env}
    if [ -e "$file" ]; then
        set +u # a site's `module` function may read variables that are not set
        # shellcheck source=slurm/site.env.example
        . <(tr -d '\r' <"$file") # an editor on Windows ends lines with a carriage return, which would be part of values
        set -u
    elif [ -n "${SITE_ENV:-}" ]; then
        fail "SITE_ENV names $SITE_ENV, which does not exist; copy slurm/site.env.example there."
    fi
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=python3
        [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
    fi
    if [ -n "${NETWORK_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
    fi
}

# Sets `options` to the words of a text, which may have several lines.
split_options() {
    IFS=$' \t\n' read -r -d '' -a options <<<"$1" || true # it ends without the delimiter
}

# Sets `python`, the command line of Python inside the container if there is one, `srun_options` to go with it, and
# `login_python`, the same for where there is no srun.
choose_python() {
    srun_options=() login_python=()
    case ${CONTAINER:-none} in
        none) python=("$PYTHON") ;;
        apptainer)
            python=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "${IMAGE:?site.env must set IMAGE}"
                "$PYTHON")
            ;;
        pyxis)
            srun_options=("--container-image=${IMAGE:?site.env must set IMAGE}" "--container-workdir=$PWD"
                "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}")
            python=("$PYTHON")
            # Pyxis starts containers in jobs only.
            login_python=("${LOGIN_PYTHON:-python3}")
            [ -n "${LOGIN_PYTHON:-}" ] || [ ! -x .venv/bin/python ] || login_python=("$PWD/.venv/bin/python")
            ;;
        *) fail "CONTAINER is '$CONTAINER' in site.env; expected none, apptainer or pyxis." ;;
    esac
    [ "${#login_python[@]}" -gt 0 ] || login_python=("${python[@]}")
}

# Checks the recipe of a job before it is submitted. The table goes to the error stream, as the output is sbatch's. Reads
# `verb`, `prepare` and `options`, which are sbatch's.
#   check_first ARGUMENT ...
check_first() {
    local checked=() ranks code=0
    if [ $# = 0 ]; then
        [ "$verb" != evaluate ] || fail "--evaluate needs the folder of a run."
        return 0 # the embedded default
    fi
    if [ "$verb" = evaluate ]; then
        [ -f "$1/config.yaml" ] || fail "'$1' is not the folder of a run: it has no config.yaml; nothing was submitted."
        return 0
    fi
    while [ $# -gt 0 ]; do
        case $1 in
            --set | --skip-bad | --until | --port)
                [ $# -ge 2 ] || fail "$1 needs a value."
                case $1 in
                    --set) checked+=(--set "$2") ;;
                    --skip-bad) checked+=(--set "data.skip_bad=$2") ;;
                esac
                shift
                ;;
            --set=*) checked+=("$1") ;;
            --skip-bad=*) checked+=(--set "data.skip_bad=${1#*=}") ;;
            -*) ;; # of `run` alone
            *) checked+=("$1") ;;
        esac
        shift
    done
    [ "$prepare" = 0 ] || checked+=(--set data.prepare_first=true) # the job prepares what is missing
    ranks=$(ranks_of "${options[@]}")
    "${login_python[@]}" -m pipeline check "${checked[@]}" ${ranks:+--ranks "$ranks"} \
        ${GPU_MEMORY:+--gpu-memory "$GPU_MEMORY"} >&2 || code=$?
    [ "$code" != 0 ] || return 0
    [ "$code" = 2 ] || echo "error: the recipe cannot be checked with ${login_python[*]} (see above): set PYTHON, or with" \
        "pyxis LOGIN_PYTHON, in slurm/site.env to one that has requirements.txt, or submit without a check, by sbatch." >&2
    echo "nothing was submitted." >&2
    exit "$code"
}

# Prints the number of ranks that sbatch's options ask for, nothing where they do not say it.
ranks_of() {
    local nodes=1 gpus='' tasks='' name value
    while [ $# -gt 0 ]; do
        name=${1%%=*} value=${1#*=}
        case $1 in
            --*=*) ;;
            -N | --nodes | --gpus-per-node | --ntasks-per-node)
                value=${2:-}
                [ $# = 1 ] || shift
                ;;
            -N*) name=-N value=${1#-N} ;;
        esac
        case $name in
            -N | --nodes) nodes=$value ;;
            --gpus-per-node) gpus=${value##*:} ;; # a100:8
            --ntasks-per-node) tasks=$value ;;
        esac
        shift
    done
    tasks=${tasks:-$gpus}
    [[ $nodes =~ ^[0-9]+$ && $tasks =~ ^[0-9]+$ ]] || return 0
    echo $((nodes * tasks))
}

# Submits a step of a script that is an array of jobs, after the job `previous` if there is one; sets `job`.
#   submit_step NAME WHAT AFTER PREVIOUS SITE_OPTIONS SIZE [OPTION ...]
# NAME and WHAT name the job, AFTER is the kind of dependency, SITE_OPTIONS are site.env's for sbatch, and SIZE is the
# script's own option that tells a job the size of the arrays, such as --of=3. Reads `script` and `arguments`.
submit_step() {
    local name=$1 what=$2 after=$3 previous=$4 size=$6 options
    split_options "$5"
    shift 6
    set -- sbatch --parsable --job-name="$name-$what" "${options[@]}" "$@"
    [ -z "$previous" ] || set -- "$@" "--dependency=$after:$previous"
    set -- "$@" "$script" --step "$what" "${size%%=*}" "${size#*=}" "${arguments[@]}"
    if [ "$dry_run" = 1 ]; then
        print_or_run "$@"
        job=$what
    else
        job=$("$@")
        job=${job%%;*}
        echo "$what: job $job"
    fi
}

# Ends a script that is an array of jobs: in a job, which has a step, by its `in_job`, else by its `submit_all`.
#   step_or_submit STEP VERB
# VERB is the one of `python -m pipeline` that does the same in one process.
step_or_submit() {
    load_site
    choose_python
    if [ -n "$1" ]; then
        in_job
        return
    fi
    [ "$dry_run" = 1 ] || command -v sbatch >/dev/null || fail "there is no sbatch here; without Slurm one process" \
        "does it all: python -m pipeline $2 RECIPE."
    submit_all
}

# Sets `one_task`, the start of a command for the one process of a step: a module of Python and its arguments follow.
choose_one_task() {
    # srun does not inherit --cpus-per-task from the job (since Slurm 22.05).
    one_task=(srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --export=ALL --input=none
        "${srun_options[@]}" "${python[@]}" -m)
}
