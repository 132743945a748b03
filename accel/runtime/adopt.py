"""Give one object of the user's new behaviour, and leave it the user's object.

A wrapper would be a second object: references made before `prepare` would train something else, `isinstance`
would fail, attributes would hide one level down. Instead the object's class becomes a subclass of its own
class, as torch's `fully_shard` does it. Copies and pickles of the object are of the user's class again.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any, TypeVar

T = TypeVar("T")

PART = "_accel"
"""The attribute under which an adopted object keeps what accel knows of it."""


class Adopted:
    """Mixin of all adopted objects: copies and pickles drop what accel added."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        adopted, own = type(self), type(self).__bases__[1]
        arguments = tuple(own if argument is adopted else argument for argument in arguments)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make = _new  # pickle lets that one make objects of the very class only
        if rest and isinstance(rest[0], dict):
            state = dict(rest[0])
            if isinstance(part := state.pop(PART, None), Part):
                state.update(part.shadowed)
            rest[0] = state
        return make, arguments, *rest


def _new(kind: type[T], *arguments: Any) -> T:
    return kind.__new__(kind, *arguments)


class Part:
    """What accel knows of one adopted object.

    `shadowed` holds instance attributes that would hide the mixin's methods, such as a `step` that a scheduler
    has patched into an optimizer; the mixin calls them in place of the class's own.
    """

    def __init__(self) -> None:
        self.shadowed: dict[str, Any] = {}


def adopt(value: T, mixin: type[Adopted], part: Part, *overridden: str) -> T:
    """Make `value` an instance of `mixin` in place; `overridden` are the methods that the mixin replaces."""
    attributes = value.__dict__
    part.shadowed = {name: attributes.pop(name) for name in overridden if name in attributes}
    attributes[PART] = part
    value.__class__ = _adopted_class(mixin, type(value))  # type: ignore[arg-type]
    return value


def part_of(value: Any) -> Any:
    """What accel knows of this object; None if it was never adopted."""
    return getattr(value, "__dict__", {}).get(PART)


def own_class(value: Any) -> type[Any]:
    """The class of an object, beneath what it was adopted as."""
    return next(kind for kind in type(value).__mro__ if not issubclass(kind, Adopted))


def own_method(value: Any, name: str) -> Any:
    """A method of an object as it is without what it was adopted as, found anew at each call.

    A strategy that runs a model's forward calls it so: those set up after it may yet change the class.
    """

    @functools.wraps(getattr(value, name))
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(own_class(value), name)(value, *args, **kwargs)

    return value.__dict__.get(name, call)


@functools.cache
def _adopted_class(mixin: type[Adopted], own: type[Any]) -> type[Any]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (mixin, own), names)
