"""Any OpenAI-compatible chat server as an engine: text in, text out, for evaluation and judging.

Token ids and log-probabilities stay unknown, so completions have text only and their trajectories cannot be trained on.

- Every message goes out as plain text: a call already stands in its assistant's text, and a `tool` message is sent as the
  user's, because the `tool_call_id` that the role needs belongs to calls that the server itself has parsed.
- Requests run at once, up to `max_batch`, on an event loop in a thread of its own. A request's time runs from when it is
  sent; waiting for its turn does not count.
- Whatever a server does wrong (refusals, garbage, silence) ends that turn with an error and never the evaluation.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import queue
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ondol.engines.base import Completion, EngineStats, Request
from ondol.errors import OndolError
from ondol.models.chat.base import readable
from ondol.models.chat.chatml import ChatML
from ondol.records import Finish, Message

_WAIT_S = 0.2  # longest that one step waits; the caller looks for Ctrl-C between steps
_PAUSE_S = 0.5  # before the first retry; doubled for each further one
_ERROR_CHARS = 400
_STOPPED_AT = ("stop_reason", "matched_stop")  # what vLLM and SGLang call the string that ended the text


class TextRenderer(ChatML):
    """What an endpoint needs of a renderer: no ids, and tool calls in the Hermes format, described in the system text."""

    family = "text"

    def __init__(self) -> None:  # no tokenizer, so nothing of the base class's
        self.system, self.renders_tools = None, False
        self.end_ids: frozenset[int] = frozenset()

    def _encode(self, pieces: Any) -> list[int]:
        return []

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        return []

    def conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        return []

    def observation(self, messages: Sequence[Message], ended: bool) -> list[int]:
        return []


class EndpointEngine:
    """Samples turns from a server. See `ondol.engines.base.Engine`. Close it, or use it in a `with`.

    The key is read from ONDOL_API_KEY, else OPENAI_API_KEY; servers of one's own need none.

    Args:
        url: the API's base, e.g. "http://localhost:8000/v1".
        model: its name at that server.
        max_batch: most requests under way at once.
        tries: how often a request is sent when the server is busy (429), fails (5xx) or drops the connection.
        images: the model sees; messages carry their images. Otherwise a line of text stands for each.
    """

    def __init__(
        self, url: str, model: str = "default", *, max_batch: int = 64, tries: int = 3, images: bool = False
    ) -> None:
        try:
            import openai
        except ImportError as e:
            raise OndolError("endpoints need the package 'openai'", "pip install 'ondol[endpoint]'") from e
        if not url.startswith(("http://", "https://")):
            raise OndolError(f"'{url}' is not the URL of a server", "give one such as http://localhost:8000/v1")
        key = (os.environ.get("ONDOL_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none").strip()
        self.url, self.model, self.tries, self.images = url, model, tries, images
        self.version = 0
        self.stats = EngineStats()
        self._openai = openai
        try:
            self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
        except Exception as e:  # the client parses the URL
            raise OndolError(f"'{url}' is not the URL of a server: {e}", "such as http://localhost:8000/v1") from e
        self._slots = asyncio.Semaphore(max_batch)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tickets = 0
        self._open: dict[str, tuple[int, Future[None]]] = {}  # session -> (ticket of its turn, the turn under way)
        self._done: queue.SimpleQueue[tuple[int, Completion]] = queue.SimpleQueue()

    # -- Engine -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def submit(self, request: Request) -> None:
        if not request.messages:
            raise OndolError("an endpoint request has no messages", "give the conversation as `messages`")
        self._tickets += 1
        if request.session in self._open:
            raise OndolError(f"session '{request.session}' has a turn under way", "wait for it, or release the session")
        self._open[request.session] = (self._tickets, self._start(self._turn(self._tickets, request)))

    def step(self) -> list[Completion]:
        """Wait for at least one answer, but never long; all that have come."""
        done: list[Completion] = []
        started, wait = time.perf_counter(), _WAIT_S
        while self._open:
            try:
                ticket, completion = self._done.get(timeout=wait)
            except queue.Empty:
                break
            if self._open.get(completion.session, (0,))[0] == ticket:  # else it was released meanwhile
                del self._open[completion.session]
                done.append(completion)
                wait = 0.0
        self.stats.steps += 1
        self.stats.seconds += time.perf_counter() - started
        return done

    def release(self, session: str) -> None:
        if session in self._open:
            self._open.pop(session)[1].cancel()

    def sync(self, version: int) -> None:
        raise OndolError("the weights behind an endpoint are not ours to change", "train with the embedded engine")

    # -- besides ------------------------------------------------------------------------------------------------

    def check(self, timeout_s: float = 10.0) -> None:
        """Is somebody there? Raises OndolError with what to do. Settles which model "default" means, where it can."""
        api = self._openai
        try:
            models = self._start(self._list(timeout_s)).result()
        except TimeoutError as e:
            raise OndolError(f"{self.url} did not answer within {timeout_s:g} s", "is the server ready?") from e
        except (api.AuthenticationError, api.PermissionDeniedError) as e:
            raise OndolError(f"{self.url} refuses the key: {_text(e)}", "set ONDOL_API_KEY") from e
        except api.APIConnectionError as e:
            raise OndolError(
                f"no server answers at {self.url}: {_text(e)}",
                "start it, or correct the URL; it usually ends in /v1, e.g. http://localhost:8000/v1",
            ) from e
        except Exception:  # somebody is there, but has no list of models: not every server has
            return
        if self.model == "default" and models and "default" not in models:
            if len(models) > 1:
                raise OndolError(f"{self.url} serves {len(models)} models", f"name one of: {', '.join(models[:20])}")
            self.model = models[0]

    def close(self) -> None:
        """Give up what is under way and end the thread. May be called twice."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        for session in list(self._open):
            self.release(session)
        if loop is None or thread is None:
            return
        with contextlib.suppress(Exception):  # a socket that does not close now does so with the process
            asyncio.run_coroutine_threadsafe(self._client.close(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        if not thread.is_alive():
            loop.close()

    def __enter__(self) -> EndpointEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- in the thread ------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="ondol-endpoint", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _list(self, timeout_s: float) -> list[str]:
        async with asyncio.timeout(timeout_s):
            page = await self._client.models.list(timeout=timeout_s)
        return [m.id for m in page.data if isinstance(m.id, str)]

    async def _turn(self, ticket: int, request: Request) -> None:
        out = Completion(request.session, [], [], [], "", Finish.ERROR, self.version)
        async with self._slots:
            started = time.monotonic()
            try:
                await self._answer(request, out)
            except Exception as e:  # whatever a server can do to its client
                out.error = f"{self.url} sent what could not be read: {_text(e)}"
            out.seconds = time.monotonic() - started
        self._done.put((ticket, out))

    async def _answer(self, request: Request, out: Completion) -> None:
        """Send the request until it is answered, refused, or out of time; fills `out`."""
        api, pause = self._openai, 0.0
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                for attempt in range(self.tries):
                    await asyncio.sleep(pause)
                    pause = _PAUSE_S * 2**attempt
                    try:
                        answer = await self._client.chat.completions.create(**self._body(request))
                    except api.APITimeoutError:
                        raise TimeoutError from None
                    except api.APIStatusError as e:
                        out.error = f"{self.url}: {_text(e)}"
                        if e.status_code not in (408, 429) and e.status_code < 500:
                            return
                        pause = max(pause, _retry_after(e.response.headers.get("retry-after")))
                    except api.APIConnectionError as e:
                        out.error = f"no answer from {self.url}: {_text(e)}"
                    else:
                        self._read(answer, request, out)
                        return
                    if asyncio.get_running_loop().time() + pause >= deadline:
                        return
        except TimeoutError:
            out.finish = Finish.TIMEOUT
            out.error = out.error or f"{self.url} did not answer within {request.timeout_s:g} s"

    def _body(self, request: Request) -> dict[str, Any]:
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_message(m, self.images) for m in request.messages],
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_tokens": s.max_tokens,
            "seed": int(np.random.SeedSequence(request.seed).generate_state(1)[0] >> 1),  # many servers want an int32
            "timeout": request.timeout_s,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        extra = {k: v for k, v in (("top_k", s.top_k), ("min_p", s.min_p)) if v}  # not in OpenAI's API, but in others'
        return {**body, "extra_body": extra} if extra else body

    def _read(self, answer: Any, request: Request, out: Completion) -> None:
        """What the server said, as far as it makes sense. The client does not validate, so anything may be anything."""
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"an answer without choices: {answer}")
        choice = choices[0]
        finish, text = getattr(choice, "finish_reason", None), getattr(choice.message, "content", None)
        tokens = getattr(getattr(answer, "usage", None), "completion_tokens", None)
        self.stats.sampled_tokens += tokens if isinstance(tokens, int) else 0
        if text is None and finish == "length":  # it spent all its tokens on thoughts that it keeps to itself
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"an answer without text (finish_reason {finish!r})")
        if finish == "content_filter":
            raise ValueError("the server's content filter ended the answer")
        out.text, stopped = stop_at(text, request.stop, finish == "stop", _stopped_at(choice))
        out.finish = Finish.STOP if stopped else Finish.LENGTH if finish == "length" else Finish.END
        out.error = ""


