"""How much a step of decode may be split: the numbers that kernels/splits.cu divides requests among CTAs by.

Pure functions of the batch size and a recipe. Sequence lengths are divided on the device, once a step, so a captured
graph replays with new lengths.
"""

from dataclasses import dataclass

from .card import Card
from .recipes import DecodeRecipe

# Requests of about equal length that leave SMs idle are split into one CTA for each SM, and so are those that remain
# where the others give each SM as many CTAs: more would only add partial states to merge (trials 24 and 33). Ragged
# requests are cut into pieces, about this many CTAs for each SM, so that no SM waits for a long one (trials 26, 34).
RAGGED_CTAS_PER_SM = 16
# Small batches use fewer pieces: the grid is sized for the worst case, and idle CTAs are not free. By CTAs for each SM
# before the cut. Without clusters, idle CTAs leave SMs with two pieces beside SMs with none (trial 29).
RAGGED_CTAS_PER_SM_SMALL_CLUSTERED, RAGGED_CTAS_PER_SM_SMALL_UNCLUSTERED = {1: 4, 2: 4}, {1: 1, 2: 3}

# A batch-invariant plan divides a request among CTAs of so many warps in all, or leaves it whole where its KV heads and
# blocks of columns have more, whatever the card (trial 32).
INVARIANT_WARPS = 1024
# It splits a request by the length of that request alone, and only where each split has so many tokens
# (TILES_WORTH_A_SPLIT of kernels/splits.cu; trial 31).
TOKENS_WORTH_A_SPLIT = 512


@dataclass(frozen=True)
class DecodeSplits:
    """What the device needs to divide a step among CTAs, and what its answer may take."""

    ctas_per_item: int  # KV heads * column blocks
    fixed_splits: int  # most splits of a request, by the request's length alone; or 0: by all lengths
    ctas_at_a_time: int  # that run on all SMs together
    ragged_ctas: int  # CTAs of a step whose requests are ragged, about; 0 with fixed_splits
    extra_items: int  # items that splitting may add to one for each request; it grows with the batch

    @property
    def most_partials(self) -> int:
        """Items that leave a partial state: a request that is split adds one item at least."""
        return 2 * self.extra_items


def decode_splits(
    batch_size: int, num_kv_heads: int, recipe: DecodeRecipe, batch_invariant: bool, max_tokens: int, card: Card
) -> DecodeSplits:
    """For requests of up to `max_tokens` in all.

    A batch-invariant plan splits every request as if it were alone, so that its bits do not depend on others.
    """
    ctas_per_item, at_a_time = num_kv_heads * recipe.column_blocks, card.num_sms * recipe.ctas_per_sm
    if batch_invariant:
        splits = max(1, INVARIANT_WARPS // (recipe.warps * ctas_per_item))
        extra_items = min(batch_size * (splits - 1), max_tokens // TOKENS_WORTH_A_SPLIT)
        return DecodeSplits(ctas_per_item, splits, at_a_time, 0, extra_items)
    ctas_per_sm = max(1, -(-batch_size * ctas_per_item // card.num_sms))
    is_clustered = recipe.cluster > 1
    of_small = RAGGED_CTAS_PER_SM_SMALL_CLUSTERED if is_clustered else RAGGED_CTAS_PER_SM_SMALL_UNCLUSTERED
    ragged_ctas = card.num_sms * of_small.get(ctas_per_sm, RAGGED_CTAS_PER_SM)
    return DecodeSplits(ctas_per_item, 0, at_a_time, ragged_ctas, ragged_ctas // ctas_per_item)


def decode_items(batch_size: int, splits: DecodeSplits) -> int:
    """Items that a step may have, and one that fills the grid's last cluster up."""
    return batch_size + splits.extra_items + 1


def decode_grid(batch_size: int, splits: DecodeSplits, cluster: int) -> int:
    """CTAs of a launch: those of all items that a batch may have, in whole clusters."""
    return -(-(batch_size + splits.extra_items) * splits.ctas_per_item // cluster) * cluster
