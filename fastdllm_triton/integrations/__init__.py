"""Other people's libraries: modules of transformers, the harness lm-eval."""
