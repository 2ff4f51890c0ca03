#!/usr/bin/env bash
# Everything that needs a GPU, in one go, on a machine with torch, triton, transformers and pytest:
# install the package without its dependencies, then the `gpu` tests (tests/kernels/test_ran.py holds
# the binaries that ran to the proof) and the parity tests.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
python3 -c "
import torch, transformers, triton
print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__,
      'transformers', transformers.__version__)"
python3 -m pytest -q tests/test_gpu*.py
python3 -m pytest -q tests/kernels tests/test_parity.py tests/test_identities.py
