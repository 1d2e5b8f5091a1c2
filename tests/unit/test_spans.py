"""Attention without a kernel for packed sequences: calls of some queries, under masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from job.model.packed_layout import PackedLayout, Shared, Span
from job.model.transformer import attend

H, E = 4, 8
# lengths in the stream, of which sequence they share first tokens, how many, and what is read
CASES = {
    "short ones share a call": ([3, 9, 1, 4], None, None, None),
    "some of their queries": ([3, 9, 1, 4], None, None, [1, 2, 7, 16]),
    "calls of a long one": ([300, 2, 130, 7], None, None, None),
    "a sequence without queries": ([300, 2, 130, 7], None, None, [250, 302, 438]),
    "thousands of keys": ([1100, 5], None, None, None),
    "thousands of keys, few queries": ([1100, 5], None, None, [700, 1000, 1104]),
    "shared": ([200, 150, 3, 40, 9], [0, 0, 0, 3, 3], [0, 90, 90, 0, 12], None),
    "shared, some queries": ([200, 150, 3, 40, 9], [0, 0, 0, 3, 3], [0, 90, 90, 0, 12], [180, 401]),
    "a long one shares": ([60, 1100], [0, 0], [0, 20], None),
}  # fmt: skip


def _layout(
    lengths: list[int], leaders: list[int] | None, counts: list[int] | None
) -> PackedLayout:
    if leaders is None or counts is None:
        return PackedLayout(lengths)
    return PackedLayout(lengths, shared=Shared(torch.tensor(leaders), torch.tensor(counts)))


def _seen(layout: PackedLayout, leaders: list[int] | None, counts: list[int] | None) -> Tensor:
    """Which tokens of the stream each attends to, bool [t, t], by going through all of them."""
    n = layout.n_tokens
    seen = torch.zeros(n, n, dtype=torch.bool)
    firsts = layout.ends[:-1].tolist()
    for sequence, length in enumerate(layout.lengths):
        first = firsts[sequence]
        for token in range(first, first + length):
            seen[token, first : token + 1] = True
            if leaders is not None and counts is not None:
                begin = firsts[leaders[sequence]]
                seen[token, begin : begin + counts[sequence]] = True
    return seen


@pytest.mark.parametrize("whole_calls", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_of_one_masked_matrix(
    case: tuple[list[int], list[int] | None, list[int] | None, list[int] | None],
    kv_heads: int,
    dtype: torch.dtype,
    bar: float,
    whole_calls: bool,
) -> None:
    lengths, leaders, counts, read = case
    layout = _layout(lengths, leaders, counts)
    layout.varlen = whole_calls  # and heads of keys are repeated
    reads = None if read is None else layout.reads(torch.tensor(read))
    rows = torch.arange(layout.n_tokens) if reads is None else reads.rows
    generator = torch.Generator().manual_seed(0)
    sizes = ((len(rows), H), (layout.n_tokens, kv_heads), (layout.n_tokens, kv_heads))
    q, k, v = (
        torch.randn(n, h, E, generator=generator, dtype=dtype, requires_grad=True) for n, h in sizes
    )
    weights = torch.randn(len(rows), H, E, generator=generator, dtype=dtype)
    mixed = attend(q, k, v, layout, reads)
    found = torch.autograd.grad((mixed * weights).sum(), (q, k, v))

    keys, values = (x.repeat_interleave(H // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, keys) / math.sqrt(E)
    scores = scores.masked_fill(~_seen(layout, leaders, counts)[rows], -torch.inf)
    expected = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values)
    torch.testing.assert_close(mixed, expected, rtol=bar, atol=bar)
    for ours, theirs in zip(
        found, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=20 * bar, atol=20 * bar)


def _sizes(span: Span) -> list[tuple[int, int]]:
    """Queries and keys of each call."""
    return [(count, span.keys if mask is None else mask.shape[1]) for count, mask in span.calls]


def _masks(spans: list[Span]) -> list[Tensor]:
    return [mask for span in spans for _, mask in span.calls if mask is not None]


def test_a_call_has_few_queries_and_the_keys_up_to_its_last() -> None:
    first, second = PackedLayout([300, 60, 70]).spans(torch.float32)[:2]
    assert _sizes(first) == [(128, 128), (128, 256), (44, 300)]
    assert _sizes(second) == [(60, 60)]


def test_tokens_that_are_shared_have_no_queries_of_their_own() -> None:
    shared = Shared(torch.tensor([0, 0]), torch.tensor([0, 200]))
    _, second = PackedLayout([260, 130], shared=shared).spans(torch.float32)
    assert second.keys == 330
    assert _sizes(second) == [(128, 328), (2, 330)]


def test_what_is_not_read_has_no_queries_either() -> None:
    spans = PackedLayout([300, 200, 5, 4]).reads(torch.tensor([290, 507])).spans(torch.float32)
    assert [_sizes(span) for span in spans] == [[(10, 300)], [], [(2, 9)]]
    assert [span.keys for span in spans] == [300, 200, 9]


@pytest.mark.parametrize(("length", "calls"), [(100, 1), (128, 1), (129, 2), (1024, 8), (1025, 1)])
def test_short_and_very_long_sequences_are_one_causal_call(length: int, calls: int) -> None:
    (span,) = PackedLayout([length]).spans(torch.float32)
    assert len(span.calls) == calls
    assert len(_masks([span])) == (calls if calls > 1 else 0)


def test_of_a_very_long_sequence_calls_have_twice_as_many_queries() -> None:
    (span,) = PackedLayout([1500]).reads(torch.tensor([1000])).spans(torch.float32)
    assert _sizes(span) == [(256, 1256), (244, 1500)]


def test_sequences_that_stand_alone_have_one_strip_of_masks() -> None:
    masks = _masks(PackedLayout([500, 1000, 700]).spans(torch.float32))
    assert len(masks) == 4 + 8 + 6
    assert {mask.untyped_storage().data_ptr() for mask in masks} == {
        masks[0].untyped_storage().data_ptr()
    }
    assert masks[0].untyped_storage().nbytes() == 4 * 128 * (1000 + 128)


def test_a_gpu_has_one_call_for_a_sequence_and_queries_for_all_keys() -> None:
    shared = Shared(torch.tensor([0, 0]), torch.tensor([0, 200]))
    layout = PackedLayout([300, 600], shared=shared)
    layout.varlen = True
    assert layout.spans(torch.float32) == [(300, [(300, None)]), (800, [(800, None)])]


def test_masks_are_made_once_for_each_type_of_numbers() -> None:
    layout = PackedLayout([3, 4, 200])
    for spans in (layout.spans, layout.reads(torch.tensor([2, 5, 20])).spans):
        assert spans(torch.float32)[0] is spans(torch.float32)[0]
        single, half = (_masks(spans(dtype)) for dtype in (torch.float32, torch.bfloat16))
        assert {mask.dtype for mask in half} == {torch.bfloat16}
        assert all(map(torch.equal, single, (mask.float() for mask in half)))
