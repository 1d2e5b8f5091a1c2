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
    keys = [span.keys if mask is None else mask.shape[1] for mask in span.masks]
    return list(zip(span.queries, keys, strict=True))


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


def test_of_thousands_of_keys_the_kernel_itself_is_causal() -> None:
    whole, _ = PackedLayout([1040, 1]).spans(torch.float32)
    assert whole.masks == [None]
    masked = PackedLayout([1030]).spans(torch.float32)[0]
    assert [len(mask) for mask in masked.masks if mask is not None] == [128] * 8 + [6]


def test_a_gpu_has_one_call_for_a_sequence() -> None:
    layout = PackedLayout([300, 600])
    layout.varlen = True
    assert [span.masks for span in layout.spans(torch.float32)] == [[None], [None]]
    assert [_sizes(s) for s in layout.reads(torch.tensor([10, 500])).spans(torch.float32)] == [
        [(290, 300)],
        [(400, 600)],
    ]


def test_masks_are_made_once_for_each_type_of_numbers() -> None:
    layout = PackedLayout([3, 4])
    for spans in (layout.spans, layout.reads(torch.tensor([2, 5])).spans):
        (single,), (half,) = spans(torch.float32), spans(torch.bfloat16)
        assert spans(torch.float32)[0] is single
        (mask,), (rounded,) = single.masks, half.masks
        assert mask is not None
        assert rounded is not None
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(mask, rounded.float())
