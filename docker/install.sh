#!/usr/bin/env bash
# docker/install.sh FOLDER [REQUIREMENTS]: install the checkout into a fresh environment at FOLDER and try it.
# The containers run it, and so does `make test-package`, which has no container tool. Nothing is fetched but packages.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
requirements=${2:-requirements.txt}
python3 -m venv "$folder"
# PIP_OPTIONS: more options of pip. A site that has the packages already gives --no-deps or its own index.
pip=("$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir)
[ "$requirements" = none ] || "${pip[@]}" ${PIP_OPTIONS:-} -r "$requirements"
"${pip[@]}" ${PIP_OPTIONS:-} --no-deps .
# From another folder, so that the installed packages are tried and not the checkout.
cd "$folder"
bin/python -c "import torch; print('torch', torch.__version__, 'for CUDA', torch.version.cuda)"
bin/vmp configs
