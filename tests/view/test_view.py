"""What a person sees: nothing unsafe reaches the terminal, logs stay short, plots exist for odd runs."""

from __future__ import annotations

import io
import math
import re
import threading
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ondol.records import Finish, Message, Problem, StopReason, ToolCall, ToolResult, Trajectory, Turn
from ondol.store import Run
from ondol.view import console as console_module
from ondol.view.console import Progress, before_after_table, duration, number, table
from ondol.view.plots import plot_run
from ondol.view.trajectory import fold, render_trajectory, safe_text

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def trajectory(text: str = "The answer is 3.", **changes) -> Trajectory:
    turns = [
        Turn(2, 4, text, Finish.STOP, [ToolCall("calculator", {"expression": text})], [ToolResult(text, seconds=0.2)]),
        Turn(5, 6, "It is 3.", Finish.END),
    ]
    values = dict(
        key=(7, 8, 9),
        problem=Problem(text, text, text),
        ids=[1, 2, 3, 4, 5, 6],
        prompt_length=2,
        sampled=[False, False, True, True, False, True],
        trained=[False] * 6,
        logp=[0.0] * 6,
        version=[0] * 6,
        turns=turns,
        messages=[
            Message("system", "Be good."),
            Message("user", text),
            Message("assistant", text),
            Message("tool", text, name=text),
            Message("assistant", "It is 3."),
        ],
        stop_reason=StopReason.ANSWERED,
        score=1.0,
        reward=0.25,
    )
    return Trajectory(**{**values, **changes})


