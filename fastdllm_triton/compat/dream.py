"""Dream's ``diffusion_generate`` for whatever model a user holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

from torch import nn

from ..engine.dream import generate as dream
from ..integrations.transformers import accelerated_of
from ..model import MaskedDiffusionLM

P = ParamSpec("P")
R = TypeVar("R")


def _of_any_model(
    function: Callable[Concatenate[Callable[[], dream.DreamModel], P], R],
) -> Callable[Concatenate[MaskedDiffusionLM | nn.Module, P], R]:
    """A function of what :func:`fastdllm_triton.load` returns, or of a loaded module, which is accelerated on first use."""

    @wraps(function)
    def call(model: MaskedDiffusionLM | nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        def opened() -> dream.DreamModel:
            return model.dream() if isinstance(model, MaskedDiffusionLM) else accelerated_of(model).dream()

        return function(opened, *args, **kwargs)

    return cast("Callable[Concatenate[MaskedDiffusionLM | nn.Module, P], R]", call)


diffusion_generate = _of_any_model(dream.diffusion_generate)
