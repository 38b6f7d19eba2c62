"""Runs the Triton kernels in Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    # The interpreter computes with numpy, which warns of what a kernel computes and then selects away.
    config.addinivalue_line("filterwarnings", "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
