"""Old names of public functions, classes and parameters: each works for one release and warns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["deprecated_attributes", "deprecated_method", "renamed_arguments", "warn_renamed"]

Function = TypeVar("Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that `old` is called `new`."""
    # FutureWarning: Python shows it to users by default, unlike DeprecationWarning
    warnings.warn(f"{old} is now {new}; the old name will be removed in the next release", FutureWarning, stacklevel)


def deprecated_method(owner: str, old: str, new: str) -> Any:
    """Return a method that warns and calls the method `new` of its object, a subclass's where it has one."""

    def alias(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{owner}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    alias.__name__, alias.__doc__ = old, f"Old name of `{new}`."
    return alias


def deprecated_attributes(module: str, renamed: Mapping[str, tuple[str, Any]]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that gives objects under their old names, with a warning.

    Args:
        module: `__name__` of the module.
        renamed: old name -> (new name, the object).
    """

    def attribute(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, obj = renamed[name]
        warn_renamed(f"{module}.{name}", f"{module}.{new}")
        return obj

    return attribute


def renamed_arguments(**renamed: str) -> Callable[[Function], Function]:
    """Return a decorator that also takes keyword arguments under their old names.

    Args:
        renamed: old name -> new name.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in renamed.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{function.__name__}() got {new} and its old name {old}; give {new}")
                    warn_renamed(f"the argument {old} of {function.__name__}()", new)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate
