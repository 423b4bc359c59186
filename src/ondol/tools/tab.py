"""A page of Chromium as an agent has it: it looks (`Screen`) and acts (`Action`)."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ondol.records import Image
from ondol.tools._dom import PLACE, READ
from ondol.tools.chromium import LAUNCH_S, Chromium, Reach, chromium
from ondol.tools.gui import Action, Element, Screen

_T = TypeVar("_T")
_SETTLE_MS = 15  # after an action, for what the page does about it
_WAIT_MS = 500  # the action wait()
_CLOSE_S = 5.0
_SCROLL = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
_AS_A_WHOLE = ("date", "time", "datetime-local", "month", "week", "color", "range")  # fields that are not typed into


class PageError(Exception):
    """What went wrong with a page or an action on it, in words for the agent."""


class Tab:
    """One page in a browser context of its own. Its methods may be awaited from any event loop.

    Args:
        reach: what it may load.
        width, height: of the window, in pixels.
        timeout_s: of every method; a page that hangs for longer is closed, and the next `goto` opens a fresh one.
        dense: number every element that shows something, not only those made to be acted on.
        root, skip: CSS selectors of the part of a page that is read, and of what is left out of it.
        chars: most characters of a screen's text.
        shown: width and height of the part of the window, from its upper left corner, that pictures show.
    """

    def __init__(
        self,
        reach: Reach,
        width: int = 800,
        height: int = 600,
        timeout_s: float = 10.0,
        *,
        executable: str | None = None,
        dense: bool = False,
        root: str = "body",
        skip: str = "",
        chars: int = 6000,
        most_elements: int = 300,
        shown: tuple[int, int] | None = None,
    ) -> None:
        self.shown = shown or (width, height)
        self.reach, self.size, self.timeout_s, self.chars = reach, (width, height), timeout_s, chars
        self.reading = {"root": root, "skip": skip, "dense": dense, "most": most_elements}
        self._executable = executable
        self._chromium: Chromium | None = None
        self._context: Any = None
        self._page: Any = None
        self._nodes: Any = None  # of the last look: the handle of a list

    @property
    def opened(self) -> bool:
        return self._page is not None

    async def goto(self, url: str) -> None:
        """Open an address, or a file's path relative to the folder that is reached."""
        await self._run(self._goto(url))

    async def look(self, picture: bool = False) -> Screen:
        """The screen as it is now; its numbers hold until the next look."""
        return await self._run(self._look(picture))

    async def act(self, action: Action) -> None:
        """Do something to the page. Raises PageError where that cannot be done."""
        await self._run(self._act(action))

    async def evaluate(self, script: str, argument: Any = None) -> Any:
        """What JavaScript in the page gives."""
        return await self._run(self._evaluate(script, argument))

    async def close(self) -> None:
        """Give the context back. May be called twice."""
        context, self._context, self._page, self._nodes = self._context, None, None, None
        if context is not None and self._chromium is not None:
            with contextlib.suppress(Exception):
                await self._chromium.run(context.close(), _CLOSE_S)

    async def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            self._chromium = self._chromium or chromium(self._executable)
            if self._context is None:
                await self._chromium.run(self._chromium.browser(), LAUNCH_S)
        except BaseException:
            work.close()
            raise
        from playwright.async_api import Error

        try:
            return await self._chromium.run(work, self.timeout_s)
        except TimeoutError:
            await self.close()
            raise PageError(f"the page did nothing for {self.timeout_s:g} s and was closed") from None
        except Error as e:
            said = str(e).splitlines()[0].removeprefix("Page.").removeprefix("goto: ")
            if "closed" in said or "crash" in said.lower():
                await self.close()
                said = "the page crashed and was closed"
            raise PageError(f"{said:.300}") from e

    def _open(self) -> Any:
        if self._page is None:
            raise PageError("no page is open")
        return self._page

    async def _goto(self, url: str) -> None:
        if self.reach.folder is not None and not urlsplit(url).scheme:
            path, _, query = url.partition("?")
            url = (self.reach.folder.resolve() / path).as_uri() + (f"?{query}" if query else "")
        if not self.reach.allows(url) or url.startswith("blob:"):
            raise PageError(f"{url:.200} is out of reach")
        if self._page is None:
            assert self._chromium is not None
            if self._context is not None:  # its page crashed, or closed itself
                await self._context.close()
            self._context = await self._chromium.context(self.reach, *self.size)
            self._context.set_default_timeout(self.timeout_s * 2000)  # ours comes first
            self._context.on("page", self._popped)
            self._page = await self._context.new_page()
        await self._page.goto(url, wait_until="load")

    def _popped(self, page: Any) -> None:
        """A page that opens another one shows that from then on, until it closes."""
        before, self._page = self._page, page
        page.on("close", lambda _: setattr(self, "_page", before if self._page is page else self._page))
        page.on("crash", lambda _: setattr(self, "_page", None))

    async def _evaluate(self, script: str, argument: Any) -> Any:
        return await self._steady(self._open().evaluate, script, argument)

    async def _steady(self, ask: Any, *arguments: Any) -> Any:
        """Ask something of the page, once more where an action was still leading to another page."""
        from playwright.async_api import Error

        for _ in range(3):
            try:
                return await ask(*arguments)
            except Error as e:
                if "navigat" not in str(e):
                    raise
                await self._open().wait_for_load_state("load")
        raise PageError("the page does not come to rest")

    async def _look(self, picture: bool) -> Screen:
        page = self._open()
        handle = await self._steady(page.evaluate_handle, READ, self.reading)
        data = await (await handle.get_property("data")).json_value()
        self._nodes = await handle.get_property("nodes")
        elements: list[Element] = []
        for number, e in enumerate(data["elements"], 1):
            elements.append(Element(number, e["role"], e["name"], e["value"], tuple(e["box"]), e["looks"]))
        lines = [str(elements[line - 1]) if isinstance(line, int) else line for line in data["lines"]]
        text = "\n".join(lines)
        if len(text) > self.chars:
            text = f"{text[: self.chars]}\n[... {len(text) - self.chars} more characters]"
        width, height = self.shown
        clip = {"x": 0, "y": 0, "width": width, "height": height}
        image = Image.of(await page.screenshot(type="png", clip=clip)) if picture else None
        return Screen(text, tuple(elements), width, height, image)

    async def title(self) -> tuple[str, str]:
        """Title and address of the page."""

        async def ask() -> tuple[str, str]:
            return await self._open().title(), self._open().url

        return await self._run(ask())

    async def _act(self, action: Action) -> None:
        page, mouse, text = self._open(), self._open().mouse, action.text or ""
        match action.kind:
            case "click":
                await mouse.click(*await self._place(action))
            case "double_click":
                await mouse.dblclick(*await self._place(action))
            case "right_click":
                await mouse.click(*await self._place(action), button="right")
            case "long_press":
                await mouse.click(*await self._place(action), delay=700)
            case "hover":
                await mouse.move(*await self._place(action))
            case "drag":
                begin, end = await self._place(action), await self._place(action, 1)
                await mouse.move(*begin)
                await mouse.down()
                await mouse.move(*end, steps=8)
                await mouse.up()
            case "type":
                await self._type(action, text)
            case "press":
                try:
                    await page.keyboard.press(text)
                except Exception as e:
                    raise PageError(f"there is no key '{text:.40}'") from e
            case "select":
                await self._select(action, text)
            case "scroll":
                across, down = _SCROLL[text]
                width, height = self.size
                x, y = await self._place(action) if action.targets else (width / 2, height / 2)
                await mouse.move(x, y)
                await mouse.wheel(across * width * 0.8, down * height * 0.8)
                await page.wait_for_timeout(100)  # scrolling is smooth
            case "back":
                await page.go_back(wait_until="load")
            case "wait":
                await page.wait_for_timeout(_WAIT_MS)
            case "goto":
                await self._goto(text)
            case "screenshot":
                pass
            case other:
                raise PageError(f"a page cannot {other}")
        with contextlib.suppress(Exception):  # the page may have closed itself
            await self._open().wait_for_timeout(_SETTLE_MS)
            await self._open().wait_for_load_state("load")

    async def _node(self, number: int) -> Any:
        node = None
        if self._nodes is not None:
            with contextlib.suppress(Exception):  # the page went away, and its elements with it
                node = (await self._nodes.evaluate_handle("(all, i) => all[i]", number - 1)).as_element()
        if node is None:
            raise PageError(f"there is no element {number}")
        return node

    async def _place(self, action: Action, end: int = 0) -> tuple[float, float]:
        """Where an action points to, scrolled into view."""
        if action.points:
            x, y = action.points[end]
            if x >= self.size[0] or y >= self.size[1]:
                raise PageError(f"{x}, {y} is outside the window of {self.size[0]}x{self.size[1]}")
            return x, y
        number = action.targets[end]
        node = await self._node(number)
        place = await node.evaluate(PLACE)
        if place is None:
            raise PageError(f"element {number} is not to be seen any more")
        return place[0], place[1]

    async def _type(self, action: Action, text: str) -> None:
        """Type into an element in place of what it held, or into whatever has the focus."""
        page = self._open()
        if not action.targets:
            await page.keyboard.type(text)
            return
        node = await self._node(action.targets[0])
        kind = await node.evaluate(
            "e => e.isContentEditable ? 'edit' : (e.tagName + ':' + (e.type || '')).toLowerCase()"
        )
        tag, _, sort = kind.partition(":")
        if tag not in ("input", "textarea", "edit") or sort in ("checkbox", "radio", "button", "submit", "file"):
            raise PageError(f"element {action.targets[0]} is nothing to type into")
        if sort in _AS_A_WHOLE:
            await node.fill(text)
            return
        await page.mouse.click(*await self._place(action))
        await page.keyboard.press("Control+a")
        await page.keyboard.press("Delete")
        await page.keyboard.type(text)

    async def _select(self, action: Action, text: str) -> None:
        node = await self._node(action.targets[0])
        options = await node.evaluate("e => e.tagName === 'SELECT' ? [...e.options].map(o => o.text.trim()) : null")
        if options is None:
            raise PageError(f"element {action.targets[0]} has no options")
        if text not in options:
            raise PageError(f"there is no option '{text:.80}'; known: {', '.join(options[:40])}")
        await node.select_option(index=options.index(text))
