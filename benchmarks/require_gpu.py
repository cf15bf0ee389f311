"""Stops the GPU targets of the Makefile, with a reason, where torch finds no CUDA device.

Prints what the card is, or with ``--architecture`` what to build for: "9.0a", as TORCH_CUDA_ARCH_LIST has it.
"""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"the GPU targets need a CUDA device; torch {torch.__version__} finds none on this machine")
if "--architecture" in sys.argv:
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}" + ("a" if major == 9 else ""))  # Hopper's own instructions are not in 9.0
else:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
