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
