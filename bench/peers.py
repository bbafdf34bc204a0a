"""What others offer for the same work, behind one small interface. PyTorch is imported here, and only when asked for.

A peer's method takes the inputs of a benchmark and gives, by name, the kernels that it has for them. Each is a function
that does all preparation (plan, compilation, arrays that are shared through DLPack) and returns the call to be timed.
The call returns the peer's own array, which `to_cupy` turns into CuPy's. NotImplementedError says what a peer lacks.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from tests.cases import DTYPES

from .pools import Append, Merge
from .workload import Workload

Run = Callable[[], Any]
Kernels = dict[str, Callable[[], Run]]
WORKSPACE_BYTES = 256 * 2**20


class Peer:
    """One library. ImportError where it is not there, or has no GPU."""

    name: str
    versions: dict[str, str]  # of its packages

    def decode(self, workload: Workload) -> Kernels:
        raise NotImplementedError("no decode")

    def prefill(self, workload: Workload) -> Kernels:
        raise NotImplementedError("no prefill")

    def merge(self, inputs: Merge) -> Kernels:
        raise NotImplementedError("no merge")

    def append(self, inputs: Append) -> Kernels:
        raise NotImplementedError("no append")

    def to_cupy(self, result: Any) -> Any:
        """A result as a CuPy array [rows, heads, dim] on the current stream."""
        raise NotImplementedError


def load(names: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be imported, and why the others cannot."""
    peers, missing = [], {}
    for name in names:
        try:
            peers.append(PEERS[name]())
        except (ImportError, OSError) as error:
            missing[name] = f"{error}"
    return peers, missing


# -- PyTorch -----------------------------------------------------------------------------------------------------------


class _Torch(Peer):
    """What the libraries of PyTorch have in common. Its current stream is the default one, as CuPy's is."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self._torch = torch
        self.versions = {"torch": torch.__version__}

    def to_cupy(self, result: Any) -> Any:
        import cupy

        bits = cupy.from_dlpack(result.detach().contiguous().view(self._torch.int16))
        return bits.view(DTYPES[str(result.dtype).removeprefix("torch.")])

    def _tensor(self, array: Any) -> Any:
        """A 16-bit CuPy array (bfloat16 is none of DLPack's there) as a tensor of the same memory."""
        return self._torch.from_dlpack(array.view(np.int16)).view(getattr(self._torch, array.dtype.name))


class FlashInfer(_Torch):
    """FlashInfer: paged, both layouts."""

    name = "flashinfer"

    def __init__(self) -> None:
        super().__init__()
        self._flashinfer = import_module("flashinfer")
        self.versions["flashinfer"] = self._flashinfer.__version__
        self._workspace = self._torch.empty(WORKSPACE_BYTES, dtype=self._torch.uint8, device="cuda")

    def decode(self, workload: Workload) -> Kernels:
        _refuse_sinks(workload)
        if workload.case.q_len > 1:
            return self.prefill(workload)
        return {
            "CUDA cores": partial(self._decode, workload, False),
            "tensor cores": partial(self._decode, workload, True),
        }

    def prefill(self, workload: Workload) -> Kernels:
        _refuse_sinks(workload)
        return {"prefill": partial(self._prefill, workload)}

    def _decode(self, workload: Workload, use_tensor_cores: bool) -> Run:
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, workload.case.layout, use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(*self._table(workload), *_sizes(workload), **self._options(workload))
        return self._run(wrapper, workload)

    def _prefill(self, workload: Workload) -> Run:
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, workload.case.layout)
        qo_indptr = self._torch.from_dlpack(workload.qo_indptr).cpu()
        sizes = _sizes(workload)
        wrapper.plan(qo_indptr, *self._table(workload), *sizes, causal=True, **self._options(workload))
        return self._run(wrapper, workload)

    def _table(self, workload: Workload) -> list[Any]:
        return [self._torch.from_numpy(x) for x in (workload.indptr, workload.indices, workload.last_page_len)]

    def _options(self, workload: Workload) -> dict[str, Any]:
        dtype = getattr(self._torch, workload.case.dtype)
        return {"window_left": workload.case.window_left, "q_data_type": dtype, "kv_data_type": dtype}

    def _run(self, wrapper: Any, workload: Workload) -> Run:
        q = self._tensor(workload.q)
        pages = (self._tensor(workload.kv.k_pages), self._tensor(workload.kv.v_pages))
        return partial(wrapper.run, q, pages, out=self._torch.empty_like(q))

    def merge(self, inputs: Merge) -> Kernels:
        v, s = self._tensor(inputs.v), self._torch.from_dlpack(inputs.s)
        if inputs.case.num_states > 2:
            return {"merge_states": lambda: lambda: self._flashinfer.merge_states(v, s)[0]}
        parts = [part.contiguous() for part in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])]
        return {"merge_state": lambda: lambda: self._flashinfer.merge_state(*parts)[0]}

    def append(self, inputs: Append) -> Kernels:
        table = inputs.table
        metadata = (inputs.batch_indices, inputs.positions, table.indices, table.indptr, table.last_page_len)
        batch_indices, positions, *csr = map(self._torch.from_dlpack, metadata)
        k, v, k_pages, v_pages = map(self._tensor, (inputs.k, inputs.v, inputs.kv.k_pages, inputs.kv.v_pages))

        def run() -> Any:
            self._flashinfer.append_paged_kv_cache(
                k, v, batch_indices, positions, (k_pages, v_pages), *csr, kv_layout=inputs.case.layout
            )
            return k_pages

        return {"append_paged_kv_cache": lambda: run}


