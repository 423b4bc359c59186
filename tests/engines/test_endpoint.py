"""The endpoint engine against a server that does everything servers do, and everything they should not."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from ondol.engines.base import Completion, Request, Sampling
from ondol.engines.endpoint import EndpointEngine, TextRenderer, stop_at
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.evaluate import evaluate
from ondol.methods.grpo import GRPO
from ondol.records import Finish, Image, Message, StopReason, Trajectory
from ondol.tasks.arithmetic import Arithmetic
from ondol.tools.image import png_of
from ondol.view.trajectory import render_trajectory

Answer = tuple[int, str, bytes, dict[str, str]]  # status, content type, body, more headers


class Server:
    """A local chat server. `script(body, n)` answers request number n: an Answer, None to hang, "close" to hang up."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any], int], Any] = lambda body, n: says("hello")
        self.models: Any = (200, "application/json", json.dumps({"object": "list", "data": []}).encode(), {})
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.active = self.most_active = 0
        self.lock, self.quit = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.keys.append(self.headers["Authorization"])
                self.reply(outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append(body)
                    n = len(outer.seen) - 1
                    outer.active += 1
                    outer.most_active = max(outer.active, outer.most_active)
                try:
                    answer = outer.script(body, n)
                finally:
                    with outer.lock:
                        outer.active -= 1
                self.reply(answer)

            def reply(self, answer: Any) -> None:
                if answer is None:
                    outer.quit.wait(30)
                    self.close_connection = True
                elif answer == "close":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif callable(answer):
                    answer(self)
                else:
                    status, kind, content, more = answer
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    for name, value in {"Content-Length": str(len(content)), **more}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.quit.set()
        self.http.shutdown()
        self.http.server_close()


def says(text: Any, finish: Any = "stop", **more: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}
    return ok({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def ok(data: Any) -> Answer:
    return 200, "application/json", json.dumps(data).encode(), {}


def fails(status: int, text: str = "no luck", **headers: str) -> Answer:
    return status, "application/json", json.dumps({"error": {"message": text}}).encode(), headers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("ONDOL_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ondol.engines.endpoint._PAUSE_S", 0.01)
    made = Server()
    yield made
    made.close()


def request(session: str = "s", text: str = "hi", **more: Any) -> Request:
    sampling = more.pop("sampling", Sampling(max_tokens=9))
    return Request(session, [], sampling, more.pop("seed", (0, 1)), messages=[Message("user", text)], **more)


def ask(server: Server, *requests: Request, **settings: Any) -> list[Completion]:
    with EndpointEngine(server.url, "m", **settings) as engine:
        for r in requests:
            engine.submit(r)
        done: list[Completion] = []
        give_up = time.monotonic() + 20
        while engine.busy:
            assert time.monotonic() < give_up, "the engine hangs"
            began = time.monotonic()
            done += engine.step()
            assert time.monotonic() - began < 2, "one step must not block"
        return sorted(done, key=lambda c: c.session)


# -- a server that works ----------------------------------------------------------------------------------------------


def test_the_answer_and_what_was_sent(server: Server):
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=13, min_p=0.1)
    messages = [Message("system", "s"), Message("user", "u"), Message("assistant", "<python>1</python>")]
    messages.append(Message("tool", "broken \ud800 half", name="python"))
    [done] = ask(server, Request("s", [], sampling, (3, 4), ("</python>",), messages=messages))
    assert (done.text, done.finish, done.error) == ("hello", Finish.END, "")
    assert done.ids == done.logp == done.logp_truncated == []
    [sent] = server.seen
    assert sent["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "<python>1</python>"},
        {"role": "user", "content": "broken ? half"},
    ]
    assert {k: sent[k] for k in ("model", "temperature", "top_p", "max_tokens", "stop", "min_p")} == {
        "model": "m", "temperature": 0.7, "top_p": 0.9, "max_tokens": 13, "stop": ["</python>"], "min_p": 0.1,
    }  # fmt: skip
    assert "top_k" not in sent and 0 <= sent["seed"] < 2**31


@pytest.mark.parametrize("sees", [False, True])
def test_pictures_go_to_a_model_that_sees(server: Server, sees: bool):
    png = png_of(Picture.new("RGB", (3, 2)))
    seen, refers = Image.of(png), Image("0" * 64, 3, 2)
    messages = [
        Message("user", "look", images=(seen,)),
        Message("user", "", images=(seen,)),
        Message("user", "x", images=(refers,)),
    ]
    ask(server, Request("s", [], Sampling(), (0,), messages=messages), images=sees)
    first, second, third = (m["content"] for m in server.seen[0]["messages"])
    line = "[image 3x2: not shown, this model reads text only]"
    assert third == f"x\n{line}", "of a reference there is nothing to send"
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}
    if sees:
        assert first == [{"type": "text", "text": "look"}, part] and second == [part]
    else:
        assert first == f"look\n{line}" and second == line


def test_seeds_follow_the_request_alone(server: Server):
    ask(server, *(request(str(i), str(i), seed=s) for i, s in enumerate([(0, 1), (0, 2), (0, 1)])))
    seeds = {m["messages"][0]["content"]: m["seed"] for m in server.seen}
    assert seeds["0"] == seeds["2"] != seeds["1"]


def test_many_at_once_but_not_more_than_allowed(server: Server):
    def slow(body: dict[str, Any], n: int) -> Answer:
        time.sleep(0.1)
        return says(body["messages"][0]["content"])

    server.script = slow
    # 24 answers of 0.1 s, two at a time: waiting for a place takes longer than any request may, and must not count
    requests = [request(f"{i:02}", f"text {i}", timeout_s=1.0) for i in range(24)]
    began = time.monotonic()
    done = ask(server, *requests, max_batch=2)
    assert time.monotonic() - began > 1.1
    assert [c.text for c in done] == [f"text {i}" for i in range(24)]
    assert server.most_active == 2
    assert all(0.1 <= c.seconds < 1.0 for c in done)


@pytest.mark.parametrize(
    "names, expected",
    [
        ({}, "Bearer none"),
        ({"OPENAI_API_KEY": "b"}, "Bearer b"),
        ({"ONDOL_API_KEY": " a\n", "OPENAI_API_KEY": "b"}, "Bearer a"),
    ],
)
def test_the_key(server: Server, monkeypatch: pytest.MonkeyPatch, names: dict[str, str], expected: str):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with EndpointEngine(server.url, "m") as engine:
        engine.check()
    assert server.keys == [expected]


# -- stop strings -----------------------------------------------------------------------------------------------------

STOP = ("</python>", "</calc>")


@pytest.mark.parametrize(
    "text, finish, more, expected, why",
    [
        ("<python>1+1", "stop", {}, "<python>1+1</python>", Finish.STOP),  # as OpenAI: the string is dropped
        ("<python>1+1", "stop", {"stop_reason": "</python>"}, "<python>1+1</python>", Finish.STOP),  # vLLM
        ("<python>1+1", "stop", {"stop_reason": None}, "<python>1+1", Finish.END),  # vLLM: it ended by itself
        ("<python>1+1", "stop", {"matched_stop": "</python>"}, "<python>1+1</python>", Finish.STOP),  # SGLang
        ("<python>1+1", "stop", {"matched_stop": 2}, "<python>1+1", Finish.END),
        ("so <calc>2", "stop", {}, "so <calc>2</calc>", Finish.STOP),
        ("<python>1</python> and more", "length", {}, "<python>1</python>", Finish.STOP),  # the server ignores stop
        ("<python>1</python>", "stop", {}, "<python>1</python>", Finish.STOP),  # the server keeps it
        ("<python>1+", "length", {}, "<python>1+", Finish.LENGTH),
        ("42", "stop", {}, "42", Finish.END),
        ("", "stop", {}, "", Finish.END),
        (None, "length", {}, "", Finish.LENGTH),  # a thinker that ran out of tokens
    ],
)
def test_stop_strings(server: Server, text: Any, finish: str, more: Any, expected: str, why: Finish):
    server.script = lambda body, n: says(text, finish, **more)
    [done] = ask(server, request(stop=STOP))
    assert (done.text, done.finish) == (expected, why)


@given(
    st.text(alphabet="ab<>/", max_size=12).map(lambda t: t.replace("a", "<py>").replace("b", "</py>")), st.booleans()
)
def test_what_a_server_cuts_is_put_back(text: str, tells: bool):
    """Our engines give text up to and including the first stop string. A server cuts it off; we get it back."""
    stop = ("</py>", "</ab>")
    full, sep, _ = text.partition("</py>")
    if not sep:
        return
    # without being told, an opening tag is needed: a text without one holds no call, and ending it there is harmless
    got, stopped = stop_at(full, stop, True, "</py>" if tells else None)
    if tells or "<py>" in full:
        assert (got, stopped) == (full + "</py>", True)
    else:
        assert (got, stopped) == (full, False)


# -- a server that does not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [fails(429), fails(500), fails(503), "close"])
def test_passing_trouble_is_tried_again(server: Server, bad: Any):
    server.script = lambda body, n: bad if n < 2 else says("at last")
    [done] = ask(server, request())
    assert (done.text, done.finish, done.error, len(server.seen)) == ("at last", Finish.END, "", 3)


@pytest.mark.parametrize("bad, words", [(fails(500, "the GPU fell off"), "the GPU fell off"), ("close", "no answer")])
def test_lasting_trouble_is_an_error_after_three_tries(server: Server, bad: Any, words: str):
    server.script = lambda body, n: bad
    [done] = ask(server, request())
    assert done.finish is Finish.ERROR and words in done.error and server.url in done.error
    assert len(server.seen) == 3


def test_a_refusal_is_not_tried_again(server: Server):
    server.script = lambda body, n: fails(400, "there is no model m")
    [done] = ask(server, request())
    assert done.finish is Finish.ERROR and "there is no model m" in done.error and len(server.seen) == 1


def test_a_wait_past_the_deadline_is_not_waited_for(server: Server):
    server.script = lambda body, n: fails(429, "later", **{"Retry-After": "3600"})
    began = time.monotonic()
    [done] = ask(server, request(timeout_s=5))
    assert done.finish is Finish.ERROR and "later" in done.error and time.monotonic() - began < 3


def test_silence_ends_at_the_deadline_and_others_do_not_wait(server: Server):
    server.script = lambda body, n: None if body["messages"][0]["content"] == "hang" else says("hello")
    began = time.monotonic()
    hung, fine = ask(server, request("a", "hang", timeout_s=0.5), request("b"))
    assert hung.finish is Finish.TIMEOUT and "0.5 s" in hung.error and fine.text == "hello"
    assert 0.4 < time.monotonic() - began < 5


def test_a_drip_ends_at_the_deadline_too(server: Server):
    """Each byte comes in time; the whole does not."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not server.quit.wait(0.1):
                handler.wfile.write(b" ")

    server.script = lambda body, n: drip
    [done] = ask(server, request(timeout_s=0.5))
    assert done.finish is Finish.TIMEOUT and done.error and done.seconds < 2


GARBAGE: list[Any] = [
    (200, "text/html", b"<html>\x1b[31mlogin please</html>", {}),
    (200, "application/json", b'{"choices": [{"mess', {}),
    (200, "application/json", b"", {}),
    (200, "application/json", b"\xff\xfe\x00", {}),
    (502, "text/html", b"<html>bad gateway</html>", {}),
    ok({"choices": []}),
    ok({"choices": None}),
    ok({"choices": "many"}),
    ok({"choices": [7]}),
    ok({"choices": [{"finish_reason": "stop"}]}),
    ok({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}),
    ok({"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]}),
    ok([]),
    ok(None),
    ok({"error": "overloaded"}),
    says(None),
    says(None, "tool_calls"),
    says("half", "content_filter"),
]


@pytest.mark.parametrize("bad", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_an_error_of_its_turn_only(server: Server, bad: Any):
    server.script = lambda body, n: bad if body["messages"][0]["content"] == "bad" else says("fine")
    wrong, right = ask(server, request("a", "bad"), request("b"))
    assert wrong.finish is Finish.ERROR and wrong.error and len(wrong.error) < 600 and wrong.text == ""
    assert (right.text, right.finish) == ("fine", Finish.END)


@pytest.mark.parametrize("odd", [None, "eos", 3])
def test_an_unknown_finish_reason_is_an_end(server: Server, odd: Any):
    server.script = lambda body, n: says("done", odd)
    [done] = ask(server, request())
    assert (done.text, done.finish) == ("done", Finish.END)


@pytest.mark.parametrize(
    "logprobs", ["rubbish", {"content": 7}, {"content": [{"token": 1, "logprob": "NaN"}]}, [None], -1]
)
def test_log_probs_of_a_server_are_not_used_and_cannot_harm(server: Server, logprobs: Any):
    """An endpoint's words are evaluated, never trained on: whatever it says of probabilities."""
    server.script = lambda body, n: says("done", logprobs=logprobs, token_ids=["x", None])
    [done] = ask(server, request())
    assert (done.text, done.finish, done.ids, done.logp) == ("done", Finish.END, [], [])


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [False, True])
def test_a_released_turn_never_comes_back(server: Server, answered: bool):
    """Not even when it has been answered already, and a new turn of the same name is under way."""

    def script(body: dict[str, Any], n: int) -> Any:
        text = body["messages"][0]["content"]
        return None if text == "old" and not answered else says(text)

    server.script = script
    with EndpointEngine(server.url, "m") as engine:
        engine.submit(request("s", "old"))
        with pytest.raises(OndolError, match="under way"):
            engine.submit(request("s", "twice"))
        give_up = time.monotonic() + 10
        while engine._done.empty() if answered else not server.seen:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        engine.release("s")
        assert not engine.busy and engine.step() == []
        engine.submit(request("s", "new"))
        done: list[Completion] = []
        while engine.busy:
            done += engine.step()
    assert [c.text for c in done] == ["new"]


