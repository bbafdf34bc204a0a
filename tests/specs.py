"""Specs of test cases: what recipes and plan layouts are made from."""

from dataclasses import replace
from typing import Any

import numpy as np

from paged_attn import recipes
from paged_attn.card import H100, Card
from paged_attn.recipes import DecodeRecipe
from paged_attn.spec import AttentionSpec, Scoring
from paged_attn.warm_up import Shapes
from tests.cases import DTYPES, Case


def spec_of(case: Case, num_pages: int = 64) -> AttentionSpec:
    return AttentionSpec(
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=case.page_size,
        num_pages=num_pages,
        dtype=np.dtype(DTYPES[case.dtype]),
        layout=case.layout,
        device="cuda:0",
        scoring=Scoring(case.sm_scale, case.causal, case.window_left, case.logits_soft_cap),
        q_len=case.q_len if case.is_decode else None,
    )


def decode_recipe(
    rows: int,
    head_dim: int,
    num_pairs: int = 1,
    *,
    batch_invariant: bool = False,
    card: Card = H100,
    like: Case | None = None,
    **fields: Any,
) -> DecodeRecipe:
    """For `rows` query rows a KV head, of `num_pairs` requests and KV heads in all; else like the case `like`."""
    shape = {"q_len": 1, "num_qo_heads": rows, "num_kv_heads": 1, "head_dim": head_dim}
    case = replace(like or Case("recipe", (1,)), **shape, **fields)
    return recipes.decode_recipe(spec_of(case), num_pairs, batch_invariant, card)


def shapes_of(case: Case, max_batch_size: int | None = None) -> Shapes:
    """The shapes of a case's calls, as warm_up is told."""
    return Shapes(
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        dtype=np.dtype(DTYPES[case.dtype]),
        page_size=case.page_size,
        q_len=case.q_len,
        max_batch_size=max_batch_size,
        soft_cap=case.logits_soft_cap > 0,
    )
