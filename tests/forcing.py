"""Make TorchEngine "sample" given tokens: everything but the choice (KV, stop strings, log-probs) stays real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

import ondol.engines.torch as torch_engine

#: seed of a turn -> the tokens that its first draws give
Script = Callable[[tuple[int, ...]], Sequence[int]]


@contextlib.contextmanager
def forced(script: Script) -> Iterator[None]:
    """Inside, each turn begins with the tokens that `script` names for its seed; what follows them is sampled."""
    real_uniforms, real_sample = torch_engine.uniforms, torch_engine.sample

    def uniforms(seed, count):
        u = real_uniforms(seed, count)
        for i, token in enumerate(list(script(seed))[:count]):
            u[i] = 1 + token  # no uniform number is 1 or more: the engine carries the token to `sample` for us
        return u

    def sample(logits, sampling, u):
        given = u >= 1
        tokens, logp, cut = real_sample(logits, sampling, torch.where(given, 0.5, u))
        tokens = torch.where(given, (u - 1).round().long(), tokens)
        scaled = logits / (sampling.temperature or 1.0)
        own = scaled.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, torch.where(given, own, logp), cut

    with mock.patch.object(torch_engine, "uniforms", uniforms), mock.patch.object(torch_engine, "sample", sample):
        yield


def drain(engine, requests=()) -> dict:
    """Submit, and step until all have come back: session -> completion."""
    for request in requests:
        engine.submit(request)
    done = {}
    for _ in range(100_000):
        if not engine.busy:
            return done
        for completion in engine.step():
            assert completion.session not in done
            done[completion.session] = completion
    raise AssertionError("the engine never finished")
