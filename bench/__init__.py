"""Benches, one for each question. They are part of the package (``fastdllm_triton.bench``), so that its users can repeat them.

Each ``bench_<name>.py`` has a ``BENCH`` or ``BENCHES`` (see ``_session.py``); ``fastdllm-triton bench`` runs them.
"""
