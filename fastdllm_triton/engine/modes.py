"""The modes of PyTorch that decoding runs in, whatever its caller has set."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch

from ..models.transformer import Transformer
from ..utils.threads import allowed_threads, default_threads, using


def decoding_modes(network: Transformer) -> AbstractContextManager[object]:
    """A context for one forward of a network, or for the allocation of buffers.

    Without gradients. Not in inference mode: buffers that are allocated in it could not be written outside. Without
    autocast: dtypes are the model's. With the model's device as the current one, which streams, events and captures go by; on a
    CPU with the model's threads, so that what runs between forwards and after them has its own.
    """
    device, threads = network.device, threads_of(network)
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    if threads is not None:
        stack.enter_context(using(threads))
    return stack


def threads_of(network: Transformer) -> int | None:
    """Threads that a forward of a network uses on a CPU, as things are set now; None on a GPU."""
    if network.device.type != "cpu":
        return None
    return network.threads or default_threads(network.config.streamed_parameters, allowed_threads())
