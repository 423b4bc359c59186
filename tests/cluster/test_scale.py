"""The simulation of many workers: bounds that hold whatever the numbers are."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.cluster.scale import Service, Setting, rollouts_s, step

CALM = Service(
    turn_s=1.0,
    tool_s=0.1,
    ledger_s=0.0,
    weights_bytes=0,
    bytes_per_s=1e9,
    load_s=0,
    tokens_per_episode=100,
    learner_tokens_per_s=1e9,
)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.01), st.booleans())
def test_bounds(workers, at_once, rounds, ledger_s, asynchronous):
    service = dataclasses.replace(CALM, ledger_s=ledger_s)
    setting = Setting(workers, at_once, at_once * rounds, asynchronous=asynchronous)
    found = step(service, setting)
    transactions = workers * setting.episodes_per_worker * (1 + service.turns)
    assert 0 < found.efficiency <= 1 + 1e-9 and 0 <= found.ledger_share <= 1
    assert found.seconds >= transactions * ledger_s - 1e-9  # one process keeps the ledger


def test_no_randomness_no_waiting_is_ideal():
    service = dataclasses.replace(CALM, spread=0.0)
    ended, alone, busy = rollouts_s(service, Setting(4, 2, 6))
    assert abs(ended - alone) < 1e-9 and busy == 0


def test_what_slows_a_step():
    base = Setting(64, 8, 64)
    assert step(CALM, base).efficiency > 0.9 > step(CALM, dataclasses.replace(base, asynchronous=False)).efficiency
    assert step(dataclasses.replace(CALM, learner_tokens_per_s=1000), base).bottleneck == "learner"
    assert step(dataclasses.replace(CALM, ledger_s=0.01), base).bottleneck == "ledger"
    heavy = dataclasses.replace(CALM, weights_bytes=4e9)
    apart = dataclasses.replace(base, broadcast=False)
    assert step(heavy, base).bottleneck == step(heavy, apart).bottleneck == "weights"
    assert step(heavy, apart).weights_s == 64 * 4 > step(heavy, base).weights_s == 7 * 4
