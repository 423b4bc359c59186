"""The endpoint with the real openai client: what it says equals what the engine samples; recording keeps the sampled tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from ondol.engines.base import Completion, Request, Sampling
from ondol.engines.chat_api import Dialogue, parse
from ondol.engines.torch import TorchEngine
from ondol.models.chat import renderer_for
from ondol.records import Finish, Message
from ondol.serve.http import Endpoint, build_app
from ondol.serve.record import Recorder
from ondol.serve.worker import Worker
from ondol.store import Run
from ondol.tools.server.http import listen, url_of
from ondol.tools.speaker import Speaker
from ondol.train.dump import groups_of, read_trajectories

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.timeout(90)

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


@contextlib.contextmanager
def serving(
    loaded: tuple[Any, Any, Any], recorder: Recorder | None = None, token: str | None = None, **settings: Any
) -> Iterator[str]:
    """The endpoint in a thread; its address."""
    import uvicorn

    model, tokenizer, renderer = loaded
    engine = TorchEngine(model, tokenizer, 256, max_batch=8)
    worker = Worker(engine, **{k: settings.pop(k) for k in ("most", "keep") if k in settings})
    speaker = Speaker(renderer, tokenizer, **settings)
    sampling = Sampling(max_tokens=12)
    endpoint = Endpoint(worker, speaker, name="tiny", sampling=sampling, context_length=256, recorder=recorder)
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(build_app(endpoint, token=token), log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="module")
def loaded(tiny_families):
    model, tokenizer = tiny_families["qwen2"]
    return model, tokenizer, renderer_for(tokenizer)


def http(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON of a plain request; a body is sent as JSON, bytes as they are."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if isinstance(body, bytes) else {"content-type": "application/json"}
    request = urllib.request.Request(url, data, {**kind, **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read() or b"null")


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


def test_what_it_says_is_what_the_engine_samples(loaded):
    model, tokenizer, renderer = loaded
    messages = [{"role": "user", "content": "hello"}]
    with serving(loaded) as url:
        c = client(f"{url}/v1")
        assert [m.id for m in c.models.list()] == ["tiny"]
        got = c.chat.completions.create(
            model="any", messages=messages, seed=7, n=3, logprobs=True, extra_body={"return_token_ids": True}
        )
        greedy = [
            c.chat.completions.create(model="any", messages=messages, temperature=0).choices[0].message.content
            for _ in range(2)
        ]
    assert greedy[0] == greedy[1]
    prompt = renderer.prompt([Message("user", "hello")])
    assert got.model_extra["prompt_token_ids"] == prompt and got.usage.prompt_tokens == len(prompt)
    engine = TorchEngine(model, tokenizer, 256, max_batch=8)
    for i in range(3):
        engine.submit(Request(str(i), prompt, Sampling(max_tokens=12), (7, i), end_ids=renderer.end_ids))
    want = {}
    while engine.busy:
        want |= {d.session: d for d in engine.step()}
    for i, choice in enumerate(got.choices):
        assert choice.model_extra["token_ids"] == want[str(i)].ids
        assert [t.logprob for t in choice.logprobs.content] == pytest.approx(want[str(i)].logp, abs=1e-5)
    assert len({c.message.content for c in got.choices}) > 1


def test_a_stream_says_the_same(loaded):
    messages = [{"role": "user", "content": "hello"}]
    with serving(loaded) as url:
        c = client(f"{url}/v1")
        whole = c.chat.completions.create(model="m", messages=messages, seed=3, max_tokens=40, logprobs=True)
        events = list(
            c.chat.completions.create(
                model="m",
                messages=messages,
                seed=3,
                max_tokens=40,
                stream=True,
                logprobs=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content and len(events) > 4
    tokens = [t.logprob for e in events if e.choices and e.choices[0].logprobs for t in e.choices[0].logprobs.content]
    assert tokens == pytest.approx([t.logprob for t in whole.choices[0].logprobs.content], abs=1e-5)
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason


def test_recorded_tokens_are_those_that_were_sampled(loaded, tmp_path):
    run = Run.create(tmp_path, "recorded", {})
    recorder = Recorder(run, problems_per_step=2)
    with serving(loaded, recorder) as url:
        for name, score in (("a", 1.0), ("b", 0.0)):
            c = client(f"{url}/episodes/{name}/v1")
            messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
            for more in ("two", "three", None):
                said = c.chat.completions.create(model="m", messages=messages, seed=ord(name)).choices[0].message
                messages.append({"role": "assistant", "content": f" {said.content} "})  # a client that adds whitespace
                if more:
                    messages.append({"role": "user", "content": more})
            other = [{"role": "user", "content": "another conversation"}]
            c.chat.completions.create(model="m", messages=other, seed=1)
            status, told = http(f"{url}/episodes/{name}/score", {"score": score, "problem": "counting"})
            assert status == 200 and told["turns"] == 4
        assert http(f"{url}/health")[1]["episodes"] == 2
        assert http(f"{url}/groups?size=3")[1] == {"groups": [], "next": 0}
        told = http(f"{url}/groups?size=2")[1]
        assert told["next"] == 1 and [t["score"] for t in told["groups"][0]["trajectories"]] == [1.0, 0.0]
        assert http(f"{url}/groups?first=1&size=2")[1]["groups"] == [] and http(f"{url}/groups?size=x")[0] == 400
        client(f"{url}/episodes/left/v1").chat.completions.create(model="m", messages=messages[:1])
    assert [e.data["episode"] for e in run.db.events("episode_dropped")] == ["left"]
    run.close()

    found = read_trajectories(run.path)
    group = groups_of(found)[0]
    assert [t.score for t in group.trajectories] == [1.0, 0.0] and [t.key for t in found] == [(1, 0, 0), (1, 0, 1)]
    model, tokenizer, renderer = loaded
    for t in found:
        assert len(t.turns) == 4 and len(t.restarts) == 1
        assert t.ids[: t.prompt_length] == renderer.prompt(t.messages[:1])
        engine = TorchEngine(model, tokenizer, 256)
        for number, turn in enumerate(t.turns):  # each turn again, from the recorded ids alone
            begin = t.restarts[0] if turn.start >= t.restarts[0] else 0
            assert all(t.sampled[turn.start : turn.end]) and not t.sampled[turn.start - 1]
            seed = (1 if number == 3 else ord(t.info["episode"]), number)
            engine.submit(
                Request(str(number), t.ids[begin : turn.start], Sampling(max_tokens=12), seed, end_ids=renderer.end_ids)
            )
            while engine.busy:
                for done in engine.step():
                    assert done.ids == t.ids[turn.start : turn.end]
                    assert done.logp == pytest.approx(t.logp[turn.start : turn.end], abs=1e-4)


def test_tools_in_the_families_own_json_and_as_tags(loaded):
    """A model that says what we force it to: its call reaches the client, and the result the model."""
    _, tokenizer, renderer = loaded
    first = {"role": "user", "content": "1 + 1?"}
    asked = parse({"messages": [first], "tools": [TOOL]}, Sampling())
    for calls, text in (
        ("json", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        ("tags", "<add>1</add>"),
    ):
        speaker = Speaker(renderer, tokenizer, calls=calls)  # type: ignore[arg-type]
        ids, messages = speaker.first(asked)
        assert "Adds." in tokenizer.decode(ids) and messages[-1].content == "1 + 1?"
        done = Completion("s", [1, 2], [0.0, 0.0], [], f"So: {text}", Finish.END, 0)
        said = speaker.said(done, asked)
        assert said.content == "So:" and said.reason == "tool_calls"
        assert said.calls[0].name == "add" and str(said.calls[0].arguments["a"]) == "1"
        again = {
            "role": "assistant",
            "content": "So:",
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "add", "arguments": json.dumps(said.calls[0].arguments)},
                }
            ],
        }
        result = {"role": "tool", "tool_call_id": "c", "content": "2"}
        later = parse({"messages": [first, again, result], "tools": [TOOL]}, Sampling())
        dialogue = Dialogue()
        dialogue.take([*asked.messages, said.message()], anew=True)
        new = dialogue.added(later)
        assert new is not None and new[0].name == "add"
        more, shown = speaker.more(new, later, ended=True)
        assert "2" in tokenizer.decode(more)
        assert shown[0].content == ("<result>2</result>" if calls == "tags" else "2")


def test_wrong_requests_and_limits(loaded, tmp_path):
    ok = [{"role": "user", "content": "x"}]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": ok, "temperature": -1}, "temperature"),
        ({"messages": ok, "n": 3, "stream": True}, "stream"),
        ({"messages": ok, "tools": [{"type": "function"}]}, "tools[0]"),
        ({"messages": ok, "tools": 5}, "tools"),
        ({"messages": ok, "max_tokens": 0}, "max_tokens"),
        ({"messages": ok, "stop": [1]}, "stop"),
        ({"messages": ok, "top_logprobs": 4}, "top_logprobs"),
        ({"messages": ok, "presence_penalty": 1}, "presence_penalty"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "context"),
    ]
    recorder = Recorder(Run.create(tmp_path, "recorded", {}))
    with serving(loaded, recorder) as url:
        for body, said in bad:
            status, told = http(f"{url}/v1/chat/completions", body)
            assert status == 400 and said in told["error"]["message"], (body, told)
        assert http(f"{url}/v1/chat/completions", b"{", {"content-type": "application/json"})[0] == 400
        assert http(f"{url}/v1/chat/completions", b"{}")[0] == 415
        assert http(f"{url}/episodes/none/score", {"score": 1})[0] == 404
        c = client(f"{url}/episodes/e/v1")
        with pytest.raises(openai.BadRequestError):  # and nothing of it stays in the episode
            c.chat.completions.create(model="m", messages=[{"role": "user", "content": "y" * 400}])
        c.chat.completions.create(model="m", messages=ok)
        for score in (2, "a", None, True):
            assert http(f"{url}/episodes/e/score", {"score": score})[0] == 400
        assert http(f"{url}/episodes/e/score", {"score": 0.5, "reward": -1.0})[1]["turns"] == 1
        assert http(f"{url}/episodes/e/score", {"score": 0.5})[0] == 404
        assert http(f"{url}/health", headers={"host": "evil.example"})[0] == 403
    recorder.run.close()
    with serving(loaded, token="secret", most=1) as url:
        with pytest.raises(openai.AuthenticationError):
            client(f"{url}/v1").chat.completions.create(model="m", messages=ok)
        assert client(f"{url}/v1", "secret").chat.completions.create(model="m", messages=ok).choices
        with pytest.raises(openai.RateLimitError):
            client(f"{url}/v1", "secret").chat.completions.create(model="m", messages=ok, n=2)


def test_many_at_once_and_a_client_that_leaves(loaded):
    with serving(loaded) as url:

        async def run() -> list[str]:
            c = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
            gone = asyncio.create_task(
                c.chat.completions.create(model="m", messages=[{"role": "user", "content": "long"}], max_tokens=200)
            )
            await asyncio.sleep(0.05)
            gone.cancel()
            asked = [
                c.chat.completions.create(model="m", messages=[{"role": "user", "content": f"q{i}"}], seed=i)
                for i in range(24)
            ]
            return [r.choices[0].message.content for r in await asyncio.gather(*asked)]

        texts = asyncio.run(run())
        one = client(f"{url}/v1").chat.completions.create(
            model="m", messages=[{"role": "user", "content": "q5"}], seed=5
        )
        assert texts[5] == one.choices[0].message.content
        for _ in range(100):
            if http(f"{url}/health")[1]["turns_under_way"] == 0:
                break
            time.sleep(0.05)
        assert http(f"{url}/health")[1]["turns_under_way"] == 0
