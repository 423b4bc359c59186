"""One headless Chromium for the whole process, in a thread of its own, whose pages reach nothing but what they are given.

A page may load `data:` URLs, files below one folder, and origins on loopback that are named; every other request is
aborted, redirects and web sockets included, and names of hosts do not resolve. Each `Tab` is a browser context of its
own: cookies, storage and cache are shared with nobody.

Playwright belongs to the event loop that started it, and loops come and go (one a rollout), so it has a loop that stays:
`Chromium.run` and `Chromium.wait` carry work there, with a deadline.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ipaddress
import os
import shutil
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from ondol.errors import OndolError

_T = TypeVar("_T")
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAUNCH_S = 60.0  # for the browser to start
_HOPS = 5
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--js-flags=--max-old-space-size=256",
    # the second fence: whatever passes the first finds no host but this one
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1 , EXCLUDE [::1]",
)
#: ways out that requests do not show
_NO_SIDE_DOORS = (
    "for (const n of ['RTCPeerConnection', 'webkitRTCPeerConnection', 'WebTransport']) delete globalThis[n];"
)


@dataclass(frozen=True)
class Reach:
    """What a page may load.

    Attributes:
        folder: files below it, links followed; None: no files.
        origins: such as "http://127.0.0.1:8000"; on loopback, all of them.
    """

    folder: Path | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not _on_loopback(origin):
                raise OndolError(
                    f"'{origin}' is no origin on loopback", "give scheme, host and port, such as http://127.0.0.1:8000"
                )

    def allows(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
        except ValueError:
            return False
        if parts.scheme in ("data", "blob") or url in ("about:blank", "about:srcdoc"):
            return True
        if parts.scheme == "file":
            if self.folder is None or parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
                return False
            return Path(unquote(parts.path)).resolve().is_relative_to(self.folder.resolve())
        scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
        return f"{scheme}://{parts.netloc}" in self.origins


def _on_loopback(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        host = parts.hostname or ""
        plain = (
            parts.scheme in ("http", "https")
            and parts.port is not None
            and f"{parts.scheme}://{parts.netloc}" == origin
        )
        return plain and parts.username is None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def find_chromium(executable: str | None = None) -> str | None:
    """The browser's program: the one named, that of $ONDOL_CHROMIUM, or the first of the usual names on the PATH."""
    for name in (executable, os.environ.get("ONDOL_CHROMIUM"), *_PROGRAMS):
        if name and (found := shutil.which(name)):
            return found
        if name and name == executable:
            return None
    return None


def missing(executable: str | None = None) -> str | None:
    """Why there can be no browser here; None where there can."""
    import importlib.util

    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed"
    if find_chromium(executable) is None:
        return f"there is no program '{executable}'" if executable else "there is no Chromium on the PATH"
    return None


class Chromium:
    """A browser process and the event loop that it belongs to. Get it with `chromium()`; started when first used."""

    def __init__(self, executable: str) -> None:
        self.executable = executable
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="chromium", daemon=True)
        self._thread.start()
        self._playwright: Any = None
        self._browser: Any = None
        self._starting = asyncio.Lock()

    async def run(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Do `work` on the browser's loop, from any other. Raises TimeoutError; cancelling this cancels the work."""
        return await asyncio.wrap_future(self._submit(work, timeout_s))

    def wait(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """As `run`, for code without an event loop."""
        return self._submit(work, timeout_s).result(timeout_s + 10)

    def _submit(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self.loop)

    async def browser(self) -> Any:
        """Playwright's browser, started anew where it has died. On the browser's loop only."""
        from playwright.async_api import Error, async_playwright

        async with self._starting:
            if self._browser is not None and self._browser.is_connected():
                return self._browser
            try:
                if self._playwright is None:
                    self._playwright = await async_playwright().start()
                self._browser = await self._playwright.chromium.launch(
                    executable_path=self.executable,
                    args=list(_FLAGS),
                    chromium_sandbox=os.geteuid() != 0,  # Chromium's own sandbox cannot be had as root
                    timeout=LAUNCH_S * 1000,
                )
            except Error as e:
                raise OndolError(
                    f"{self.executable} does not start: {str(e).splitlines()[0]:.200}",
                    f"try it: {self.executable} --headless --dump-dom about:blank",
                ) from e
            return self._browser

    async def context(self, reach: Reach, width: int, height: int) -> Any:
        """A fresh browser context that reaches nothing else. On the browser's loop only."""
        browser = await self.browser()
        context = await browser.new_context(
            viewport={"width": width, "height": height},
            accept_downloads=False,
            service_workers="block",
            locale="en-US",
            timezone_id="UTC",
        )
        await context.add_init_script(_NO_SIDE_DOORS)
        await context.route("**/*", lambda route: _answer(route, reach))
        await context.route_web_socket("**/*", lambda socket: _connect(socket, reach))
        return context

    def close(self) -> None:
        """End the browser and its thread."""

        async def end() -> None:
            with contextlib.suppress(Exception):
                if self._browser is not None:
                    await self._browser.close()
            with contextlib.suppress(Exception):
                if self._playwright is not None:
                    await self._playwright.stop()

        with contextlib.suppress(Exception):
            self.wait(end(), 10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


async def _answer(route: Any, reach: Reach) -> None:
    """Let a request pass, or not. Redirects are not shown to us by the browser, so we follow them ourselves."""
    from playwright.async_api import Error

    request = route.request
    with contextlib.suppress(Error):  # the page is gone
        if not reach.allows(request.url):
            await route.abort("blockedbyclient")
        elif not request.url.startswith("http"):
            await route.continue_()
        else:
            try:
                response = await route.fetch(max_redirects=0)
                url = request.url
                for _ in range(_HOPS):
                    target = urljoin(url, response.headers.get("location", ""))
                    if not 300 < response.status < 400 or target == url:
                        break
                    if not reach.allows(target) or not target.startswith("http"):
                        await route.abort("blockedbyclient")
                        return
                    if request.resource_type == "document":  # so that the page's address becomes the new one
                        body = f"<script>location.replace({_js(target)})</script>"
                        await route.fulfill(status=200, content_type="text/html", body=body)
                        return
                    url = target
                    response = await route.fetch(url=url, method="GET", max_redirects=0)
            except Error:
                await route.abort("connectionfailed")
                return
            await route.fulfill(response=response)


async def _connect(socket: Any, reach: Reach) -> None:
    if reach.allows(socket.url):
        socket.connect_to_server()
    else:
        await socket.close()


def _js(text: str) -> str:
    import json

    return json.dumps(text).replace("<", "\\u003c")


_running: dict[str, Chromium] = {}
_lock = threading.Lock()


def chromium(executable: str | None = None) -> Chromium:
    """The process's browser. Raises OndolError where there can be none."""
    if reason := missing(executable):
        raise OndolError(
            f"no browser: {reason}",
            "pip install 'ondol[browser]', and install Chromium (Debian: apt-get install chromium), or name it in $ONDOL_CHROMIUM",
        )
    program = find_chromium(executable)
    assert program is not None
    with _lock:
        if program not in _running:
            _running[program] = Chromium(program)
        return _running[program]


def close_all() -> None:
    """End every browser of this process."""
    with _lock:
        for browser in _running.values():
            browser.close()
        _running.clear()


atexit.register(close_all)
os.register_at_fork(after_in_child=_running.clear)  # the thread and the pipes are the parent's
