"""Accuracy where speed is claimed: a grid of ways to decode, scored on the same requests, with confidence intervals.

The command is ``fastdllm-triton evaluate``; ``docs/evaluation.md`` shows it. The model class of lm-evaluation-harness is in
:mod:`fastdllm_triton.evaluation.lm_eval`.
"""
