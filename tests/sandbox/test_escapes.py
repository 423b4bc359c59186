"""No level stops less than results/isolation.json says; and the page shows that table."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from ondol.sandbox import escapes
from ondol.sandbox.levels import try_level

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "results" / "isolation.json").read_text(encoding="utf-8"))
WHO = "root" if hasattr(os, "getuid") and os.getuid() == 0 else "user"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")


@pytest.mark.parametrize("tier", escapes.TIERS)
def test_no_tier_stops_less_than_the_table_says(tier):
    if tier != "monty" and (why := try_level(tier)):
        pytest.skip(f"{tier}: {why}")
    found = asyncio.run(escapes.battery(tier))
    promised = {name for name, stopped in TABLE["stopped"][WHO][tier].items() if stopped}
    assert promised - {name for name, stopped in found.items() if stopped} == set()


def test_the_table_is_whole_and_levels_are_in_order():
    """Every attempt is in it for every tier, under root and under a user; a stronger level stops what a weaker one does."""
    for who in ("root", "user"):
        tiers = TABLE["stopped"][who]
        assert list(tiers) == [escapes.CONTROL, *escapes.TIERS]
        for stopped in tiers.values():
            assert list(stopped) == list(escapes.ATTEMPTS)
        for weak, strong in zip(escapes.LEVELS, escapes.LEVELS[1:]):
            assert [n for n in tiers[weak] if tiers[weak][n] and not tiers[strong][n]] == []
    assert TABLE["attempts"] == {name: a.what for name, a in escapes.ATTEMPTS.items()}
    weaker = [
        (t, n)
        for t, all_ in TABLE["stopped"]["root"].items()
        for n, s in all_.items()
        if t != escapes.CONTROL and not s and TABLE["stopped"]["user"][t][n]
    ]
    assert weaker == [], "root is weaker than a user"


def test_the_attempts_are_real():
    """Without a sandbox each of them gets what it wants, but for those that a plain process stops as well."""
    harmless = {"files-symlink", "files-dots", "descriptors", "segfault", "scribble"}
    control = TABLE["stopped"]["root"][escapes.CONTROL]
    assert {name for name, stopped in control.items() if stopped} <= harmless


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    assert escapes.markdown(TABLE) in page
