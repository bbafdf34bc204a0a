"""How the pages of a KV cache are laid out in memory, as a tag on the data."""

from enum import StrEnum
from typing import Any


class Layout(StrEnum):
    """The order of the axes inside a page.

    NHD: [page, slot, head, dim]    a token's heads are stored together
    HND: [page, head, slot, dim]    a head's tokens are stored together
    """

    NHD = "NHD"
    HND = "HND"

    @classmethod
    def _missing_(cls, value: object) -> "Layout":
        raise ValueError(
            f"layout must be 'NHD' (pages are [page_size, num_kv_heads, head_dim]) or 'HND' "
            f"([num_kv_heads, page_size, head_dim]), got {value!r}; pass the one that the pool was written in"
        )

    @property
    def slot_axis(self) -> int:
        """The axis of a pool [page, ...] that counts the slots of a page."""
        return 1 if self is Layout.NHD else 2

    @property
    def head_axis(self) -> int:
        """The axis of a pool that counts KV heads."""
        return 2 if self is Layout.NHD else 1

    @property
    def axes(self) -> str:
        """The axes of a pool, for messages."""
        return f"[num_pages, {self.page_axes}]"

    @property
    def page_axes(self) -> str:
        return "page_size, num_kv_heads, head_dim" if self is Layout.NHD else "num_kv_heads, page_size, head_dim"

    @property
    def other(self) -> "Layout":
        return Layout.HND if self is Layout.NHD else Layout.NHD


def as_layout(layout: Any) -> Layout:
    """The Layout of a name. (Layout itself compares whatever it gets, arrays too, with its names.)"""
    return Layout(layout) if isinstance(layout, str) else Layout._missing_(layout)
