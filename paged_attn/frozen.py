"""Objects whose attributes are set once: what was checked when they were made stays true."""

from functools import cached_property
from typing import Any


class Frozen:
    """A class whose attributes are read only. What it derives from them are cached properties."""

    def _set(self, **attributes: Any) -> None:
        """Set attributes of an object that nothing has derived from yet."""
        vars(self).update(attributes)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise AttributeError(
            f"{kind}.{name} cannot be assigned: a {kind} is checked once, when it is made; make another {kind}"
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take: a copy has other arrays, and derives anew from them."""
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }
