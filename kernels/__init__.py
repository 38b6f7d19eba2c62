"""The Triton kernels, one file an op. They know tensors, nothing about models or decoding."""
