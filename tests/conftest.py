"""Runs the Triton kernels in Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
