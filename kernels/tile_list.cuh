// tile_list: the work of a Hopper prefill, tile after tile, in the order of its requests (tiles.cu).
//
// A tile is TILE_ROWS packed rows (page_table.cuh) of a request and a KV head; its tokens are taken in blocks of BLOCK,
// from the last one down, so that blocks with masked tokens come first. A tile whose rows see no token has one block,
// all of it masked.
//
// CTAs stay and claim tile after tile (persistent threads; CUTLASS's persistent tile scheduler, FlashAttention-3's
// longest-first order for causal masks).
#pragma once
#include "convert.cuh"
#include "page_table.cuh"

constexpr int TILE_ROWS = 128;
constexpr int BLOCK = HEAD_DIM > 128 ? 64 : 128;  // tokens
constexpr int SECTION_BYTES = 6 << 20;            // of K and V: tiles that run together share what stays in L2
constexpr int LAST_TILES = 528;                   // tiles of a launch's last section, at least: some for every SM

struct TileList {
    const Request* requests;  // [num_requests + 1] the longest first; the last record is a sentinel without keys, whose
                              // first_tile counts the tiles of all requests, first_query their rows
    Positions positions;
    FastDivide group_size;
    int num_requests;  // capacity: requests beside the sentinel
    int num_kv_heads;
    int q_rows;
    int num_tiles;  // upper bound of the tiles of one KV head, times num_kv_heads < 2^31
};

struct __align__(16) Tile {
    Request request;
    int kv_head;
    int first_row;  // packed rows [first_row, first_row + TILE_ROWS) of the request ...
    int num_rows;   // ... which has this many of them in q
    int begin;      // tokens [begin, end) are seen by some row
    int end;
    int first_block;  // blocks first_block .. first_block + num_blocks - 1 hold them
    int num_blocks;   // 0: there is no further tile
};
static_assert(sizeof(Tile) == 64, "as the kernel lays them out");

// The token of a tile's row; rows past the request's last one count as that one.
__device__ __forceinline__ int token_of(const Tile& tile, int row, const FastDivide& group_size) {
    const int packed = tile.first_row + row, last = tile.num_rows - 1;
    return packed_row(packed < last ? packed : last > 0 ? last : 0, group_size).token;
}

// The number of pieces of work: the tiles of the planned rows, then those of the rows of q past them; never more than
// such a q can have.
__device__ __forceinline__ int count_work(const TileList& list) {
    const Request total = list.requests[list.num_requests];
    const i64 rows_past = list.q_rows > total.first_query ? list.q_rows - total.first_query : 0;
    const i64 num_tiles = total.first_tile + (rows_past * list.group_size.divisor + TILE_ROWS - 1) / TILE_ROWS;
    return int(num_tiles < list.num_tiles ? num_tiles : list.num_tiles) * list.num_kv_heads;
}

// Piece of work number `work` of `num_work`, the same in all lanes. A request's tiles come longest first, for a few KV
// heads at a time, as many as L2 keeps; heads vary fastest.
__device__ __forceinline__ Tile find_tile(const TileList& list, int work, int num_work) {
    Tile tile = {};
    if (work >= num_work) return tile;
    const int index = find_request(list.requests, list.num_requests, u32(work) / u32(list.num_kv_heads));
    tile.request = list.requests[index];
    Request& request = tile.request;
    const int group_size = int(list.group_size.divisor);
    const int rows_left = list.q_rows > request.first_query ? list.q_rows - request.first_query : 0;
    if (index == list.num_requests) request.num_queries = rows_left;
    tile.num_rows = (request.num_queries < rows_left ? request.num_queries : rows_left) * group_size;

    const u32 num_tiles = u32(tile.num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const u32 offset = u32(work) - u32(request.first_tile) * u32(list.num_kv_heads);
    tile.num_blocks = 1;
    if (offset >= num_tiles * u32(list.num_kv_heads)) {  // rows that q does not have: a wrong qo_indptr
        tile.num_rows = 0;
        return tile;
    }
    constexpr int SECTION_TOKENS = SECTION_BYTES / (4 * HEAD_DIM);
    u32 heads = request.kv_len > 0 ? SECTION_TOKENS / u32(request.kv_len) : list.num_kv_heads;
    // The tiles of a section come longest first: a last section of few tiles leaves SMs idle (trial 207).
    const bool alone = num_work >= LAST_TILES && u32(num_work) == num_tiles * u32(list.num_kv_heads);
    const u32 least = alone ? (LAST_TILES + num_tiles - 1) / num_tiles : 1;
    heads = heads < least ? least : heads;
    heads = heads < u32(list.num_kv_heads) ? heads : list.num_kv_heads;
    const u32 section = offset / (heads * num_tiles), within = offset - section * heads * num_tiles;
    const u32 heads_left = list.num_kv_heads - section * heads, here = heads < heads_left ? heads : heads_left;
    tile.kv_head = int(section * heads + within % here);
    tile.first_row = int(num_tiles - 1 - within / here) * TILE_ROWS;

    // Limits grow with the token: the first row has the smallest, the last one the largest.
    tile.begin = kv_limits(token_of(tile, 0, list.group_size), request, list.positions).begin;
    tile.end = kv_limits(token_of(tile, TILE_ROWS - 1, list.group_size), request, list.positions).end;
    if (tile.begin < tile.end) {
        tile.first_block = tile.begin / BLOCK;
        tile.num_blocks = (tile.end + BLOCK - 1) / BLOCK - tile.first_block;
    }
    return tile;
}
