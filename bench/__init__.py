"""Benches, one a question. A part of the package (``fastdllm_triton.bench``), so that who installs it can repeat them.

Each ``bench_<name>.py`` has a ``BENCH`` (:class:`fastdllm_triton.bench._session.Bench`); ``fastdllm-triton bench`` runs them.
"""