class FlashAttention3(_Torch):
    """FlashAttention-3 (package fa3-fwd) on contiguous keys and values: bfloat16, no window."""

    name = "fa3"

    def __init__(self) -> None:
        super().__init__()
        self._attend = import_module("fa3_fwd_interface").flash_attn_varlen_func
        self.versions["fa3-fwd"] = importlib.metadata.version("fa3-fwd")

    def prefill(self, workload: Workload) -> Kernels:
        _refuse_sinks(workload)
        case = workload.case
        if case.dtype != "bfloat16":
            raise NotImplementedError(f"it is built for bfloat16, not {case.dtype}; pass --dtype bfloat16")
        if case.window_left >= 0:
            raise NotImplementedError("it is built without windows")
        return {"varlen, contiguous KV": partial(self._varlen, workload)}

    def _varlen(self, workload: Workload) -> Run:
        case, torch = workload.case, self._torch
        q, k, v = (self._tensor(array) for array in (workload.q, *workload.contiguous()))
        lengths = (case.queries, case.kv_lens)
        ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device="cuda") for x in lengths]

        def run() -> Any:
            with torch.no_grad():
                out = self._attend(q, k, v, *ends, *map(max, lengths), causal=True)
            return out[0] if isinstance(out, tuple) else out

        return run


class CudnnDense(_Torch):
    """cuDNN's attention through PyTorch: contiguous, requests of one length, all of whose tokens are queries."""

    name = "cudnn"

    def __init__(self) -> None:
        super().__init__()
        self.versions["cudnn"] = f"{self._torch.backends.cudnn.version()}"

    def prefill(self, workload: Workload) -> Kernels:
        _refuse_sinks(workload)
        case = workload.case
        if case.window_left >= 0 or len({*case.kv_lens, *case.queries}) > 1:
            raise NotImplementedError(
                "it serves dense prefill only: requests of one length, no cached tokens, no window"
            )
        return {
            "dense": partial(self._dense, workload, False),
            "dense, KV heads repeated": partial(self._dense, workload, True),
        }

    def _dense(self, workload: Workload, repeat: bool) -> Run:
        torch, case = self._torch, workload.case
        attention = import_module("torch.nn.attention")
        attend = torch.nn.functional.scaled_dot_product_attention
        arrays = (self._tensor(array) for array in (workload.q, *workload.contiguous()))
        q, k, v = (x.view(case.batch_size, -1, *x.shape[1:]).transpose(1, 2) for x in arrays)
        if repeat:
            k, v = (x.repeat_interleave(case.num_qo_heads // case.num_kv_heads, dim=1) for x in (k, v))

        def run() -> Any:
            with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
                out = attend(q, k, v, is_causal=True, enable_gqa=not repeat)
            return out.transpose(1, 2).flatten(0, 1)

        return run


# -- JAX ---------------------------------------------------------------------------------------------------------------


class FlashAttention3Jax(Peer):
    """FlashAttention-3 for JAX (package flash-attn3-jax): paged, NHD, head_dim 128, one q_len for all requests.

    JAX works on a stream of its own. q enters and the result leaves through DLPack in every call, whose protocol makes
    the streams wait for each other, so that events on CuPy's stream hold the device's time (and two such waits).
    """

    name = "jax"

    def __init__(self) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if jax.default_backend() != "gpu":
            raise ImportError("JAX sees no GPU")
        self._jax = jax
        self._attend = import_module("flash_attn3_jax").flash_mha_with_kvcache
        self.versions = {"jax": jax.__version__, "flash-attn3-jax": importlib.metadata.version("flash-attn3-jax")}

    def decode(self, workload: Workload) -> Kernels:
        _refuse_sinks(workload)
        case = workload.case
        if case.layout != "NHD" or case.head_dim != 128:
            raise NotImplementedError(f"it is built for NHD and head_dim 128, not {case.layout} and {case.head_dim}")
        if len(set(case.queries)) > 1 or not min(case.kv_lens):
            raise NotImplementedError("it takes one number of queries for all requests, and no empty request")
        if not workload.kv.k_pages.flags.c_contiguous:
            raise NotImplementedError("JAX has no strided arrays, and K and V of a combined pool are strided")
        return {"paged": partial(self._paged, workload)}

    prefill = decode

    def _paged(self, workload: Workload) -> Run:
        import cupy

        jax, case = self._jax, workload.case
        most_pages = int(np.diff(workload.indptr).max())
        block_table = cupy.maximum(workload.table.to_block_table(most_pages), 0)
        pools = (workload.kv.k_pages, workload.kv.v_pages)
        k, v = (self._from_bits(self._bits(pages), case.dtype) for pages in pools)
        window = (case.window_left, 0) if case.window_left >= 0 else (-1, -1)
        shape = (case.batch_size, case.queries[0], case.num_qo_heads, case.head_dim)

        def attend(q: Any, *cache: Any) -> Any:
            k, v, seq_lens, page_table = cache
            out = self._attend(
                self._from_bits(q, case.dtype).reshape(shape), k, v, cache_seqlens=seq_lens, page_table=page_table,
                is_causal=True, window_size=window,
            )  # fmt: skip
            return jax.lax.bitcast_convert_type(out.reshape(-1, *shape[2:]), np.uint16)

        compiled = jax.jit(attend)
        cache = (k, v, jax.numpy.array(case.kv_lens, np.int32), jax.dlpack.from_dlpack(block_table))
        return lambda: (cupy.from_dlpack(compiled(self._bits(workload.q), *cache)), case.dtype)

    def to_cupy(self, result: Any) -> Any:
        bits, dtype = result
        return bits.view(DTYPES[dtype])

    def _bits(self, array: Any) -> Any:
        return self._jax.dlpack.from_dlpack(array.view(np.uint16))

    def _from_bits(self, bits: Any, dtype: str) -> Any:
        return self._jax.lax.bitcast_convert_type(bits, DTYPES[dtype])


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (FlashInfer, FlashAttention3, FlashAttention3Jax, CudnnDense)
}


def _refuse_sinks(workload: Workload) -> None:
    if workload.case.sinks:
        raise NotImplementedError("it is called without sinks here")


def _sizes(workload: Workload) -> tuple[int, int, int, int]:
    case = workload.case
    return case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size
