"""Other people's libraries: modules of transformers."""
