"""Stops the GPU targets of the Makefile, with a reason, where torch finds no CUDA device."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu-check and gpu-bench need a CUDA device; torch {torch.__version__} finds none on this machine")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
