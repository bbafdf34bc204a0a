"""The numbers that shape a launch: pure functions of a few integers, so that they can be tested without a GPU.

Nothing here looks at sequence lengths. What depends on them is decided on the device, once a step
(kernels/schedule.cu), so a captured graph replays with new lengths. The constants were measured on an H100 where no
other card is named.
"""

import functools
from dataclasses import dataclass

# Warps of a CTA of decode; and, where there are CTAs enough to fill all SMs even so, of one of twice as many on an SM:
# what a CTA does before its first load and behind its last one then hides behind more others (an H200, CTAs of 4 and of
# 8 warps: 512 pairs of a request and a KV head with 64 tokens 13.2 and 18.3 us, 500 tokens 36.4 and 41.7, 4096 tokens
# 244.2 and 243.0, a window of 512 37.1 and 41.8; 2048 pairs, 512 tokens, 129.2 and 132.8. CTAs of 2 warps: 128.2, but
# 408.7 where 4 have 368.1 and 8 have 357.2, for 2048 pairs of which one request is long). Not for rows of 112 dims
# (64 x 4096, 64/8 heads 260 and 251).
DECODE_WARPS, DECODE_WARPS_OF_MANY, MANY_PAIRS = 8, 4, 512

# Places for tiles of K and V that a warp of decode has: two, one for either, as long as others on the SM have loads
# under way meanwhile (an H200: with three, 64 x 4096, 64/8 heads 244.9 us and 244.5, of 64 dims 131.1 and 127.7, 64/2
# heads 80.9 and 74.5; with three or more, 16 x 4096, 32/8 heads 65.8 to 68.5 and 66.1). More pay where a CTA has an SM
# for itself and its rows are short (16 x 4096, 32/8 heads of 64 dims 37.4 and 40.4) or for another block of columns too
# (64 x 4096, 32/1 heads 39.1 and 42.0), and where rows end inside of a line, so that neighbours fetch part of what a
# warp asks for (64 x 4096, 64/8 heads of 80 dims 168.7 and 173.4, of 96 189.7 and 192.3).
STAGES, STAGES_OF_PART_LINES, STAGES_OF_SHARED_ROWS, STAGES_OF_SHORT_ROWS = 2, 3, 3, 4

# CTAs that start together, so that the card spreads them evenly over its parts whatever stands behind them in the grid,
# and that blocks of columns which read the same K and V do so at the same time (an H200, each CTA by itself and in
# twos: 64 x 4096, 64/8 heads 242.9 us and 238.2, 16 x 4096, 32/8 heads 65.5 and 64.8, 24 x 4096 99.0 and 95.3, 64 x
# 4096 of 80 dims 167.8 and 163.5; 64 x 2048 of 8 queries, which are two blocks of columns, 153.6 and 134.6. In fours
# 64 x 4096 takes 272). Not for many short ones, where two have to wait for room (256 x 512 124.3 and 125.6).
CLUSTER, MOST_PAIRS_AN_SM_OF_CLUSTERS = 2, 8

# Requests of about equal length that leave SMs idle are split into one CTA for each SM: with less, SMs are idle, and
# more only add partial states to merge (a trial on an H100 with 132 SMs, 1 x 4096, 32/8 heads: 13.7 us with 128 CTAs,
# with 64 14.4, 192: 14.6, 256: 15.0; 64 x 4096, 16/1 heads: 53.5, with 256 CTAs 54.1). So are those that remain where
# the others give each SM as many CTAs (an H200: 35 x 4096, 32/8 heads: 140 us, all whole 154; 20 x 4096: 85 and 88).
# Ragged requests are cut into pieces, about this many CTAs for each SM: eight for each that runs at a time (an H100,
# 64 requests of 128 to 16000 tokens: 712.8 us; half as many pieces 723.8, a quarter 731.3, whole 741).
RAGGED_CTAS_AN_SM = 16
# Fewer where there are so few CTAs for each SM before the cut: the launch has a CTA for every piece that there may be,
# and those without work cost time, too. In clusters, four for each SM, up to two before the cut (an H200, requests of
# 128 to 8000 tokens, 32/8 heads: 12 58.8 us, with one for each SM 63.9, 16 58.4 and 62.2; 1 x 4096 11.6, with 16 for
# each SM 13.0). Without clusters work then comes two on an SM while others have none (64 x 4096, 16/1 heads 41.2 us,
# with three for each SM 46.7, 32/1 heads 43.3 and 58.5): up to one CTA before the cut no more than SMs, up to two,
# three for each (24 of 128 to 8000 tokens 95.7, with one 99.7, 32 148.5 and 154.1).
RAGGED_CTAS_OF_FEW_IN_CLUSTERS, RAGGED_CTAS_OF_FEW = {1: 4, 2: 4}, {1: 1, 2: 3}
# A batch-invariant plan divides a request among CTAs of so many warps in all, or leaves it whole where its KV heads
# and blocks of columns have more, whatever the card. Bits depend on the warps of a CTA, so these are the same for any
# batch: those of many pairs (an H200: 64 x 4096, 64/8 heads 245.9 us, with CTAs of 8 warps 254.0, without
# batch_invariant 238.4; 256 x 512 124.7, 131.2 and 124.9; but 1 x 32768, 32/8 heads 38.4, 37.0 and 36.9, 1 x 4096
# 13.9, 12.1 and 11.6).
INVARIANT_WARPS = 1024
# It splits a request by its own length alone, and only where each split has so many tokens (TILES_WORTH_A_SPLIT of
# kernels/splits.cu; an H200, CTAs of 8 warps, as many splits for every request and so: 64 x 4096, 64/8 heads 277 us and
# 257; 256 x 512 597 and 140; 1 x 4096, 32/8 heads 13.1 and 13.6).
TOKENS_WORTH_A_SPLIT = 512