def test_closing_ends_the_thread_and_what_is_under_way(server: Server):
    server.script = lambda body, n: None
    engine = EndpointEngine(server.url, "m")
    engine.submit(request())
    engine.step()
    thread = engine._thread
    engine.close()
    engine.close()
    assert thread is not None and not thread.is_alive() and not engine.busy


# -- before it begins -------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_check_names_the_url_when_nobody_is_there(server: Server):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with EndpointEngine(url) as engine, pytest.raises(OndolError) as e:
        engine.check()
    assert url in e.value.what and "/v1" in (e.value.remedy or "")


def test_check_of_a_silent_server_and_of_a_wrong_key(server: Server):
    with EndpointEngine(server.url) as engine:
        server.models = None
        with pytest.raises(OndolError, match="did not answer"):
            engine.check(timeout_s=0.3)
        server.models = fails(401, "who are you")
        with pytest.raises(OndolError, match="who are you") as e:
            engine.check()
    assert "ONDOL_API_KEY" in (e.value.remedy or "")


@pytest.mark.parametrize("answer", [fails(404), fails(500), (200, "text/html", b"<html>", {}), ok({"data": None})])
def test_check_does_not_ask_for_a_list_of_models(server: Server, answer: Any):
    server.models = answer
    with EndpointEngine(server.url) as engine:
        engine.check()
    assert engine.model == "default"


