"""What a plan consists of: named buffers of stated sizes, and the recipes of the kernels that read them.

Pure functions of a spec, capacities and a card. The owner of memory (CuPy, XLA) allocates the buffers, whose bytes must
be zero at first, and gives their addresses to launches/steps.py. Counters among them reset themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import recipes, splits
from .card import Card
from .recipes import DecodeRecipe, PrefillRecipe, struct_bytes

if TYPE_CHECKING:
    from .spec import AttentionSpec

INT_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Capacities:
    """The most that a step of a plan may have."""

    requests: int
    pages: int  # of all requests together
    rows: int = INT_LARGEST  # of q


@dataclass(frozen=True)
class DecodeLayout:
    """A plan of decode. Beside the buffers it needs a status word."""

    spec: AttentionSpec
    page_stride: int
    capacities: Capacities
    batch_invariant: bool
    card: Card
    recipe: DecodeRecipe

    @property
    def tile_rows(self) -> int:
        """Packed (token, head of the group) rows of a CTA."""
        return self.recipe.columns

    @property
    def most_items(self) -> int:
        return splits.decode_items(self.capacities.requests, self.splits(self.capacities.requests))

    @property
    def buffers(self) -> dict[str, int]:
        """Bytes by name."""
        requests, most = self.capacities.requests, self.splits(self.capacities.requests)
        partial = self.recipe.columns * (self.spec.v_head_dim + 4) * 4  # RowState of each column, and its O
        return {
            **_step_buffers(self.capacities),
            "items": self.most_items * struct_bytes("decode", "DecodeItem"),
            "partials": most.most_partials * most.ctas_per_item * partial,
            "arrivals": requests * most.ctas_per_item * 4,
        }

    def splits(self, batch_size: int) -> splits.DecodeSplits:
        """How a step of `batch_size` requests may be split."""
        heads, most_tokens = self.spec.num_kv_heads, self.capacities.pages * self.spec.page_size
        return splits.decode_splits(batch_size, heads, self.recipe, self.batch_invariant, most_tokens, self.card)

    def grid(self, batch_size: int) -> int:
        """CTAs of a run."""
        return splits.decode_grid(batch_size, self.splits(batch_size), self.recipe.cluster)


@dataclass(frozen=True)
class PrefillLayout:
    """A plan of prefill. Beside the buffers it needs a status word."""

    spec: AttentionSpec
    page_stride: int
    capacities: Capacities
    card: Card
    recipes: tuple[PrefillRecipe, ...]  # the first that accepts a run serves it

    @property
    def tile_rows(self) -> int:
        """Packed rows of a CTA of the portable kernel; plan_tiles counts for the other."""
        return self.recipes[-1].tile_rows

    @property
    def orders_tiles(self) -> bool:
        """Whether a kernel may run that takes tiles in the order of plan_tiles."""
        return isinstance(self.recipes[0], recipes.HopperPrefillRecipe)

    @property
    def buffers(self) -> dict[str, int]:
        """Bytes by name."""
        buffers = _step_buffers(self.capacities)
        if self.orders_tiles:
            buffers |= {"sorted": buffers["requests"], "claims": 4}
        return buffers


def plan_layout(
    spec: AttentionSpec, page_stride: int, capacities: Capacities, batch_invariant: bool, card: Card
) -> DecodeLayout | PrefillLayout:
    """The layout of plans for steps of one spec."""
    if spec.q_len is not None:
        recipe = recipes.decode_recipe(spec, capacities.requests, batch_invariant, card)
        return DecodeLayout(spec, page_stride, capacities, batch_invariant, card, recipe)
    is_long = capacities.pages * spec.page_size >= recipes.TMA_OUT_TOKENS * capacities.requests
    # Of a batch-invariant plan, the recipe must not depend on what else is in the batch.
    in_order = recipes.prefill_recipes(spec, card, is_long=is_long or batch_invariant)
    return PrefillLayout(spec, page_stride, capacities, card, in_order)


def _step_buffers(capacities: Capacities) -> dict[str, int]:
    """What plan_requests writes: Request records, the last one a sentinel, and page ids."""
    return {
        "requests": (capacities.requests + 1) * struct_bytes("plan_requests", "Request"),
        "page_ids": capacities.pages * 4,
    }
