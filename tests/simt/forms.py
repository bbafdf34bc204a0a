"""Calls whose arrays change their form from one to the next, on the SIMT shim's card, and the reference's answers.

A launch keeps what a form decides (strides, rows, dtypes) and gets new addresses only. Prints how many calls were made
and which went wrong.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

import paged_attn as pa  # noqa: E402
from tests import cases  # noqa: E402

ROUNDS = 40


def strided(array: np.ndarray, padding: int) -> Any:
    """The array on the card, `padding` elements behind each of its rows (heads, where it is 32 or more)."""
    axis = -1 if padding >= 32 else -2
    shape = list(array.shape)
    shape[axis] += 16 if axis == -1 else 1
    wide = cupy.asarray(np.zeros(shape, array.dtype))
    view = wide[..., : array.shape[-1]] if axis == -1 else wide[..., : array.shape[-2], :]
    view.host[...] = array
    return view


def given(array: np.ndarray, rng: np.random.Generator) -> Any:
    return cupy.asarray(array) if rng.random() < 0.5 else strided(array, int(rng.choice([1, 32])))


def attentions(rng: np.random.Generator) -> Iterator[bool]:
    """Two batches in turn through one plan each of decode and prefill: whether a run was right."""
    made = [
        cases.build(
            cases.Case(f"forms{i}", kv_lens, num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=q)
        )
        for i, (kv_lens, q) in enumerate([((9, 3), None), ((5, 1, 14), None), ((9, 3), (2, 3)), ((6,), (4,))])
    ]
    decode = pa.BatchDecodeWithPagedKVCache(max_batch_size=3, max_pages=16)
    prefill = pa.BatchPrefillWithPagedKVCache()
    planned: dict[bool, Any] = {}
    for _ in range(ROUNDS):
        is_decode = rng.random() < 0.5
        if is_decode not in planned or rng.random() < 0.3:
            inputs = planned[is_decode] = made[int(rng.integers(2)) + (0 if is_decode else 2)]
            table = inputs.table(cupy.asarray)
            if is_decode:
                decode.plan(inputs.kv(cupy.asarray), table, 4)
            else:
                prefill.plan(inputs.kv(cupy.asarray), table, cupy.asarray(inputs.qo_indptr), 4)
        inputs = planned[is_decode]
        dtype, with_lse = rng.choice(["float16", "float32"]), rng.random() < 0.5
        q = given(inputs.q, rng)
        out = cupy.empty(inputs.q.shape, dtype)
        lse = cupy.empty(inputs.q.shape[:-1], np.float32) if with_lse else None
        kv = pa.PagedKV(*(given(pages, rng) for pages in (inputs.k_pages, inputs.v_pages)), layout="NHD")
        (decode if is_decode else prefill).run(q, kv, out=out, lse=lse)
        if is_decode:
            right = pa.decode(inputs.q, inputs.kv(), inputs.table(), return_lse=True)
        else:
            right = pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), return_lse=True)
        good = np.allclose(out.host.astype(np.float32), right[0].astype(np.float32), rtol=0.01, atol=0.01)
        yield good and (lse is None or np.allclose(lse.host, right[1], atol=1e-3))


def growing_steps(rng: np.random.Generator) -> Iterator[bool]:
    """The same arrays by plans whose buffers have to grow from step to step, and new launches with them."""
    inputs = cases.build(cases.Case("forms_grow", (9, 3), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4))
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    q, kv, out = cupy.asarray(inputs.q), inputs.kv(cupy.asarray), cupy.empty(inputs.q.shape, np.float16)
    ragged, indptr = cupy.empty(inputs.q.shape, np.float16), np.arange(3, dtype=np.int32)
    decode, prefill = pa.BatchDecodeWithPagedKVCache(), pa.BatchPrefillWithPagedKVCache()
    for entries in (4, 5, 9, 40, 9):
        indices = np.zeros(entries, np.int32)
        indices[: inputs.indptr[-1]] = inputs.indices[: inputs.indptr[-1]]
        arrays = (cupy.asarray(array) for array in (inputs.indptr, indices, inputs.last_page_len))
        table = pa.PageTable(*arrays, page_size=4)
        decode.plan(kv, table, 4)
        prefill.plan(kv, table, cupy.asarray(indptr), 4)
        for plan, result in ((decode, out), (prefill, ragged)):
            result.host[...] = np.nan
            plan.run(q, kv, out=result)
            yield np.allclose(result.host.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01)


def appends(rng: np.random.Generator) -> Iterator[bool]:
    """Numbers of tokens, strides and pools in turn: whether an append was right."""
    for _ in range(ROUNDS):
        heads, tokens = int(rng.choice([1, 2])), int(rng.integers(1, 7))
        zeros = np.zeros((4, 4, heads, 16), np.float16)
        pools = [
            pa.PagedKV(cupy.asarray(zeros), given(zeros, rng), layout="NHD"),
            pa.PagedKV(zeros, zeros.copy(), layout="NHD"),
        ]
        slots = rng.permutation(16)[:tokens]
        k, v = rng.standard_normal((2, tokens, heads, 16)).astype(np.float16)
        slots = slots.astype(rng.choice([np.int64, np.int32]))
        pa.append(pools[0], slots if rng.random() < 0.3 else cupy.asarray(slots), given(k, rng), given(v, rng))
        pa.append(pools[1], slots, k, v)
        yield all(
            np.array_equal(getattr(pools[0], name).host, getattr(pools[1], name)) for name in ("k_pages", "v_pages")
        )


def shifted(array: np.ndarray, num_bytes: int) -> Any:
    """The array on the card, `num_bytes` behind a multiple of 16 bytes; its shape and strides are the same for any."""
    memory = cupy.empty(array.nbytes + card.ALIGNMENT, np.uint8)
    view = memory[num_bytes : num_bytes + array.nbytes].view(array.dtype).reshape(array.shape)
    view.host[...] = array
    return view


def is_refused(call: Callable[..., Any], *arguments: Any, says: str, **more: Any) -> bool:
    try:
        call(*arguments, **more)
    except ValueError as error:
        return says in str(error)
    return False


def refusals(rng: np.random.Generator) -> Iterator[bool]:
    """What differs from a right call before it in its addresses or its pool alone: whether it is refused."""
    inputs = cases.build(cases.Case("refusals", (9, 3), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4))
    kv, q, out = inputs.kv(cupy.asarray), shifted(inputs.q, 0), cupy.empty(inputs.q.shape, np.float16)
    lse = cupy.empty(inputs.q.shape[:-1], np.float32)
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, inputs.table(cupy.asarray), 4)
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    pool = kv.v_pages.reshape(-1)

    def run(q: Any, out: Any, lse: Any = None) -> None:
        plan.run(q, kv, out=out, lse=lse)

    memory = cupy.empty((3, *inputs.q.shape[1:]), np.float16)
    memory.host[:2] = inputs.q
    for results in ((out,), (out, lse)):  # a right call, so that its form is known
        run(q, *results)
        yield np.allclose(out.host.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01)
        more = results[1:]
        yield is_refused(run, shifted(inputs.q, 2), *results, says="q begins at address")
        yield is_refused(run, q, shifted(inputs.q, 2), *more, says="out begins at address")
        yield is_refused(run, q, q, *more, says="out overlaps q")
        yield is_refused(run, memory[:2], memory[1:], *more, says="out overlaps q")
        yield is_refused(run, q, pool[128:256].reshape(q.shape), *more, says="out overlaps kv.v_pages")
    run(q, out, lse)
    for place, says in ((q, "lse overlaps q"), (kv.k_pages, "lse overlaps kv.k_pages"), (out, "out overlaps lse")):
        yield is_refused(run, q, out, place.reshape(-1)[16:32].view(np.float32).reshape(2, 4), says=says)
    before = [kv.k_pages.get(), kv.v_pages.get()]
    slots, tokens = cupy.asarray(np.array([3, -1])), rng.standard_normal((2, 2, 16)).astype(np.float16)
    k, v = shifted(tokens, 0), cupy.asarray(tokens)
    pa.append(kv, slots, k, v)
    kv.k_pages.host[...], kv.v_pages.host[...] = before
    both = pa.PagedKV(kv.k_pages, kv.k_pages, layout="NHD")
    yield both.signature == kv.signature
    yield is_refused(pa.append, both, slots, k, v, says="kv cannot be written")
    for name, says, array in (
        ("k", "k begins at address", shifted(tokens, 2)),
        ("v", "v begins at address", shifted(tokens, 2)),
        ("k", "k overlaps kv.v_pages", kv.v_pages[0, 1:3]),
        ("v", "v overlaps kv.k_pages", kv.k_pages[0, 1:3]),
        ("slots", "slots overlaps kv.k_pages", pool_slots(kv.k_pages)),
    ):
        pa.append(kv, slots, k, v)
        kv.k_pages.host[...], kv.v_pages.host[...] = before
        yield is_refused(pa.append, **({"kv": kv, "slots": slots, "k": k, "v": v} | {name: array}), says=says)
    yield [kv.k_pages.get().tobytes(), kv.v_pages.get().tobytes()] == [pages.tobytes() for pages in before]


def pool_slots(pages: Any) -> Any:
    """Slots of the form that the right call had, in a pool's memory."""
    return pages.reshape(-1)[:8].view(np.int64)