@dataclass(frozen=True)
class Card:
    """What there is of a GPU."""

    num_sms: int
    shared_bytes: int  # of an SM
    has_clusters: bool  # neighbouring CTAs may be made to start together


H100 = Card(132, 228 * 1024, True)
CTA_SHARED_BYTES = 1024  # that CUDA takes beside those of the kernel


@dataclass(frozen=True)
class DecodeShape:
    """How the decode kernel is compiled and launched for one combination of q_len, group size and head dims."""

    columns: int  # query rows (token, head) that share one pass over a KV head, a multiple of 8
    column_blocks: int  # passes needed for q_len * group_size rows
    warps: int  # of a CTA
    stages: int  # tiles of K and V that a warp has room for
    shared_bytes: int
    ctas_an_sm: int  # that run at a time, at least
    cluster: int  # neighbouring CTAs that start together

    @property
    def threads(self) -> int:
        return self.warps * 32


def decode_shape(
    q_len: int,
    group_size: int,
    head_dim: int,
    num_pairs: int = 1,
    batch_invariant: bool = False,
    card: Card = H100,
    v_head_dim: int | None = None,
) -> DecodeShape:
    """The kernel's tile for `q_len * group_size` query rows a KV head, of `num_pairs` requests and KV heads in all.

    head_dim is that of q and K; v_head_dim, of V and out, is the same where it is None.
    Of a batch-invariant plan, what bits depend on (columns and warps) does not depend on the number of pairs.
    """
    rows = q_len * group_size
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    widest = max(head_dim, v_head_dim)
    # Every 8 columns cost v_head_dim / 4 accumulator registers a thread and head_dim / 8 of Q; beyond this a kernel
    # would spill.
    most = 32 if widest <= 64 else 16 if widest <= 128 else 8
    columns = min(most, _ceil_div(rows, 8) * 8)
    column_blocks = _ceil_div(rows, columns)
    warps = DECODE_WARPS
    shares_sm = columns == 8 or (head_dim, v_head_dim, columns) == (128, 128, 16)  # by its registers
    if widest > 128 or (shares_sm and widest != 112 and (num_pairs >= MANY_PAIRS or batch_invariant)):
        warps = DECODE_WARPS_OF_MANY
    is_alone = num_pairs * column_blocks <= card.num_sms
    stages = STAGES
    if widest in (80, 96):
        stages = STAGES_OF_PART_LINES
    elif is_alone and widest <= 64:
        stages = STAGES_OF_SHORT_ROWS
    elif is_alone and column_blocks > 1:
        stages = STAGES_OF_SHARED_ROWS
    ctas = (16 if shares_sm and widest <= 128 else 8) // warps  # that the registers of an SM are for
    while True:
        shared_bytes = _decode_shared_bytes(head_dim, v_head_dim, columns, warps, stages)
        if stages == STAGES or ctas * (shared_bytes + CTA_SHARED_BYTES) <= card.shared_bytes:
            break
        stages -= 1
    few = num_pairs <= MOST_PAIRS_AN_SM_OF_CLUSTERS * card.num_sms
    cluster = CLUSTER if card.has_clusters and (column_blocks > 1 or few) else 1
    ctas = min(ctas, card.shared_bytes // (shared_bytes + CTA_SHARED_BYTES))
    return DecodeShape(columns, column_blocks, warps, stages, shared_bytes, ctas, cluster)


def _decode_shared_bytes(head_dim: int, v_head_dim: int, columns: int, warps: int, stages: int) -> int:
    k_tile, v_tile = 16 * head_dim * 2, 16 * v_head_dim * 2  # 16 tokens
    ring = stages * max(k_tile, v_tile) if stages % 2 else stages // 2 * (k_tile + v_tile)
    out = columns * (v_head_dim + 4) * 4
    shared_bytes = warps * (max(ring, out) + columns * 8) + 32
    if (head_dim, v_head_dim, columns) == (128, 128, 16):  # Q_IN_SHARED of the kernel
        shared_bytes = _ceil_div(shared_bytes, 128) * 128 + columns * head_dim * 2
    return shared_bytes


@dataclass(frozen=True)
class DecodeSplits:
    """What the device needs to divide a step among CTAs (kernels/splits.cu), and what its answer may take."""

    ctas_an_item: int  # KV heads * column blocks
    fixed_splits: int  # most splits of a request, by its own length alone; or 0: by all lengths
    ctas_at_a_time: int  # that run on all SMs together
    ragged_ctas: int  # CTAs of a step whose requests are ragged, about; 0 with fixed_splits
    extra_items: int  # items that splitting may add to one for each request; it grows with the batch

    @property
    def most_partials(self) -> int:
        """Items that leave a partial state: a request that is split adds one item at least."""
        return 2 * self.extra_items


def decode_items(batch_size: int, splits: DecodeSplits) -> int:
    """Items that a step may have, and one that fills the grid's last cluster up."""
    return batch_size + splits.extra_items + 1


def decode_grid(batch_size: int, splits: DecodeSplits, cluster: int) -> int:
    """CTAs of a launch: those of all items that a batch may have, in whole clusters."""
    return _ceil_div((batch_size + splits.extra_items) * splits.ctas_an_item, cluster) * cluster


@functools.lru_cache(maxsize=4096)
def decode_splits(
    batch_size: int, num_kv_heads: int, shape: DecodeShape, batch_invariant: bool, max_tokens: int, num_sms: int
) -> DecodeSplits:
    """For requests of up to `max_tokens` in all, on a card with so many SMs.

    A batch-invariant plan splits every request as if it were alone, so that its bits do not depend on others.
    """
    ctas_an_item, at_a_time = num_kv_heads * shape.column_blocks, num_sms * shape.ctas_an_sm
    if batch_invariant:
        splits = max(1, INVARIANT_WARPS // (shape.warps * ctas_an_item))
        extra_items = min(batch_size * (splits - 1), max_tokens // TOKENS_WORTH_A_SPLIT)
        return DecodeSplits(ctas_an_item, splits, at_a_time, 0, extra_items)
    ctas_an_sm = max(1, _ceil_div(batch_size * ctas_an_item, num_sms))
    of_few = RAGGED_CTAS_OF_FEW if shape.cluster == 1 else RAGGED_CTAS_OF_FEW_IN_CLUSTERS
    ragged_ctas = num_sms * of_few.get(ctas_an_sm, RAGGED_CTAS_AN_SM)
    return DecodeSplits(ctas_an_item, 0, at_a_time, ragged_ctas, ragged_ctas // ctas_an_item)


# Results of the Hopper prefill leave by TMA where a plan's pages have room for so many tokens of each request: while
# they do, the Q of the tile after next has to wait, which short tiles do not hide (kernels/tile_results.cuh has the
# figures). Without a capacity the room is the power of two above what a step has: so much, or half of it.
TMA_OUT_TOKENS = 1024


@dataclass(frozen=True)
class PrefillShape:
    """How the portable prefill kernel is compiled and launched for K's and V's dims."""

    tile_rows: int  # packed (token, head of the group) rows a CTA
    threads: int
    shared_bytes: int


def prefill_shape(head_dim: int, v_head_dim: int) -> PrefillShape:
    """The kernel's tile: 32 rows a warp where their accumulators fit into registers, and Q and K into shared memory,
    else 16."""
    wide = v_head_dim > 128 or head_dim > 192
    tile_rows, block = (64, 32) if wide else (128, 64)
    k_row, v_row = 2 * head_dim, 2 * v_head_dim  # bytes; results are stored over Q
    rows = tile_rows * max(k_row, v_row) + block * (k_row + v_row)
    return PrefillShape(tile_rows, 128, rows + 4 * block * 4 + tile_rows * 16)


def prefill_hopper_shape(head_dim: int) -> PrefillShape | None:
    """The Hopper kernel's tile, or None for a head_dim that the portable kernel serves."""
    if not (64 <= head_dim <= 128 or head_dim == 256):
        return None
    # Q, 128 rows, and three blocks each of K and V, 128 rows too, of whole lines of 128 bytes; where rows are wide, two
    # of 64 rows. Then what the rows of Q see, tile records and barriers.
    row, line, rows = 2 * head_dim, 128, 4 * 64 if head_dim > 128 else 6 * 128
    shared_bytes = 128 * row + rows * _ceil_div(row, line) * line + 3072
    return PrefillShape(tile_rows=128, threads=384, shared_bytes=shared_bytes)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
