"""`ondol chat` and `ondol evaluate` as a user calls them, on a tiny run."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ondol.cli import main
from ondol.cluster.scoring import RewardWorkers
from ondol.rollout.driver import Plan
from ondol.store import Run

RECIPE = """
name = "mini"
seed = 3
[model]
path = "tiny:hidden=32,layers=1,context=640"
[task]
name = "two-addends"
[env]
tools = ["calculator"]
system = "Use <calculator>."
[sampling]
max_tokens = 12
[train]
steps = 1
prompts_per_step = 2
samples_per_prompt = 2
[evaluate]
problems = 3
samples = 2
without_tools = true
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mini.toml and runs/ that holds one finished run."""
    folder = tmp_path_factory.mktemp("mini")
    (folder / "mini.toml").write_text(RECIPE)
    assert main(["train", str(folder / "mini.toml"), "--runs", str(folder / "runs"), "--json"]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_gives_what_the_run_itself_measured(root: Path, capsys):
    status, out, _ = call(capsys, "evaluate", "last", "--runs", str(root / "runs"), "--json")
    data = json.loads(out)
    assert status == 0 and data["complete"] and list(data["results"]) == ["no_tool", "greedy", "sampled"]
    with Run.open(Run.find(root / "runs", "last")) as run:
        recorded = {m.name: m.value for m in run.db.metrics("eval/*", "after")}
    for way in ("greedy", "sampled"):
        assert data["results"][way]["score"] == recorded[f"eval/score_{way}"]
        assert data["results"][way]["standard_error"] == recorded[f"eval/error_{way}"]
        assert sum(data["results"][way]["stop"].values()) == pytest.approx(1)
    assert [data["results"][w]["samples"] for w in ("no_tool", "greedy", "sampled")] == [1, 1, 2]
    assert data["results"]["sampled"]["problems"] == 3


def test_evaluate_with_reward_workers_gives_the_same(root: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    asked, score = [], RewardWorkers._score
    monkeypatch.setattr(RewardWorkers, "_score", lambda *a: asked.append(a) or score(*a))
    argv = ["evaluate", "last", "--runs", str(root / "runs"), "--json"]
    want, got = (json.loads(call(capsys, *argv, *more)[1]) for more in ((), ("--set", "rollout.reward_workers=1")))
    assert asked and got == want


def test_evaluate_as_a_table(root: Path, capsys):
    status, out, _ = call(capsys, "evaluate", "mini", "--runs", str(root / "runs"), "--problems", "2", "--samples", "3")
    assert status == 0
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if "standard error" in line)
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["no", "greedy", "sampled"]
    assert "turn_length" in out and "left" in out  # stop reasons; time left
    assert lines[head + 3].split()[3:5] == ["2", "3"]


def test_evaluate_a_bare_recipe_and_a_task_with_few_problems(root: Path, capsys):
    argv = ["evaluate", str(root / "mini.toml"), "--runs", str(root / "none"), "--problems", "500"]
    status, out, _ = call(capsys, *argv, "--set", "task.high=20", "--set", "evaluate.without_tools=false")
    assert status == 0 and "before any training" in out and "held-out problems, not 500" in out


@pytest.mark.parametrize("option", [["--problems", "0"], ["--problems", "-1"], ["--samples", "0"]])
def test_evaluate_refuses_numbers_that_make_no_sense(root: Path, capsys, option: list[str]):
    status, out, err = call(capsys, "evaluate", "last", "--runs", str(root / "runs"), *option, "--json")
    assert status == 1 and f"{option[0]} {option[1]}" in json.loads(out)["error"] and "at least 1" in err


def test_evaluate_with_nothing_to_evaluate(root: Path, capsys):
    argv = ["evaluate", "last", "--runs", str(root / "runs"), "--set", "evaluate.problems=0"]
    status, _, err = call(capsys, *argv)
    assert status == 1 and "--problems" in err
    assert call(capsys, *argv, "--problems", "1")[0] == 0


def test_evaluate_stopped_tells_what_is_known(root: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C after the first trajectory of the second way."""
    seen = []
    real = Plan.__init__

    def with_signal(self, *args, **kwargs):
        inner = kwargs["progress"]

        def progress(t):
            inner(t)
            seen.append(t)
            if len(seen) == 4:
                signal.raise_signal(signal.SIGINT)

        real(self, *args, **{**kwargs, "progress": progress})

    monkeypatch.setattr(Plan, "__init__", with_signal)
    status, out, _ = call(
        capsys, "evaluate", "last", "--runs", str(root / "runs"), "--json", "--set", "rollout.max_batch=1"
    )
    data = json.loads(out)
    assert status == 130 and data["complete"] is False
    assert {w: r["problems"] for w, r in data["results"].items()} == {"no_tool": 3, "greedy": 1}


