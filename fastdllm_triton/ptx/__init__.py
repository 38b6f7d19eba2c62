"""Executes compiled Triton kernels without a GPU: PTX, interpreted by numpy over all threads of many programs, with checks."""
