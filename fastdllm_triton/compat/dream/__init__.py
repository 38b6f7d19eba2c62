"""Dream's ``diffusion_generate``: its arguments, its schedules, its result."""

from .generate import diffusion_generate

__all__ = ["diffusion_generate"]