# -- evaluate, endpoint -----------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server whose `answer` (status, text) is the answer to everything; `asked` holds what it was asked."""
    monkeypatch.setattr("ondol.engines.endpoint._PAUSE_S", 0.01)
    state = type("State", (), {"answer": (200, "5+5"), "asked": [], "url": ""})()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "solo", "object": "model"}], "object": "list"})

        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, text = state.answer
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            self.reply(status, {"choices": [choice]} if status == 200 else {"error": {"message": text}})

        def reply(self, status: int, data: Any) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def test_evaluate_an_endpoint(root: Path, capsys, endpoint: Any, monkeypatch: pytest.MonkeyPatch):
    """No model is loaded; the task's own verifier scores: 5+5 is right for N = 10 only."""
    monkeypatch.setattr("ondol.models.load.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    argv = ["evaluate", str(root / "mini.toml"), "--runs", str(root / "none"), "--endpoint", endpoint.url, "--json"]
    status, out, _ = call(capsys, *argv, "--problems", "100")
    data = json.loads(out)
    assert status == 0 and data["model"].startswith("solo at ")
    greedy = data["results"]["greedy"]
    questions = {a["messages"][-1]["content"] for a in endpoint.asked}
    assert greedy["problems"] == len(questions)
    assert greedy["score"] == pytest.approx(("10" in questions) / len(questions))
    assert greedy["stop"] == {"answered": 1.0}
    assert {a["temperature"] for a in endpoint.asked} == {0.0, 1.0}
    assert {a["model"] for a in endpoint.asked} == {"solo"}


def test_evaluate_an_endpoint_that_refuses_everything(root: Path, capsys, endpoint: Any):
    endpoint.answer = (404, "there is no such model")
    status, _, err = call(capsys, "evaluate", str(root / "mini.toml"), "--endpoint", endpoint.url)
    assert status == 1 and "there is no such model" in err and "every episode failed" in err


def test_evaluate_an_endpoint_that_is_not_there(root: Path, capsys):
    url = "http://127.0.0.1:9/v1"
    status, _, err = call(capsys, "evaluate", str(root / "mini.toml"), "--endpoint", url)
    assert status == 1 and url in err and "->" in err


# -- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[list[str]]:
    """What the model says next, turn by turn; the last one again and again."""
    from forcing import forced
    from ondol.models.tiny import character_tokenizer

    texts: list[str] = []
    tokenizer = character_tokenizer()

    def script(seed):
        text = texts.pop(0) if len(texts) > 1 else texts[0]
        return tokenizer.encode(text, add_special_tokens=False)

    with forced(script):
        yield texts


CHAT = ["--set", "sampling.max_tokens=60"]


def test_chat_with_a_tool(root: Path, capsys, scripted: list[str], no_terminal):
    scripted += ["<calculator>58 * 83 + 77</calculator>", "It is 4891.<|im_end|>", "Good bye.<|im_end|>"]
    argv = ["chat", "last", "--runs", str(root / "runs"), "--ask", "What is 58 * 83 + 77?", "--ask", "Bye", *CHAT]
    texts = list(scripted)
    status, out, _ = call(capsys, *argv)
    assert status == 0
    positions = [out.index(s) for s in ("What is 58", texts[0], "=> 4891", "It is 4891.", "Bye", "Good bye.")]
    assert positions == sorted(positions)
    scripted[:] = texts
    status, out, _ = call(capsys, *argv, "--json")
    first, second = json.loads(out)["answers"]
    assert first == {
        "question": "What is 58 * 83 + 77?",
        "answer": "It is 4891.",
        "calls": [{"name": "calculator", "arguments": {"expression": "58 * 83 + 77"}, "result": "4891", "ok": True}],
        "turns": 2,
        "stop_reason": "answered",
        "error": None,
        "started_anew": False,
    }
    assert (second["question"], second["answer"], second["calls"]) == ("Bye", "Good bye.", [])


def test_chat_reads_a_pipe(root: Path, capsys, scripted: list[str], monkeypatch: pytest.MonkeyPatch):
    scripted += ["hello<|im_end|>"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/new\n/help\ntwo\n/quit\nthree\n"))
    status, out, _ = call(capsys, "chat", "last", "--runs", str(root / "runs"), *CHAT)
    assert status == 0 and out.count("hello") == 2 and "three" not in out
    assert "a new conversation" in out and "no command /help" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    status, out, _ = call(capsys, "chat", "last", "--runs", str(root / "runs"), "--json", *CHAT)
    assert [a["question"] for a in json.loads(out)["answers"]] == ["one", "two"]


def test_chat_with_the_untrained_model_of_a_recipe(root: Path, capsys, no_terminal):
    argv = ["chat", str(root / "mini.toml"), "--runs", str(root / "none"), "--ask", "12", "--json"]
    _, untrained, err = call(capsys, *argv)
    assert "before any training" in err
    assert len(json.loads(untrained)["answers"][0]["answer"]) == 12  # its token limit
    sampled = [json.loads(call(capsys, *argv, "--temperature", "1", "--seed", s)[1])["answers"] for s in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_chat_says_when_an_answer_was_cut_and_when_it_began_anew(root: Path, capsys, scripted: list[str], no_terminal):
    scripted += ["z" * 50]
    argv = ["chat", "last", "--runs", str(root / "runs"), "--set", "sampling.max_tokens=40"]
    status, out, _ = call(capsys, *argv, *(w for n in range(12) for w in ("--ask", f"q{n}")))
    assert status == 0 and "cut at 40 tokens" in out and "began anew" in out


def test_model_text_does_not_reach_the_terminal_raw(
    root: Path, capsys, scripted: list[str], no_terminal, monkeypatch: pytest.MonkeyPatch
):
    from ondol.engines.torch import TorchEngine

    evil = "\x1b]0;owned\x07\x1b[2J\r[red]no markup[/red]"
    real = TorchEngine.step

    def step(self):
        done = real(self)
        for completion in done:
            completion.text = evil
        return done

    monkeypatch.setattr(TorchEngine, "step", step)
    scripted += ["x<|im_end|>"]
    _, out, _ = call(capsys, "chat", "last", "--runs", str(root / "runs"), "--ask", "\x1b[31mred", *CHAT)
    assert not set(out) & {"\x1b", "\x07", "\r"} and "[red]no markup[/red]" in out and "\\x1b[2J" in out


@pytest.mark.parametrize(
    "option", [["--ask", " "], ["--temperature", "-1"], ["--temperature", "nan"], ["--seed", "-1"]]
)
def test_chat_refuses_what_makes_no_sense(root: Path, capsys, option: list[str]):
    status, _, err = call(capsys, "chat", "last", "--runs", str(root / "runs"), *option)
    assert status == 1 and option[0] in err


def test_chat_names_what_it_cannot_find(root: Path, capsys):
    status, _, err = call(capsys, "chat", "nonesuch", "--runs", str(root / "runs"))
    assert status == 1 and "nonesuch" in err and "mini" in err


def test_chat_on_a_terminal_leaves_at_ctrl_d_and_ctrl_c(root: Path):
    """A real terminal: the prompt, an answer, and both ways to leave."""
    for key, status in ((b"\x04", 0), (b"\x03", 130)):
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "ondol", "chat", "last", "--runs", str(root / "runs")],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(theirs)
        try:
            shown = read_until(ours, b"you>")
            assert b"/quit" in shown
            for attempt in range(
                3
            ):  # what is typed in the instant before Python's readline listens is lost: a person types again,
                os.write(ours, b"12\r")
                with contextlib.suppress(Silence) if attempt < 2 else contextlib.nullcontext():
                    read_until(ours, b"cut at 12 tokens", b"you>", wait_s=20)
                    break
            for _ in range(3):
                os.write(ours, key)  # but not while it is leaving: a second Ctrl-C would kill it on its way out
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(30)
                    break
            assert child.returncode == status
        finally:
            child.kill()
            child.wait()
            os.close(ours)


class Silence(AssertionError):
    """The terminal shows nothing more."""


def read_until(terminal: int, *marks: bytes, wait_s: float = 60) -> bytes:
    """What the terminal shows until all marks have been seen."""
    shown = b""
    while not all(mark in shown for mark in marks):
        ready, _, _ = select.select([terminal], [], [], wait_s)
        if not ready:
            raise Silence(f"nothing more came after {shown!r}")
        shown += os.read(terminal, 4096)
    return shown