def failed_plans(rng: np.random.Generator) -> Iterator[bool]:
    """A plan whose buffers cannot be made: whether the step before is still run, and the next one is."""
    small, large = (
        cases.build(
            cases.Case(f"failed{i}", kv_lens, num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=(2,) * i)
        )
        for i, kv_lens in ((1, (9,)), (4, (90, 30, 7, 60)))
    )
    make = cupy.empty
    for is_decode in (True, False):
        plan: Any = pa.BatchDecodeWithPagedKVCache() if is_decode else pa.BatchPrefillWithPagedKVCache()

        def step(inputs: Any, plan: Any = plan, is_decode: bool = is_decode) -> None:
            arguments = () if is_decode else (cupy.asarray(inputs.qo_indptr),)
            plan.plan(
                inputs.kv(cupy.asarray), inputs.table(cupy.asarray), *arguments, 4, **{"q_len": 2} if is_decode else {}
            )

        def is_right(inputs: Any, plan: Any = plan, is_decode: bool = is_decode) -> bool:
            q = inputs.q.reshape(-1, 2, *inputs.q.shape[1:]) if is_decode else inputs.q
            out = plan.run(cupy.asarray(q), inputs.kv(cupy.asarray)).host.reshape(inputs.q.shape)
            right = pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table())
            return np.allclose(out.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01)

        made: list[Any] = []  # the buffers of the first step, which must live on

        def keep(shape: Any, dtype: Any, made: list[Any] = made) -> Any:
            array = make(shape, dtype)
            made.append(weakref.ref(array))
            return array

        cupy.empty = keep
        step(small)
        cupy.empty = make
        made[:] = [reference for reference in made if reference() is not None]
        yield is_right(small) and len(made) > 2
        for succeed in range(4):
            left = [succeed]

            def fail(shape: Any, dtype: Any, left: list[int] = left) -> Any:
                if np.dtype(dtype) == np.uint8 and np.prod(shape) > 16:  # a buffer of a plan
                    left[0] -= 1
                    if left[0] < 0:
                        raise MemoryError("the card is full")
                return make(shape, dtype)

            cupy.empty = fail
            try:
                step(large)
            except MemoryError:
                cupy.empty = make
                yield is_right(small) and all(reference() is not None for reference in made)
            finally:
                cupy.empty = make
        step(large)
        yield is_right(large)


