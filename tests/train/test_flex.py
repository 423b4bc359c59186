"""FlexAttention over packed segments: the plain path's numbers, forward on a CPU, and backward where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ondol
from ondol.errors import OndolError
from ondol.models.load import load_model
from ondol.records import Segment
from ondol.train.flex import FlexSegments, use_flex
from ondol.train.logprobs import SegmentAttention
from small_run import RECIPE


@st.composite
def forests(draw) -> list[Segment]:
    """Segments one after the other, each a root or under an earlier one."""
    out: list[Segment] = []
    for _ in range(draw(st.integers(1, 7))):
        start = out[-1].end if out else 0
        parent = draw(st.sampled_from([None, *out]))
        out.append(Segment(start, start + draw(st.integers(1, 40)), parent))
    return out


def qkv(length: int, heads: tuple[int, int], **kind) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(n, length, 16, dtype=torch.float64, **kind) for n in (heads[0], heads[1], heads[1])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20, deadline=None)
@given(forests(), st.sampled_from([(1, 1), (6, 2), (3, 3)]), st.sampled_from([None, 1, 7, 50]))
def test_the_plain_paths_numbers(segments, heads, window):
    given = qkv(segments[-1].end, heads)
    want, got = (
        kind(segments, torch.device("cpu"))(0, *given, 0.3, window) for kind in (SegmentAttention, FlexSegments)
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_it_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(OndolError, match="for GPUs"):
        use_flex(load_model("tiny:hidden=32,layers=1").model)
    with pytest.raises(OndolError, match="for GPUs"):
        ondol.run(RECIPE, "train.flex_attention=true", "evaluate.problems=2", runs=tmp_path)
    with ondol.open_run("last", runs=tmp_path) as run:
        assert not list(run.db.trajectories())  # before anything was done, not when learning begins


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_plain_paths_gradients():
    base = Segment(0, 37)
    segments = [base, Segment(37, 90, base), Segment(90, 300, base), Segment(300, 311)]
    found = []
    for kind in (SegmentAttention, FlexSegments):
        given = [t.float().cuda().requires_grad_() for t in qkv(311, (6, 2))]
        out = kind(segments, torch.device("cuda"))(0, *given, 0.3, None)
        out.backward(torch.ones_like(out))
        found.append([out, *(t.grad for t in given)])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
