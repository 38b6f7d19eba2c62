"""``fastdllm-triton``: one file a command, which says what it prints and not what it computes. ``app.py`` lists the commands."""