def stop_at(text: str, stop: Sequence[str], ended: bool, at: str | None) -> tuple[str, bool]:
    """The text as our engines give it: up to and including its first stop string; and whether there is one.

    Servers leave the stop string out. It is put back where the server names it (`at`; "" when it says that none was
    met), else where a text that `ended` has an opening tag `<x>` without the `</x>` that is a stop string.
    """
    found = [text.index(s) + len(s) for s in stop if s in text]
    if found:  # the server keeps it, or does not know `stop` and wrote on
        return text[: min(found)], True
    if not ended:
        return text, False
    if at is None:
        opened = [(text.rfind(s.replace("</", "<", 1)), s) for s in stop if s.startswith("</") and s.endswith(">")]
        position, at = max(opened, default=(-1, ""))
        at = at if position >= 0 else ""
    return (text + at, True) if at and at in stop else (text, False)


def _stopped_at(choice: Any) -> str | None:
    """The stop string that the server says it met; "" if it says none (the model ended by itself); None if it is silent."""
    extra = getattr(choice, "model_extra", None) or {}
    for key in _STOPPED_AT:
        if key in extra:
            return extra[key] if isinstance(extra[key], str) else ""
    return None


def _message(message: Message, images: bool) -> dict[str, Any]:
    shown = [i.png for i in message.images if i.png is not None] if images else []
    message = message if shown else readable(message)
    role = "user" if message.role == "tool" else message.role
    text = message.content.encode("utf-8", "replace").decode()  # no lone surrogates
    if not shown:
        return {"role": role, "content": text}
    urls = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in shown]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [{"type": "text", "text": text}, *parts] if text else parts}


def _text(error: BaseException) -> str:
    """An error in one short line, with the cause where that says more (a refused connection, say)."""
    cause = error.__cause__
    words = str(error) or type(error).__name__
    if cause is not None and str(cause) and str(cause) not in words:
        words += f" ({cause})"
    words = " ".join(words.split())
    return words if len(words) <= _ERROR_CHARS else words[:_ERROR_CHARS] + " ..."


def _retry_after(header: str | None) -> float:
    try:
        seconds = float(header or 0)
    except ValueError:  # a date: rare, and our own pause will do
        return 0.0
    return seconds if seconds > 0 else 0.0