def first_pages(rng: np.random.Generator) -> Iterator[bool]:
    """Tables whose indptr does not begin at 0, in plans with room for just their pages, or for one less."""
    for q_lens in (None, (2, 3)):
        case = cases.Case(
            "first_pages", (9, 14), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=q_lens
        )
        inputs = cases.build(case)
        used = int(inputs.indptr[-1])
        arrays = (
            inputs.indptr + np.int32(100),
            np.append(np.full(100, -7, np.int32), inputs.indices),
            inputs.last_page_len,
        )
        kind = pa.BatchDecodeWithPagedKVCache if q_lens is None else pa.BatchPrefillWithPagedKVCache
        for place in (np.asarray, cupy.asarray):
            table = pa.PageTable(*map(place, arrays), page_size=4)
            kv, more = inputs.kv(cupy.asarray), () if q_lens is None else (cupy.asarray(inputs.qo_indptr),)
            plan: Any = kind(max_batch_size=2, max_pages=used)
            plan.plan(kv, table, *more, 4)
            plan.status()
            out = plan.run(cupy.asarray(inputs.q), kv).host
            if q_lens is None:
                right = pa.decode(inputs.q, inputs.kv(), inputs.table())
            else:
                right = pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table())
            yield np.allclose(out.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01)
            plan = kind(max_batch_size=2, max_pages=used - 1)
            if place is np.asarray:
                yield is_refused(plan.plan, kv, table, *more, 4, says=f"needs max_pages={used}")
            else:
                plan.plan(kv, table, *more, 4)
                yield is_refused(plan.status, says=f"max_pages of the call is {used}")


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    works = (attentions, growing_steps, appends, refusals, failed_plans, first_pages)
    print(json.dumps({work.__name__: list(work(rng)) for work in works}))