def printed(renderable, width: int = 100, **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


# Trajectories


@given(st.text(st.characters(), max_size=80) | st.text("\x1b\r\x07\x9b\u202e\u2066\n[31mx\udc80", max_size=30))
@settings(max_examples=150, deadline=None)
def test_no_text_controls_the_terminal(text):
    t = trajectory(text)
    t.info["error"] = text

    class Tokenizer:
        def decode(self, ids):
            return text

    for tokenizer in (None, Tokenizer()):
        out = printed(render_trajectory(t, tokenizer), force_terminal=True, color_system="truecolor")
        out.encode("utf-8")
        rest = ANSI.sub("", out)  # what is left besides rich's own colours
        allowed = "\n\u200c\u200d"
        assert not [c for c in rest if c not in allowed and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        # The colours are rich's own only: the text's escapes lost their first character.
        assert out.count("\x1b") == len(ANSI.findall(out))


@given(st.text())
def test_safe_text_changes_only_what_is_unsafe_and_once(text):
    safe = safe_text(text)
    assert safe_text(safe) == safe
    if text.isprintable():
        assert safe == text


def test_markup_of_models_is_shown_not_obeyed():
    assert "[red]x[/red]" in printed(render_trajectory(trajectory("[red]x[/red] [/]")))


def test_everything_worth_knowing_is_there_on_any_width_without_colour():
    call = ToolCall("calc", {}, error="no JSON")
    failed = ToolResult("broke", ok=False, kind="timeout", seconds=5.0)
    t = trajectory()
    t.turns[0] = Turn(2, 4, "use it", Finish.STOP, [call], [failed])
    for width in (20, 40, 120):
        out = printed(render_trajectory(t), width=width, no_color=True)
        assert "\x1b" not in out and max(map(len, out.split("\n"))) <= width
        flat = re.sub(r"\s+", " ", out)
        for part in (
            "step 7, problem 8, sample 9",
            "score 1",
            "reward 0.25",
            "stopped: answered",
            "Be good.",
            "use it",
        ):
            assert part in flat
        for part in ("not understood: no JSON", "failed: timeout, 5.0 s", "finish: end", "system", "right answer"):
            assert part in flat


def test_examples_in_the_prompt_are_not_taken_for_sampled_text():
    messages = [Message("user", "1+1?"), Message("assistant", "EXAMPLE"), *trajectory().messages[1:]]
    out = printed(render_trajectory(trajectory(messages=messages)))
    assert out.index("EXAMPLE") < out.index("turn 1") and out.count("It is 3.") == 1
    # Without messages the turns alone still tell the story.
    bare = printed(render_trajectory(trajectory(messages=[])))
    assert bare.index("turn 1") < bare.index("tool (0.2 s)") < bare.index("turn 2")


def test_with_a_tokenizer_the_ids_are_shown():
    class Tokenizer:
        def decode(self, ids):
            return "+".join(f"id{i}" for i in ids)

    out = printed(render_trajectory(trajectory(), Tokenizer()))
    places = [out.index(part) for part in ("id1+id2", "turn 1", "id3+id4", "observation", "id5", "turn 2", "id6")]
    assert places == sorted(places)


@given(st.text(max_size=300), st.integers(9, 60), st.integers(3, 12))
def test_fold_keeps_short_texts_and_bounds_long_ones(text, characters, lines):
    out = fold(text, characters, lines)
    if len(text) <= characters and text.count("\n") < lines:
        assert out == text
    assert len(out) <= characters + 60 and out.count("\n") <= lines + 3
    assert out[: min(len(text), 2)] == text[:2] or text.count("\n") >= lines


# Progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(console_module, "_now", lambda: self.now)


def plain() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def text_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_log_gets_a_line_every_five_seconds_and_the_last(monkeypatch):
    clock, console = Clock(monkeypatch), plain()
    with Progress(console=console) as p:
        p.phase("rl", total=100)
        for step in range(100):
            clock.now += 0.1
            p.advance(1, **{"score/mean": step / 100, "stop/answered": 0.75, "stop/error": 0.0})
    lines = text_of(console)
    assert len(lines) == 3
    assert lines[0].startswith("rl  1/100  0s so far  score 0.0%")  # too early to guess what is left
    assert lines[-1] == "rl  100/100  10s so far  score 99.0%  answered 75.0%"
    assert "\x1b" not in "".join(lines)


def test_notes_come_after_the_update_before_them(monkeypatch):
    clock, console = Clock(monkeypatch), plain()
    with Progress(total_steps=3, console=console) as p:
        p.phase("a")
        p.advance(1, **{"loss/sft": math.nan})
        p.advance()  # within the same second: held back, but not lost
        p.note("hello \x1b[31m[red]" + "x" * 80)
        clock.now = 5
        p.advance()
    lines = text_of(console)
    assert [line.split("  ")[1] if line.startswith("a  ") else "note" for line in lines] == [
        "1/3",
        "2/3",
        "note",
        "3/3",
    ]
    assert lines[0].endswith("loss nan") and "\\x1b[31m[red]" in lines[2]


def test_eta_of_the_phase_and_of_the_whole_run(monkeypatch):
    clock = Clock(monkeypatch)
    with Progress(weights={"a": 1, "b": 3}, console=plain()) as p:
        p.phase("a", total=10)
        assert p.eta() is None
        clock.now = 5
        p.advance(5)
        assert p.eta() == (pytest.approx(35), True)  # an eighth of the run in 5 s
        clock.now = 10
        p.advance(5)
        p.phase("b", total=6)
        assert p.eta() == (pytest.approx(30), True)
        p.phase("unplanned", total=4)
        clock.now = 12
        p.advance(1)
        assert p.eta() == (pytest.approx(6), False)
        p.phase("endless")
        p.advance(1)
        assert p.eta() is None


def test_eta_of_a_resumed_run_counts_only_its_own_work(monkeypatch):
    clock = Clock(monkeypatch)
    for weights in (None, {"rl": 2.0}):
        clock.now = 0
        with Progress(weights=weights, console=plain()) as p:
            p.phase("rl", total=100, done=80)
            clock.now = 10
            p.advance(10)
            assert p.eta() == (pytest.approx(10), weights is not None)
    with Progress(weights={"warm start": 1, "rl": 1}, console=plain()) as p:
        # An earlier process finished the warm start.
        p.phase("warm start", total=5, done=5)
        p.phase("rl", total=10, done=0)
        clock.now = 20
        p.advance(5)
        assert p.eta() == (pytest.approx(10), True)


def test_a_live_terminal_shows_the_values_and_never_hangs_with_threads():
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    whole = threading.Thread(target=hammer, args=[console], daemon=True)
    whole.start()
    whole.join(20)
    assert not whole.is_alive(), "a deadlock"
    out = console.file.getvalue()  # type: ignore[attr-defined]
    last = ANSI.sub("", out)[-400:]
    assert "240/1" in last and "score 50.0%" in last and "1,234 tok/s" in last


def hammer(console: Console) -> None:
    """Four threads that advance, note and draw one live progress at once."""
    with Progress(console=console) as p:
        p._live.refresh_per_second = 1000  # type: ignore[union-attr]
        p.phase("rl", total=1)  # every update is then the last of its phase, and drawn at once

        def work():
            for i in range(60):
                p.advance(1, **{"score/mean": 0.5, "rollout/tokens_per_s": 1234.0})
                p._live.refresh()  # type: ignore[union-attr]
                if i % 10 == 0:
                    p.note("note")

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


# Tables and numbers


def test_numbers_and_durations():
    assert [duration(s) for s in (0, 59.6, 3725, -1)] == ["0s", "1m00s", "1h02m", "0s"]
    assert number(0.1234, "share") == "12.3%" and number(12345.6, "tokens/s") == "12,346 tokens/s"
    assert number(0.000123) == "0.000123" and number(3) == "3" and number(math.nan, "share") == "nan"
    assert number(-math.inf) == "-inf" and number(1e12) == "1e+12"


def test_tables():
    rows = [{"name": "grpo\x1b[2J", "score/mean": 0.5, "n": 10}, {"name": "[b]mine[/b]", "score/mean": None}]
    lines = printed(table(rows, ["name", "score/mean", "n"])).splitlines()
    assert lines[1].split() == ["grpo\\x1b[2J", "50.0%", "10"] and lines[2].split() == ["[b]mine[/b]", "-", "-"]
    assert printed(table([("a", 1)], ["x", "y"])).split() == ["x", "y", "a", "1"]
    assert printed(table([], ["x"])).split() == ["x"]


def test_the_ladder():
    rows = [
        {"rung": "before", "no_tool": 0.05, "greedy": None, "sampled": 0.02},
        {"rung": "after warm start", "greedy": 0.4, "sampled": math.nan},
        {"rung": "after RL", "no_tool": 0.04, "greedy": 0.9, "sampled": 0.8},
    ]
    lines = printed(before_after_table(rows)).splitlines()
    assert lines[1].split() == ["before", "5.0%", "-", "2.0%"]
    assert lines[2].split() == ["after", "warm", "start", "-", "40.0%", "-"]
    assert lines[3].split() == ["after", "RL", "4.0%", "(-1.0)", "90.0%", "(+50.0)", "80.0%", "(+78.0)"]


# Plots


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


NAN, INF = math.nan, math.inf
ODD_RUNS = {
    "nothing": [],
    "one step": [("rl", 0, {"score/mean": 0.5, "stop/answered": 1.0, "policy/entropy": 1.0, "gradient/norm": 2.0})],
    "only nan": [("rl", s, {"score/mean": NAN, "stop/answered": NAN, "policy/entropy": NAN}) for s in range(3)],
    "infinite": [("rl", s, {"score/mean": 0.1 * s, "gradient/norm": INF, "learner/tokens_per_s": 1}) for s in range(3)],
    "only evaluations": [("before", 0, {"eval/score_greedy": 0.1}), ("after", 0, {"eval/score_greedy": 0.2})],
    "only a warm start": [("warm start", s, {"loss/sft": 1.0 / (s + 1)}) for s in range(5)],
    "gaps": [("rl", s, {"score/mean": 0.5, f"stop/{'error' if s % 2 else 'mine'}": 1.0}) for s in (0, 1, 7, 30)],
    "long": [("rl", s, {"score/mean": s / 200, "loss/policy": 0.0, "stop/answered": 1.0}) for s in range(200)],
}


@pytest.mark.parametrize("name", ODD_RUNS)
@pytest.mark.filterwarnings("error")
def test_plots_of_odd_runs(tmp_path, name):
    with Run.create(tmp_path, f"{name} $x_1$", {}) as run:
        for phase, step, values in ODD_RUNS[name]:
            run.db.add_metrics(phase, step, values)
        path = plot_run(run, tmp_path / "plots" / "run.png")
    assert png_size(path) == (1200, 800)


def test_evaluations_stand_where_they_were_made(tmp_path):
    from ondol.view.plots import _evaluations, _main_phase

    with Run.create(tmp_path, "x", {}) as run:
        db = run.db
        db.add_metrics("before", 0, {"eval/score_greedy": 0.1})
        for step in range(30):
            db.add_metrics("warm start", step, {"score/mean": 0.2, "loss/sft": 1.0})
        db.add_metrics("after warm start", 0, {"eval/score_greedy": 0.3, "eval/score_sampled": 0.2})
        for step in range(1, 11):
            db.add_metrics("rl", step, {"score/mean": 0.5, "loss/policy": 0.0})
        db.add_metrics("rl", 5, {"eval/score_greedy": 0.4})
        db.add_metrics("after RL", 0, {"eval/score_greedy": 0.9})
        rows = db.metrics()
    assert _main_phase(rows) == "rl"
    found = {(where, name): (x, value) for x, where, name, value in _evaluations(rows, "rl")}
    before, warm = found["before", "eval/score_greedy"][0], found["after warm start", "eval/score_greedy"][0]
    assert before < warm < 1 and found["after warm start", "eval/score_sampled"] == (warm, 0.2)
    assert found["", "eval/score_greedy"] == (5, 0.4) and found["after RL", "eval/score_greedy"] == (10, 0.9)
