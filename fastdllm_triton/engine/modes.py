"""The modes of PyTorch that decoding runs in, whatever its caller has set."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch


def decoding_modes(device: torch.device) -> AbstractContextManager[object]:
    """A context for one forward, or for the allocation of buffers.

    Without gradients. Not in inference mode: buffers that are allocated in it could not be written outside. Without
    autocast: dtypes are the model's. With the model's device as the current one, which streams, events and captures go by.
    """
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack
