"""Objects whose attributes are set once: what was derived and checked when they were made stays true."""

from typing import Any

set_once = object.__setattr__  # what __init__ of a Frozen class sets its attributes by


class Frozen:
    """A class with __slots__ whose attributes can be read only; reading costs nothing extra."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise AttributeError(
            f"{kind}.{name} cannot be assigned: a {kind} is checked once, when it is made; make another {kind}"
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        """What copy and pickle restore."""
        for name, value in state[1].items():
            set_once(self, name, value)
