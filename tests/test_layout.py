"""Layout and PagedKV: what the tag says, that nothing is copied, and that a disagreement is an error."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa

NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM = 5, 4, 2, 16
SHAPES = {
    "NHD": (NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM),
    "HND": (NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM),
}


def random_pool(xp, shape: tuple[int, ...], dtype=np.float16):
    return xp.asarray(np.random.default_rng(0).standard_normal(shape).astype(dtype))


def to_numpy(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def test_an_axis_of_one_has_no_stride() -> None:
    """Nothing is found by it, so it may be anything: that of a reversed axis, or too large for a kernel to count in."""
    pages = random_pool(np, (NUM_PAGES, PAGE_SIZE, 1, HEAD_DIM))
    kv = pa.PagedKV(pages[:, :, ::-1], pages, layout="NHD")
    assert kv.k_strides == kv.v_strides == (PAGE_SIZE * HEAD_DIM * 2, HEAD_DIM * 2, 0)


def test_a_pool_is_frozen(xp) -> None:
    """What was derived from its arrays stays true: no attribute can be assigned or deleted."""
    kv = pa.PagedKV(random_pool(xp, SHAPES["NHD"]), random_pool(xp, SHAPES["NHD"]), layout="NHD")
    combined = pa.PagedKV.combined(random_pool(xp, (NUM_PAGES, 2, *SHAPES["NHD"][1:])), layout="NHD")
    for pool in (kv, combined, kv.to_layout("HND")):
        before = {name: getattr(pool, name) for name in (*vars(pool), "device", "signature")}
        for name in (*before, "other"):
            with pytest.raises(AttributeError, match=rf"PagedKV\.{name} cannot be assigned: .*make another PagedKV"):
                setattr(pool, name, pool.k_pages[:1])
            with pytest.raises(AttributeError, match="make another PagedKV"):
                delattr(pool, name)
        assert all(getattr(pool, name) is value for name, value in before.items())
        assert pool.writable


def test_a_pool_holds_whatever_has_a_shape() -> None:
    """Stand-ins for arrays, as jax.jit has them: nothing is checked, and what can be derived is."""
    shape = jax.ShapeDtypeStruct(SHAPES["NHD"], np.float16)
    kv = pa.PagedKV.__new__(pa.PagedKV)
    kv._set(k_pages=shape, v_pages=object(), layout=pa.Layout.NHD, writable=False, loan=None)
    assert (kv.num_pages, kv.page_size, kv.num_kv_heads, kv.head_dim) == (5, 4, 2, 16)
    assert kv.dtype == np.float16
    assert repr(kv) == f"PagedKV(k_pages={kv.k_pages!r}, v_pages={kv.v_pages!r}, layout='NHD')"
    table = pa.PageTable.__new__(pa.PageTable)
    table._set(indptr=shape, indices=shape, last_page_len=object(), page_size=4)
    assert repr(table) == f"PageTable(indptr={shape!r}, indices={shape!r}, page_size=4)"
    with pytest.raises(AttributeError, match="k_pages cannot be assigned"):
        kv.k_pages = shape


def test_a_pool_can_be_copied() -> None:
    kv = pa.PagedKV(*(random_pool(np, SHAPES["HND"]) for _ in "kv"), layout="HND")
    assert kv.signature
    assert "signature" not in vars(copy.deepcopy(kv)), "a copy's arrays are others"
    for other in (copy.copy(kv), copy.deepcopy(kv), pickle.loads(pickle.dumps(kv))):
        assert other.signature == kv.signature and other.layout is pa.Layout.HND
        np.testing.assert_array_equal(other.v_pages, kv.v_pages)


def test_a_pool_whose_k_and_v_overlap_is_read_only(xp) -> None:
    """K and V of one memory (a latent pool, say) are read as they are; append would write one over the other."""
    pages = random_pool(xp, SHAPES["NHD"])
    tokens = xp.ones((1, NUM_KV_HEADS, HEAD_DIM), np.float16)
    for v_pages in (pages, pages[:]):
        kv = pa.PagedKV(pages, v_pages, layout="NHD")
        assert not kv.writable
        with pytest.raises(ValueError, match=r"kv cannot be written: .*its K and V overlap"):
            pa.append(kv, np.zeros(1, np.int64), tokens, tokens)
    turns = random_pool(xp, (NUM_PAGES, PAGE_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM))
    assert pa.PagedKV(turns[:, :, ::2], turns[:, :, 1::2], layout="NHD").writable
    assert not pa.PagedKV(turns[:, :, :2], turns[:, :, 1:3], layout="NHD").writable


@pytest.mark.parametrize("layout", ["NHD", "HND", pa.Layout.NHD, pa.Layout.HND])
def test_the_tag_gives_the_names(xp, layout: str) -> None:
    k_pages, v_pages = random_pool(xp, SHAPES[layout]), random_pool(xp, SHAPES[layout])
    kv = pa.PagedKV(k_pages, v_pages, layout=layout)
    assert (kv.num_pages, kv.page_size, kv.num_kv_heads, kv.head_dim) == (5, 4, 2, 16)
    assert kv.layout is pa.Layout(layout)
    assert kv.layout == str(layout)
    assert kv.dtype == np.float16
    assert kv.device == ("cpu" if xp is np else "cuda:0")
    assert kv.k_pages is k_pages
    assert kv.v_pages is v_pages
    assert kv.writable
    assert repr(kv) == (
        f"PagedKV(num_pages=5, page_size=4, num_kv_heads=2, head_dim=16, dtype=float16, "
        f"layout='{layout}', device='{kv.device}')"
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strides_find_a_token_in_either_layout(xp, layout: str) -> None:
    """A view of a larger pool: every other page, the middle slots, K and V of different strides."""
    larger = random_pool(xp, (2 * NUM_PAGES, 3, *SHAPES[layout][1:]))
    k_pages, v_pages = larger[::2, 0], larger[1::2, 2]
    kv = pa.PagedKV(k_pages, v_pages, layout=layout)
    flat = to_numpy(larger).ravel()
    page, slot, head = 3, 2, 1
    for pages, strides in ((kv.k_pages, kv.k_strides), (kv.v_pages, kv.v_strides)):
        offset = int(_address(pages)) - int(_address(larger))
        start = (offset + page * strides[0] + slot * strides[1] + head * strides[2]) // 2
        place = (page, slot, head) if layout == "NHD" else (page, head, slot)
        np.testing.assert_array_equal(flat[start : start + HEAD_DIM], to_numpy(pages)[place])


def _address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_combined_pools_are_views(xp, layout: str) -> None:
    kv_pages = random_pool(xp, (NUM_PAGES, 2, *SHAPES[layout][1:]))
    kv = pa.PagedKV.combined(kv_pages, layout=layout)
    assert (kv.num_pages, kv.page_size, kv.num_kv_heads) == (5, 4, 2)
    kv.v_pages[3] = 9
    assert (to_numpy(kv_pages)[3, 1] == 9).all()
    assert not (to_numpy(kv_pages)[3, 0] == 9).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("target", ["NHD", "HND"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_to_layout_copies(xp, layout: str, target: str, dtype: type) -> None:
    kv = pa.PagedKV(random_pool(xp, SHAPES[layout], dtype), random_pool(xp, SHAPES[layout], dtype), layout=layout)
    before = to_numpy(kv.k_pages).copy()
    copy = kv.to_layout(target)
    assert copy.layout == target
    assert copy.k_pages.shape == SHAPES[target]
    assert copy.dtype == dtype
    assert copy.device == kv.device
    assert copy.k_pages.flags.c_contiguous
    assert copy.writable
    expected = before if layout == target else before.swapaxes(1, 2)
    np.testing.assert_array_equal(to_numpy(copy.k_pages), expected)
    copy.k_pages[...] = 0
    np.testing.assert_array_equal(to_numpy(kv.k_pages), before)


def test_jax_pools_can_be_read_and_not_written() -> None:
    k_pages = jnp.ones(SHAPES["NHD"], jnp.bfloat16)
    kv = pa.PagedKV(k_pages, k_pages, layout="NHD")
    assert kv.k_pages.ctypes.data == k_pages.unsafe_buffer_pointer()
    assert not kv.writable
    assert kv.to_layout("HND").writable
    assert not pa.PagedKV.combined(jnp.ones((5, 2, 4, 2, 16)), layout="NHD").writable


def test_a_pool_of_no_page_and_axes_of_extent_one(xp) -> None:
    """An extent of 1 may have any stride: a pool of one page is how contiguous K and V of one request come in."""
    none = pa.PagedKV(xp.zeros((0, 4, 2, 16), np.float16), xp.zeros((0, 4, 2, 16), np.float16), layout="NHD")
    assert none.num_pages == 0
    backwards = xp.zeros((1, 4, 2, 16), np.float16)[:0, ::-1]
    assert pa.PagedKV(backwards, backwards, layout="NHD").k_strides == (0, 0, 0)
    odd = xp.zeros(3 * 16 + 8, np.float16)
    view = xp.lib.stride_tricks.as_strided(odd, shape=(1, 3, 1, 16), strides=(2, 32, 6, 2))
    assert pa.PagedKV(view, view, layout="NHD").k_strides == (0, 32, 0)  # which no kernel has to count in


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["base", "stride"])
def test_a_gpu_pool_is_aligned(what: str) -> None:
    import cupy

    good = cupy.zeros((5, 4, 2, 16), np.float16)
    flat = cupy.zeros(5 * 4 * 2 * 20 + 8, np.float16)
    if what == "base":
        bad = flat[1 : 1 + good.size].reshape(good.shape)
    else:
        bad = flat[: 5 * 4 * 2 * 20].reshape(5, 4, 2, 20)[..., :16]
    message = "begins at address 0x" if what == "base" else "has a stride of 40 bytes along axis 2"
    with pytest.raises(ValueError, match=f"v_pages {message}.* no multiple of 16"):
        pa.PagedKV(good, bad, layout="NHD")


# -- disagreement ----------------------------------------------------------------------------------------------------


def two_requests(xp, pool_layout: str, tag: str, *, page_size: int, num_kv_heads: int):
    """Two requests of 512 tokens in a pool of one layout that is tagged with another, and q of 64 heads."""
    pages_each = 512 // page_size
    shape = (page_size, num_kv_heads, 128) if pool_layout == "NHD" else (num_kv_heads, page_size, 128)
    pool = random_pool(xp, (2 * pages_each, *shape))
    table = pa.PageTable(
        np.array([0, pages_each, 2 * pages_each], np.int32),
        np.arange(2 * pages_each, dtype=np.int32),
        np.full(2, page_size, np.int32),
        page_size=page_size,
    )
    return random_pool(xp, (2, 64, 128)), pa.PagedKV(pool, pool, layout=tag), table


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("pool_layout", "tag"), [("NHD", "HND"), ("HND", "NHD")])
def test_the_hang_of_other_libraries_is_an_error(xp, pool_layout: str, tag: str) -> None:
    """The call that loops for ever elsewhere (32 slots and 8 heads read as 8 and 32), once and in a loop."""
    q, kv, table = two_requests(xp, pool_layout, tag, page_size=32, num_kv_heads=8)
    message = rf"kv is tagged {tag}.*page_size=8.*the table has page_size=32.*tag the pool layout='{pool_layout}'"
    plan = pa.BatchDecodeWithPagedKVCache()
    for _ in range(100):
        with pytest.raises(pa.LayoutMismatchError, match=message):
            pa.decode(q, kv, table)
        with pytest.raises(pa.LayoutMismatchError, match=message):
            plan.plan(kv, table, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("pool_layout", "tag"), [("NHD", "HND"), ("HND", "NHD")])
def test_a_mismatch_is_an_error_while_a_graph_is_captured(pool_layout: str, tag: str) -> None:
    import cupy

    q, kv, table = two_requests(cupy, pool_layout, tag, page_size=32, num_kv_heads=8)
    right = pa.PagedKV(kv.k_pages, kv.v_pages, layout=pool_layout)
    on_device = pa.PageTable(*map(cupy.asarray, (table.indptr, table.indices, table.last_page_len)), page_size=32)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=2, max_pages=32)
    plan.plan(right, on_device, 64)
    out = cupy.empty_like(q)
    plan.run(q, right, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(pa.LayoutMismatchError, match=f"the shape fits layout {pool_layout}"):
            plan.plan(kv, on_device, 64)
        with pytest.raises(
            pa.LayoutMismatchError, match=f"kv has layout {tag} and the plan was made for {pool_layout}"
        ):
            plan.run(q, kv, out=out)
        stream.end_capture()


@pytest.mark.parametrize(("planned", "called"), [("NHD", "HND"), ("HND", "NHD")])
def test_tags_are_compared_where_shapes_agree(xp, planned: str, called: str) -> None:
    """page_size == num_kv_heads: the shapes are the same, and only the tags can tell."""
    q, kv, table = two_requests(xp, planned, planned, page_size=8, num_kv_heads=8)
    other = pa.PagedKV(kv.k_pages, kv.v_pages, layout=called)
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, table, 64)
    with pytest.raises(
        pa.LayoutMismatchError,
        match=rf"kv has layout {called} and the plan was made for {planned}.*to_layout\('{planned}'\)",
    ):
        plan.run(q, other)
    prefill = pa.BatchPrefillWithPagedKVCache()
    prefill.plan(kv, table, np.array([0, 1, 2], np.int32), 64)
    with pytest.raises(pa.LayoutMismatchError, match=f"kv has layout {called} and the plan was made for {planned}"):
        prefill.run(q, other)
    np.testing.assert_allclose(to_numpy(plan.run(q, kv)), to_numpy(pa.decode(q, kv, table)), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_fitting_layout_is_named(xp, layout: str) -> None:
    """By plan, by run with a pool of swapped axes, by append; and neither layout is named where neither fits."""
    kv = pa.PagedKV(random_pool(xp, SHAPES[layout]), random_pool(xp, SHAPES[layout]), layout=layout)
    other = "HND" if layout == "NHD" else "NHD"
    wrong = pa.PagedKV(random_pool(xp, SHAPES[other]), random_pool(xp, SHAPES[other]), layout=layout)
    table = pa.PageTable(*(np.array(x, np.int32) for x in ([0, 1], [0], [4])), page_size=4)
    q = random_pool(xp, (1, 4, 16))
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, table, 4)
    with pytest.raises(pa.LayoutMismatchError, match=f"kv is tagged {layout}.*the shape fits layout {other}"):
        plan.run(q, wrong)
    with pytest.raises(pa.LayoutMismatchError, match=f"k has 2 heads .*the shapes fit layout {other}"):
        pa.append(wrong, xp.zeros(3, np.int64), xp.zeros((3, 2, 16), np.float16), xp.zeros((3, 2, 16), np.float16))
    eight = pa.PageTable(table.indptr, table.indices, table.last_page_len, page_size=8)
    with pytest.raises(pa.LayoutMismatchError, match="the table has page_size=8; neither layout fits"):
        pa.decode(q, kv, eight)


def test_what_the_message_says_to_do_works(xp) -> None:
    """A pool and a table of another page_size: both readings are named, and the right one gives the right result."""
    rng = np.random.default_rng(0)
    k, v = (xp.asarray(rng.standard_normal((10, 2, 16, 8, 64)).astype(np.float16)[:, 0]) for _ in "kv")
    kv = pa.PagedKV(k, v, layout="NHD")
    q = xp.asarray(rng.standard_normal((1, 8, 64)).astype(np.float16))
    arrays = [np.array(x, np.int32) for x in ([0, 2], [3, 5], [8])]
    with pytest.raises(pa.LayoutMismatchError) as raised:
        pa.decode(q, kv, pa.PageTable(*arrays, page_size=8))
    assert "tag the pool layout='HND'" in str(raised.value)
    assert "if it was written as NHD, pass a table that was made with page_size=16" in str(raised.value)
    dense = [to_numpy(pages)[[3, 5]].reshape(-1, 8, 64)[:24] for pages in (k, v)]
    right = pa.single_decode(to_numpy(q)[0], *dense, layout="NHD")
    out = pa.decode(q, kv, pa.PageTable(*arrays, page_size=16))
    np.testing.assert_allclose(to_numpy(out)[0], right, rtol=2e-3, atol=1e-3)
    # A layer whose tag is wrong, by a plan: tagged and copied as the message says, it runs.
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, pa.PageTable(*arrays, page_size=16), 8)
    hnd = kv.to_layout("HND")
    with pytest.raises(pa.LayoutMismatchError, match=r"tag the pool layout='HND' and pass kv\.to_layout\('NHD'\)"):
        plan.run(q, pa.PagedKV(hnd.k_pages, hnd.v_pages, layout="NHD"))
    tagged = pa.PagedKV(hnd.k_pages, hnd.v_pages, layout="HND")
    np.testing.assert_array_equal(to_numpy(plan.run(q, tagged.to_layout("NHD"))), to_numpy(plan.run(q, kv)))
    # One whose shape does not fit under its own tag is not to be copied.
    with pytest.raises(pa.LayoutMismatchError) as raised:
        plan.run(q, pa.PagedKV(k, v, layout="HND"))
    assert "tag the pool layout='NHD'" in str(raised.value) and "to_layout" not in str(raised.value)


def test_a_combined_pool_whose_k_and_v_are_the_same_memory_is_read_only() -> None:
    pages = np.broadcast_to(np.ones((2, 1, 4, 1, 16), np.float32), (2, 2, 4, 1, 16))
    same = np.lib.stride_tricks.as_strided(np.ones((2, 1, 4, 1, 16), np.float32), (2, 2, 4, 1, 16), (256, 0, 64, 64, 4))
    for pool in (pages, same):
        assert not pa.PagedKV.combined(pool, layout="NHD").writable
