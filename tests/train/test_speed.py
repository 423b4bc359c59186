"""Speed as ratios between two paths of ours in one run (never seconds), and what `ondol bench` reports."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ondol.cli import main
from ondol.engines.torch import TorchEngine
from ondol.models.load import load_model
from ondol.train import speed
from ondol.train.learner import Learner

MODEL = "tiny:hidden=128,layers=3,context=512"


@pytest.fixture(scope="module")
def tiny():
    return load_model(MODEL, device="cpu")


def test_sharing_prompts_pays_in_the_learner(tiny) -> None:
    """16 answers of 8 tokens to a prompt of 300: 14 times fewer tokens. Twice as fast is the least."""
    work = dict(groups=2, samples=16, prompt=300, new=8, tokens_per_microbatch=4096)
    shared, plain = (speed.learning(copy.deepcopy(tiny), **work, share=share) for share in (True, False))
    assert plain["computed_tokens"] > 8 * shared["computed_tokens"]
    assert plain["seconds"] > 2 * shared["seconds"]


def test_sharing_prompts_pays_in_the_engine(tiny, monkeypatch) -> None:
    def seconds(share: bool) -> float:
        init = TorchEngine.__init__

        def patched(self, *args, **kwargs):
            init(self, *args, **{**kwargs, "share_prefixes": share})

        with monkeypatch.context() as m:
            m.setattr(TorchEngine, "__init__", patched)
            return min(speed.sampling(tiny, 16, 400, 4)["seconds"] for _ in range(2))

    assert seconds(False) > 2 * seconds(True)


def test_what_bench_reports(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(f'task = "two-addends"\n[model]\npath = "{MODEL}"\n')
    assert main(["bench", "r.toml", "--prompt", "16", "--new", "4", "--batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [d["batch"] for d in found["decoding"]] == [1, 4]
    assert all(0 < d["roofline_share"] < 3 and d["tokens_per_s"] > 0 for d in found["decoding"])
    assert 0 < found["learning"]["mfu"] < 1.5 and found["memory"]["peak_mib"] > 50
    assert found["learning"]["computed_tokens"] < found["learning"]["sequence_tokens"]


@pytest.mark.parametrize("wrong", (["--prompt", "0"], ["--new", "1"], ["--prompt", "5000"], ["--batch", "0"]))
def test_bench_refuses(wrong, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(f'task = "two-addends"\n[model]\npath = "{MODEL}"\n')
    assert main(["bench", "r.toml", *wrong]) == 1
    assert "error:" in capsys.readouterr().err


def test_memory_follows_the_micro_batch(tiny, monkeypatch) -> None:
    """What autograd keeps grows with the tokens of a micro-batch, and not with the number of prompts."""

    def kept(groups: int, tokens: int) -> int:
        """Most values kept for the backward pass of any micro-batch."""
        now, most = 0, 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += t.numel()
            return t

        plain = Learner.gradient

        def gradient(self, batches, *rest, **named):
            nonlocal now, most
            for b in batches:
                now = 0
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    out = plain(self, [b], *rest, **named)
                most = max(most, now)
            return out

        with monkeypatch.context() as m:
            m.setattr(Learner, "gradient", gradient)
            speed.learning(copy.deepcopy(tiny), groups, 4, 40, 16, tokens)
        return most

    few, many, large = kept(2, 256), kept(8, 256), kept(8, 1024)
    assert many < 1.3 * few
    assert large > 2 * many
