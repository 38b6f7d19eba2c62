"""Runs generations: which rows decode what and when, the buffers that they decode in, and what comes out."""

from .engine import Engine
from .generation import Forward, Generation
from .outputs import Committed, GenerationOutput, StepOutput
from .prefix_store import PrefixStore
from .request import Request

__all__ = ["Committed", "Engine", "Forward", "Generation", "GenerationOutput", "PrefixStore", "Request", "StepOutput"]
