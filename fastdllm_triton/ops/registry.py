"""One decorator makes an op: what ``torch.library`` must know of it, and the function that users call.

The decorated function has the op's own signature and says what shapes its results have; everything else follows from it. The
schema comes from its annotations: a dataclass stands for its fields, a number or tensor for either. Every op is registered in
the namespace ``fastdllm``: CUDA runs the kernel, CPU the op of :mod:`fastdllm_triton.ops.cpu`, and ``torch.compile`` sees one
opaque call with its mutations declared. Eager code calls the functions behind it directly: a pass through the dispatcher would
only cost time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .backends import REGISTERED, _function, resolve

LIBRARY = torch.library.Library("fastdllm", "DEF")  # type: ignore[no-untyped-call]

#: What the dispatcher calls a type.
_SCHEMA = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


@dataclass(frozen=True)
class Argument:
    """An argument of an op, as the dispatcher takes it.

    Attributes:
        name: of the argument.
        default: of the op's signature.
        flat: names and types of what it becomes.
        kind: a dataclass; or what else needs a conversion: ``"integers"`` become a tensor, ``"float or tensor"`` two arguments,
            a ``tuple`` as many as it has entries, or None for all of them.
        fields: of the dataclass.
    """

    name: str
    default: Any
    flat: list[tuple[str, str]]
    kind: Any = None
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, hint: Any, default: Any = None) -> Argument:
        """From an annotation."""
        if is_dataclass(hint):
            hints = get_type_hints(hint)
            names = tuple(field.name for field in fields(hint))
            parts = [cls.of(f"{name}_{field}", hints[field]) for field in names]
            return cls(name, default, [flat for part in parts for flat in part.flat], hint, names)
        choices = {hint} if get_origin(hint) in (None, Literal) else set(get_args(hint))
        optional = "?" if NoneType in choices else ""
        plain = {str if get_origin(choice) is Literal else choice for choice in choices - {NoneType}}
        if plain == {float, Tensor}:
            return cls(name, default, [(name, "float"), (f"{name}_by_row", "Tensor?")], "float or tensor")
        if Tensor in plain:
            return cls(name, default, [(name, f"Tensor{optional}")], "integers" if len(plain) > 1 else None)
        (only,) = plain
        if get_origin(only) is tuple:
            flat = [(f"{name}_{i}", _SCHEMA[entry] + optional) for i, entry in enumerate(get_args(only))]
            return cls(name, default, flat, tuple)
        return cls(name, default, [(name, _SCHEMA[only] + optional)])

    def flatten(self, value: Any, device: torch.device) -> list[Any]:
        """What the dispatcher is given."""
        if self.fields:
            return [getattr(value, field) for field in self.fields]
        if self.kind == "float or tensor":
            return [0.0, value] if isinstance(value, Tensor) else [value, None]
        if self.kind == "integers" and value is not None:
            return [torch.as_tensor(value, dtype=torch.int64, device=device)]
        if self.kind is tuple:
            return [None] * len(self.flat) if value is None else list(value)
        return [value]

    def unflatten(self, values: list[Any]) -> Any:
        """What the op is called with."""
        if self.fields:
            return self.kind(*values)
        if self.kind == "float or tensor":
            return values[0] if values[1] is None else values[1]
        if self.kind is tuple:
            return None if values[0] is None else tuple(values)
        return values[0]


@dataclass(frozen=True)
class Results:
    """The results of an op: a tensor, a dataclass of tensors, or a fixed number of tensors, of which those without any element
    and dimension ``[0]`` stand for what was not asked for.
    """

    kind: Any
    count: int

    @classmethod
    def of(cls, hint: Any) -> Results:
        """From an annotation."""
        if hint is NoneType:
            return cls(None, 0)
        if is_dataclass(hint):
            return cls(hint, len(fields(hint)))
        choices = get_args(hint) if get_origin(hint) is not tuple else (hint,)
        return cls(Tensor, max((len(get_args(choice)) for choice in choices), default=0) or 1)

    @property
    def schema(self) -> str:
        """The dispatcher's word for it."""
        return "Tensor" if (self.kind, self.count) == (Tensor, 1) else f"({', '.join(['Tensor'] * self.count)})"

    def flatten(self, value: Any) -> Any:
        """What the dispatcher gets: contiguous, since the reference may return views in another order of dimensions."""
        if self.kind is None:
            return None
        tensors = tuple(vars(value).values()) if is_dataclass(value) else value if isinstance(value, tuple) else (value,)
        flat = [tensor.contiguous() for tensor in tensors]
        flat += [flat[0].new_empty(0) for _ in range(self.count - len(flat))]
        return flat[0] if self.schema == "Tensor" else tuple(flat)

    def unflatten(self, values: Any) -> Any:
        """What the caller gets."""
        if self.kind is None or self.schema == "Tensor":
            return values
        if self.kind is not Tensor:
            return self.kind(*values)
        asked = [tensor for tensor in values if tensor.shape != (0,)]
        return asked[0] if len(asked) == 1 else tuple(asked)


def op(*, check: Callable[..., torch.device], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an op under the name of the decorated function and returns the function that users call.

    Args:
        check: of the op's signature: raises for arguments that are wrong, and says where the op runs.
        mutates: the arguments, or fields ``argument_field`` of one, that are written.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        name, hints = fake.__name__, get_type_hints(fake)
        parameters = inspect.signature(fake).parameters
        arguments = [Argument.of(p.name, hints[p.name], p.default) for p in parameters.values()]
        results = Results.of(hints["return"])
        aliases = {argument: f"Tensor(a{i}!)" for i, argument in enumerate(mutates)}
        schema = ", ".join(f"{aliases.get(flat, kind)} {flat}" for argument in arguments for flat, kind in argument.flat)

        def with_own_arguments(function: Callable[..., Any], flat: Sequence[Any]) -> Any:
            named, rest = {}, list(flat)
            for argument in arguments:
                count = len(argument.flat)
                named[argument.name] = argument.unflatten(rest[:count])
                rest = rest[count:]
            return results.flatten(function(**named))

        LIBRARY.define(f"{name}({schema}) -> {results.schema}")  # type: ignore[no-untyped-call]
        for backend, device in (("cpu", "CPU"), ("triton", "CUDA")):
            run = _run(name, backend, with_own_arguments)
            LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastdllm::{name}", lambda *flat: with_own_arguments(fake, flat), lib=LIBRARY)
        overload = getattr(torch.ops.fastdllm, name).default

        def compiled(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(parameters, args, strict=False)) | kwargs
            device = args[0].device if args else next(v.device for v in kwargs.values() if isinstance(v, Tensor))
            flat: list[Any] = []
            for argument in arguments:
                flat += argument.flatten(named.get(argument.name, argument.default), device)
            return results.unflatten(overload(*flat))

        REGISTERED[name] = compiled
        FAKES[name] = fake

        @wraps(_function("reference", name))
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
            else:
                device = check(*args, **kwargs)
            return getattr(resolve("auto", device), name)(*args, **kwargs)

        return call

    return decorate


#: The decorated functions: shapes of results under an op's own signature.
FAKES: dict[str, Callable[..., Any]] = {}


def _run(name: str, backend: str, with_own_arguments: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of a backend, imported when it is first called."""
    return lambda *flat: with_own_arguments(_function(backend, name), flat)
