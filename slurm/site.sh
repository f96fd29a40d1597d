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
        # shellcheck source=slurm/site.env.example
        . "$file"
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

# Sets `python`, the command line of Python inside the container if there is one, and `srun_options` to go with it.
choose_python() {
    srun_options=()
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
            ;;
        *) fail "CONTAINER is '$CONTAINER' in site.env; expected none, apptainer or pyxis." ;;
    esac
}
