#!/usr/bin/env bash
# A Slurm cluster of virtual nodes, all of them this machine, for trying out and testing what is in slurm/.
#
#   tests/slurm/cluster.sh install         Debian's munge, Slurm, shellcheck and iproute2 where missing (as root)
#   tests/slurm/cluster.sh start FOLDER    start it, with everything it writes in FOLDER; prints what to export
#   tests/slurm/cluster.sh stop FOLDER     end what was started there
#
# NODES (2) is the number of nodes, CPUS (2) and GPUS (0) what each of them claims to have, REQUEUE_DELAY (5) the seconds
# that a requeued job waits (120 on an ordinary cluster). GPUs that are not there can be asked for and counted, not used.
set -euo pipefail

NODES=${NODES:-2} CPUS=${CPUS:-2} GPUS=${GPUS:-0} REQUEUE_DELAY=${REQUEUE_DELAY:-5}

fail() {
    echo "error: $*" >&2
    exit 2
}

packages() {
    local program missing=()
    for program in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client shellcheck:shellcheck ip:iproute2; do
        command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
    done
    echo "${missing[*]-}"
}

install_packages() {
    local missing
    read -ra missing <<<"$(packages)"
    [ "${#missing[@]}" = 0 ] && return
    command -v apt-get >/dev/null ||
        fail "${missing[*]} are not installed and there is no apt-get; install them with your system's packages."
    [ "$(id -u)" = 0 ] || fail "${missing[*]} are not installed; run '$0 install' as root once."
    export DEBIAN_FRONTEND=noninteractive
    # Somebody else may be installing at the moment.
    apt-get -o DPkg::Lock::Timeout=300 -qq update
    apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# The first of NODES + 1 neighbouring TCP ports that nobody listens on.
free_ports() {
    local first port
    for first in $(seq 17800 20 19800); do
        for port in $(seq "$first" $((first + NODES))); do
            ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$first"
        return
    done
    fail "no free ports between 17800 and 19800."
}

write_configuration() {
    local host port number gpus=''
    [ "$GPUS" = 0 ] || gpus=" Gres=gpu:$GPUS"
    host=$(hostname -s)
    port=$(free_ports)
    {
        cat <<CONF
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired.
AuthInfo=socket=$folder/munge.socket,cred_expire=$REQUEUE_DELAY
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
# Nothing below needs cgroups or a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
# The nodes have more processors together than this machine.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=10
GresTypes=gpu
CONF
        for number in $(seq "$NODES"); do
            echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=$CPUS$gpus State=UNKNOWN"
        done
        echo "PartitionName=all Nodes=n[1-$NODES] Default=YES State=UP"
    } >"$folder/slurm.conf"
    [ "$GPUS" = 0 ] || echo "Name=gpu File=/dev/tty[0-$((GPUS - 1))]" >"$folder/gres.conf"
}

start() {
    local number missing
    missing=$(packages)
    [ -z "$missing" ] || fail "$missing are not installed; run '$0 install' first."
    [ "$(id -u)" = 0 ] || fail "slurmd starts jobs as the user who submits them; start the cluster as root."
    [ ! -e "$folder/slurm.conf" ] || fail "$folder holds a cluster already; stop it, or name another folder."
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    write_configuration
    export SLURM_CONF=$folder/slurm.conf
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/munged.err"
    slurmctld
    for number in $(seq "$NODES"); do
        slurmd -N "n$number"
    done
    for _ in $(seq 600); do
        [ "$(sinfo --noheader --format=%D --states=idle 2>/dev/null)" != "$NODES" ] || break
        sleep 0.2
    done
    if [ "$(sinfo --noheader --format=%D --states=idle)" != "$NODES" ]; then
        stop
        fail "the nodes did not come up within two minutes; $folder/*.log tell why."
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local file pid
    if [ -s "$folder/slurm.conf" ]; then
        export SLURM_CONF=$folder/slurm.conf
        # Jobs outlive the daemons that started them.
        squeue --noheader --format=%A 2>/dev/null | xargs -r scancel --full --signal=KILL || true
        squeue --noheader --format=%A 2>/dev/null | xargs -r scancel || true
        for _ in $(seq 100); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        [ -s "$file" ] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -0 "$pid" 2>/dev/null && kill -9 "$pid"
    done
    rm -f "$folder/slurm.conf"
}

[ $# -ge 1 ] || fail "expected install, start FOLDER or stop FOLDER."
case $1:$# in
    install:1) install_packages ;;
    start:2 | stop:2)
        mkdir -p "$2"
        folder=$(cd "$2" && pwd)
        "$1"
        ;;
    *) fail "expected install, start FOLDER or stop FOLDER, found: $*" ;;
esac
