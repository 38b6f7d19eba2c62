"""Commands of ``fastdllm-triton`` about proof and speed, one a module: what each prints, not what it computes."""
