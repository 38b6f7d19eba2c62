"""Benches, one a question. A part of the package (``fastdllm_triton.bench``), so that who installs it can repeat them.

Each ``bench_<name>.py`` has a ``BENCH`` or ``BENCHES`` (see ``_session.py``); ``fastdllm-triton bench`` runs them.
"""
