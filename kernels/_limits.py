"""What the selection kernels take at most. Plain numbers, so that a caller can check before any work is done."""

#: Each forbidden id, and each end token, is compared in code of its own.
MAX_FORBIDDEN = 64
MAX_EOS = 16
#: Rows of a batch, as many as one program adds up the counters of.
MAX_ROWS = 1024
#: Slots of a block: one program holds all of them.
MAX_BLOCK = 1024
