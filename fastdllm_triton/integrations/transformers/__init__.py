"""Swap-in: a module of a known family that is already loaded generates with this library's engine, in place and reversibly.

``recognise`` looks and refuses, ``fuse`` moves parameters, ``accelerated`` is the runtime over them and the methods that a module
gets, ``report`` says what came of it.
"""

from .accelerate import accelerate, accelerated_of, restore, runtime_of
from .report import Report

__all__ = ["Report", "accelerate", "accelerated_of", "restore", "runtime_of"]
