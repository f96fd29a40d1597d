#!/usr/bin/env bash
# An environment with lmms-eval, which uses the packages of another one, that of the tests:
#
#   tests/lmms/environment.sh FOLDER ENVIRONMENT
#
# Only what its command line imports for pictures and texts is installed, and nothing that is in ENVIRONMENT already: its
# requirements pin another wandb, and bring torchvision, timm, av and OpenCV, which the tests' task does not need.
set -euo pipefail

VERSION=0.7.3
folder=$1 base=$2

if [ "$(cat "$folder/.lmms" 2>/dev/null)" = "$VERSION" ]; then
    exit
fi
echo "creating the environment $folder with lmms-eval $VERSION (50 MB)"
"$base/bin/python" -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/tests.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    "lmms-eval==$VERSION" datasets==5.2.0 evaluate==0.4.6 dill==0.4.1 "filelock<4" multiprocess==0.70.19 xxhash==4.1.0 \
    sacrebleu==2.6.0 portalocker colorama tabulate lxml jsonlines==4.0.0 loguru==0.7.3 tenacity==9.2.1 \
    tqdm-multiprocess==0.0.11 pytablewriter==1.2.1 tcolorpy DataProperty typepy mbstrdecoder pathvalidate pytz \
    aiohttp aiohappyeyeballs aiosignal frozenlist multidict yarl propcache attrs
"$folder/bin/python" -c 'import lmms_eval.evaluator, lmms_eval.__main__'
echo "$VERSION" >"$folder/.lmms"
