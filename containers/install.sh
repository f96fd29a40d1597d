#!/bin/sh
# Installs what an image needs beside the project's wheel, as root in Debian: install.sh TORCH REQUIREMENTS
# TORCH is cpu, cuda (the build of the Python package index), or a CUDA version as PyTorch's indices have it, such as cu126.
set -eu
torch=$1 requirements=$2
case "$torch" in
    cuda) index= ;;
    cpu | cu[0-9]*) index="--extra-index-url https://download.pytorch.org/whl/$torch" ;;
    *)
        echo "error: TORCH is '$torch'; expected cpu, cuda, or a CUDA version as PyTorch's indices have it, such as cu126." >&2
        exit 2
        ;;
esac
# DeepSpeed compiles its collectives for CPUs when they are first used. git: run folders name the commit of a mounted clone.
apt-get update
apt-get install --yes --no-install-recommends g++ git
rm -rf /var/lib/apt/lists/*
# shellcheck disable=SC2086  # an option and its value, or nothing
python -m pip install --no-cache-dir $index -r "$requirements"