def test_check_settles_the_default_model(server: Server):
    def listed(*names: str) -> Answer:
        return ok({"object": "list", "data": [{"id": n, "object": "model", "created": 0} for n in names]})

    server.models = listed("only-one")
    with EndpointEngine(server.url) as engine:
        engine.check()
        assert engine.model == "only-one"
    server.models = listed("a", "b")
    with EndpointEngine(server.url) as engine:
        with pytest.raises(OndolError, match="2 models") as e:
            engine.check()
        assert "a, b" in (e.value.remedy or "")
    with EndpointEngine(server.url, "b") as engine:
        engine.check()
        assert engine.model == "b"


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://x", "http://[::1"])
def test_what_is_no_url(url: str):
    with pytest.raises(OndolError, match="not the URL"):
        EndpointEngine(url)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(OndolError, match="ondol\\[endpoint\\]"):
        EndpointEngine("http://localhost:1/v1")


# -- whole episodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", ["tags", "json"])
def test_an_evaluation_with_tools(server: Server, calls: str):
    """A model that calls the calculator, and answers with what came back; one problem meets a broken server."""
    task = Arithmetic()
    problems = [task.problem(i, "test") for i in range(4)]

    def model(body: dict[str, Any], n: int) -> Answer:
        messages = body["messages"]
        assert [m["role"] for m in messages][:2] == ["system", "user"] and "expression" in messages[0]["content"]
        if messages[1]["content"] == problems[3].question:
            return 200, "text/html", b"<html>", {}
        if len(messages) == 2:
            expression = messages[1]["content"].removeprefix("What is ").removesuffix("?")
            if calls == "tags":
                return says(f"<calculator>{expression}")
            call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
            return says(f"<tool_call>\n{call}\n")
        assert [m["role"] for m in messages[2:]] == ["assistant", "user"]
        return says(messages[-1]["content"].removeprefix("<result>").removesuffix("</result>"))

    server.script = model
    env = ToolEnv(tools=("calculator",), calls=calls)
    with EndpointEngine(server.url, "m") as engine:
        result = evaluate(engine, TextRenderer(), task, env, problems, Sampling(), samples=2)
    reasons = [t.stop_reason for t in result.trajectories]
    assert reasons == [StopReason.ANSWERED] * 6 + [StopReason.ERROR] * 2
    assert result.score == 0.75 and "could not be read" in result.trajectories[-1].info["error"]
    t = result.trajectories[0]
    assert t.ids == [] and t.sampled_tokens == 0 and len(t.turns) == 2 and t.turns[0].results[0].ok
    assert Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) == t
    render_trajectory(t)


def test_what_an_endpoint_sampled_cannot_be_learned_from(server: Server):
    from ondol.models.tiny import make_tiny
    from ondol.recipe import OptimizerSettings
    from ondol.train.learner import Learner
    from ondol.train.optimizer import Optimizer

    task = Arithmetic()
    with EndpointEngine(server.url, "m") as engine:
        result = evaluate(engine, TextRenderer(), task, ToolEnv(), [task.problem(0, "test")], Sampling(), samples=2)
    model, _ = make_tiny(hidden=32, layers=1)
    learner = Learner(model, Optimizer(model, OptimizerSettings()))
    with pytest.raises(OndolError, match="without token ids"):
        learner.reinforce(result.groups, GRPO())
