"""``accelerate`` and ``restore``: a loaded module of a known family generates with this library's engine."""

from __future__ import annotations

import logging
from threading import Lock

from torch import nn

from ...model import MaskedDiffusionLM
from .accelerated import ATTRIBUTE, Accelerated, Options
from .report import Report

_LOG = logging.getLogger("fastdllm_triton")

#: Threads that generate with a module for the first time accelerate it once.
_FIRST_USE = Lock()


def accelerate(
    module: nn.Module,
    backend: str = "auto",
    attention: bool = True,
    head: bool = True,
    norms: bool = True,
    weights: None = None,
    strict: bool = False,
) -> Report:
    """Gives a loaded module of a known family (LLaDA, Dream, Fast-dLLM v2, SDAR) this library's generation, in place.

    The module gets the methods ``generate``, ``infill`` and ``release`` (those of
    :class:`~fastdllm_triton.MaskedDiffusionLM`), ``fast_forward(input_ids)``
    (logits of a plain forward) and, if it is a Dream, ``diffusion_generate``. The functions of :mod:`fastdllm_triton.compat` call
    this by themselves for a module that they are given first. Its own ``forward``, its ``state_dict`` and its training stay as
    they are, to the bit.

    Memory is not doubled: the module's parameters become views of the fused tensors that the engine multiplies with. What
    changes them in place afterwards (an optimizer, ``load_state_dict``, merging an adapter) is seen by the next call without
    further ado. What gives them other memory (``module.to(...)``, ``load_state_dict(assign=True)``) is noticed by the next
    call, which fuses them again. Every call looks at the module in the same way as this function does, and raises what it would.

    Accelerating again is cheap, takes over the options given last, and puts the methods back where a script has replaced
    them. Of an inner module that PEFT and others wrap, the wrapper and the module inside can both be accelerated; they share
    one copy.

    Args:
        module: a ``LLaDAModelLM``, ``DreamModel``, ``Fast_dLLM_QwenForCausalLM`` or ``SDARForCausalLM`` of the checkpoints' own
            code, of any transformers version; bare, or wrapped by PEFT with its adapters merged. It is recognised by its
            config and the names of its parameters.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``, see :func:`fastdllm_triton.ops.resolve`.
        attention: run the kernels of rotation, cache and attention; plain PyTorch ops in their place if False.
        head: the same for the kernels from the head's weight to the committed tokens.
        norms: the same for the norms, the MLP's gate, and the products fused with them.
        weights: reserved for weight-only quantisation, which this version does not have for loaded modules.
        strict: raise where something would run otherwise than on the kernels, or be left out, that no argument asked for.

    Returns:
        What was replaced and what not, with reasons.

    Raises:
        TypeError: ``module`` is no module, or an option no bool.
        ValueError: the module is of no known family, or it has something that is not supported; says what, and what to do.
        RuntimeError: ``backend="triton"`` where the kernels cannot run; or ``strict`` and something falls back.

    Whatever is raised, the module is left as it was.
    """
    for name, value in (("attention", attention), ("head", head), ("norms", norms), ("strict", strict)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if weights is not None:
        raise ValueError(f"weights must be None, got {weights!r}; weights of a loaded module keep their dtype in this version")
    _require_module(module)
    plain = tuple(part for part, wanted in (("attention", attention), ("norms", norms), ("head", head)) if not wanted)
    options = Options(backend, plain, strict)
    before: Accelerated | None = vars(module).get(ATTRIBUTE)
    accelerated = Accelerated(module, options, before.shadowed if before else None)
    report = accelerated.report()
    accelerated.install()
    return report


def restore(module: nn.Module) -> None:
    """Undoes :func:`accelerate`: takes the methods away, and gives every parameter memory of its own again.

    A module that is not accelerated is left alone.

    Args:
        module: what was given to :func:`accelerate`.

    Raises:
        TypeError: ``module`` is no module.
        RuntimeError: there is no memory to copy the parameters of one fused tensor; the methods are gone, the views stay.
    """
    _require_module(module)
    accelerated: Accelerated | None = vars(module).get(ATTRIBUTE)
    if accelerated is not None:
        accelerated.remove()


def runtime_of(model: object) -> MaskedDiffusionLM:
    """The model that generates for what a user holds.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or a loaded module, see :func:`accelerated_of`.

    Raises:
        TypeError, ValueError: as there.
    """
    return model if isinstance(model, MaskedDiffusionLM) else accelerated_of(model).runtime()


def accelerated_of(model: object) -> Accelerated:
    """What a loaded module was accelerated with. One that was not is accelerated now, and a line of log says so.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: :func:`accelerate` refuses it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must come from fastdllm_triton.load, or be a loaded LLaDA, Dream, Fast-dLLM v2 or SDAR module, "
            f"got {type(model).__name__}"
        )
    with _FIRST_USE:
        if not isinstance(getattr(model, ATTRIBUTE, None), Accelerated):
            _LOG.warning(
                "%s is accelerated on first use (%s); print(fastdllm_triton.accelerate(model)) shows the report, "
                "fastdllm_triton.restore(model) undoes it",
                type(model).__name__,
                accelerate(model).summary,
            )
        accelerated: Accelerated = getattr(model, ATTRIBUTE)
        return accelerated


def _require_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
