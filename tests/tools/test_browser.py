"""The browser in a real Chromium: pages are read, seen and operated, and nothing out of reach is ever loaded."""

from __future__ import annotations

import asyncio
import http.server
import io
import threading
from pathlib import Path

import pytest
from PIL import Image as Pillow

from ondol import parts
from ondol.errors import OndolError
from ondol.records import ToolCall
from ondol.tools.base import call_tool
from ondol.tools.browser import Browser
from ondol.tools.chromium import Reach, chromium, missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

FORM = """<!doctype html><title>Form</title><h1>Order</h1>
<label>Name <input id=name></label> <label><input type=checkbox> gift</label>
<select><option>red<option>blue</select> <textarea>old</textarea> <a href=two.html>next page</a>
<div hidden>secret</div><div style="height:2000px"></div>
<button onclick="document.title=[...document.querySelectorAll('input,select,textarea')]
  .map(e=>e.type=='checkbox'?e.checked:e.value).join('|')">Send</button>"""
TWO = "<title>Two</title><p>Second page <span style='cursor:pointer' onclick='document.title=1'>here</span>"
DRAG = """<title>Drag</title><body style=margin:0><div id=a style="position:absolute;left:10px;top:10px;width:40px;height:40px;
background:red" onmousedown="on=1" tabindex=0></div><script>let on=0;onmouseup=e=>{if(on)document.title=e.clientX+','+e.clientY}</script>"""


class Server(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.path[4:]}")
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>served</title><p>hello from " + self.path.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def servers():
    both = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    for s in both:
        s.asked = []
        threading.Thread(target=s.serve_forever, daemon=True).start()
    yield both
    for s in both:
        s.shutdown()
        s.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pages = tmp_path / "pages"
    pages.mkdir()
    for name, text in {"form": FORM, "two": TWO, "drag": DRAG}.items():
        (pages / f"{name}.html").write_text(text)
    (tmp_path / "outside.html").write_text("<title>out</title>outside")
    (pages / "link.html").symlink_to(tmp_path / "outside.html")
    return pages


def use(tool: Browser, *actions: str):
    async def go():
        session = tool.session("t")
        try:
            return [await call_tool(session, tool, ToolCall("browser", {"action": a})) for a in actions]
        finally:
            await session.close()
            await session.close()

    return asyncio.run(go())


def test_a_form_is_read_filled_in_and_sent(folder):
    tool = Browser(folder=folder)
    first, *_, last, gone = use(
        tool,
        "goto(form.html)",
        'type(1, "Kim, Ji-woo")',
        "click(2)",
        "select(3, blue)",
        "type(4, new)",
        "click(6)",
        "select(3, green)",
    )
    assert first.ok and not first.images
    assert first.text.splitlines()[1:] == [
        "Order",
        '[1] textbox "Name" = ""',
        '[2] checkbox "gift" = off',
        '[3] combobox = "red" of "red", "blue"',
        '[4] textarea = "old"',
        '[5] link "next page"',
        '[6] button "Send"',
    ]
    assert last.text.startswith("page: Kim, Ji-woo|true|blue|new (file://")
    assert not gone.ok and gone.text == "Error: there is no option 'green'; known: red, blue"


def test_links_back_and_numbers_of_the_page_before(folder):
    tool = Browser(folder=folder, start="form.html")
    results = use(tool, "click(5)", "click(6)", "click(1)", "back()", "back()", "back()")
    assert results[0].text.startswith("page: Two") and '[1] span "here"' in results[0].text
    assert results[1].text == "Error: there is no element 6" and results[2].text.startswith("page: 1 (")
    assert results[3].text.startswith("page: Form")


def test_places_dragging_keys_and_scrolling(folder):
    tool = Browser(folder=folder, width=300, height=200)
    results = use(tool, "goto(drag.html)", "drag(20, 20, 120, 90)", "drag(1, 1)", "click(400, 5)")
    assert [r.text.split(" (")[0] for r in results[1:3]] == ["page: 120,90", "page: 30,30"]
    assert "outside the window of 300x200" in results[3].text
    results = use(tool, "goto(form.html)", "scroll(down)", "press(Home)", "press(NoSuchKey)", "hover(6)", "run(ls)")
    assert [r.ok for r in results] == [True, True, True, False, True, False]
    assert "there is no key" in results[3].text and "a page cannot run" in results[5].text


def test_pictures_show_the_page(folder):
    tool = Browser(folder=folder, width=120, height=80)
    (plain, shot) = use(tool, "goto(drag.html)", "screenshot()")
    (image,) = shot.images
    assert not plain.images and (image.width, image.height) == (120, 80)
    with Pillow.open(io.BytesIO(image.png)) as opened:
        picture = opened.convert("RGB")
        assert picture.getpixel((20, 20)) == (255, 0, 0) and picture.getpixel((100, 70)) == (255, 255, 255)
    assert use(Browser(folder=folder, pictures=True), "goto(two.html)")[0].images


def test_nothing_out_of_reach_is_loaded(folder, servers):
    inside, outside = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    (folder / "leak.html").write_text(
        f"""<title>leak</title><img src="{outside}/img"><iframe src="{outside}/frame"></iframe>
        <img src="{inside}/to/{servers[1].server_port}/redirected"><iframe src="../outside.html"></iframe>
        <script>fetch("{outside}/fetch").catch(()=>0); new WebSocket("{outside.replace("http", "ws")}/socket");
        navigator.sendBeacon("{outside}/beacon");
        new Worker(URL.createObjectURL(new Blob(["fetch('{outside}/worker')"])));
        document.title = typeof RTCPeerConnection + typeof WebTransport</script><p>end"""
    )
    (folder / "open.html").write_text(f"<title>open</title><script>window.open('{outside}/window')</script>")
    tool = Browser(folder=folder, origins=(inside,), timeout_s=10)
    results = use(tool, "goto(leak.html)", "wait()", "goto(open.html)", "wait()")
    assert results[1].text.startswith("page: undefinedundefined (") and "outside" not in results[1].text
    for page in (
        "../outside.html",
        "link.html",
        "file:///etc/passwd",
        f"{outside}/direct",
        f"{inside}/to/{servers[1].server_port}/page",
        "http://example.com/",
        "https://10.0.0.1/",
        "chrome://version",
        "javascript:alert(1)",
        "view-source:file:///etc/passwd",
    ):
        (result,) = use(tool, f"goto({page})")
        assert not result.ok or ("outside" not in result.text and "hello" not in result.text), (page, result)
    assert servers[1].asked == [], "the server that is out of reach was never asked"
    assert "/to/" in servers[0].asked[0]
    results = use(tool, f"goto({inside}/here)", f"goto({inside}/to/{servers[0].server_port}/there)")
    assert "hello from /here" in results[0].text and f"({inside}/there)" in results[1].text


def test_a_page_that_hangs_harms_nobody_else(folder):
    (folder / "hang.html").write_text("<title>h</title><button onclick='for(;;);'>hang</button>")

    async def go():
        tool, other = Browser(folder=folder, timeout_s=4), Browser(folder=folder)
        hung, fine = tool.session("a"), other.session("b")

        async def call(session, t, action):
            return await call_tool(session, t, ToolCall("browser", {"action": action}))

        await call(fine, other, "goto(form.html)")
        await call(hung, tool, "goto(hang.html)")
        both = await asyncio.gather(call(hung, tool, "click(1)"), call(fine, other, "type(1, ok)"))
        again = [await call(hung, tool, "wait()"), await call(hung, tool, "goto(two.html)")]
        await hung.close()
        await fine.close()
        return both, again

    (stuck, fine), again = asyncio.run(go())
    assert not stuck.ok and "did nothing for 4 s" in stuck.text
    assert fine.ok and '[1] textbox "Name" = "ok"' in fine.text
    assert again[0].text == "Error: no page is open" and again[1].ok


def test_trajectories_share_a_browser_and_nothing_else(folder):
    page = "<title>x</title><script>document.write('<p>kept: ' + localStorage.k); localStorage.k = 1</script>"
    (folder / "kept.html").write_text(page)
    tool = Browser(folder=folder)
    for _ in range(2):
        first, again = use(tool, "goto(kept.html)", "goto(kept.html)")
        assert "kept: undefined" in first.text and "kept: 1" in again.text
    assert chromium() is chromium()


def test_a_browser_that_died_is_started_again(folder):
    tool = Browser(folder=folder)
    browser = chromium()

    async def kill():
        await (await browser.browser()).close()

    assert use(tool, "goto(two.html)")[0].ok
    browser.wait(kill(), 10)
    assert use(tool, "goto(two.html)")[0].ok


def test_reach():
    reach = Reach(Path("/usr/share"), ("http://localhost:8000",))
    yes = ["data:text/html,x", "about:blank", "file:///usr/share/x", "http://localhost:8000/a", "ws://localhost:8000/"]
    no = [
        "file:///usr/share/../lib/x",
        "file:///usr/share/%2e%2e/lib",
        "file:///usr/sharex",
        "file://host/usr/share/x",
        "file:///usr/share/a%00b",
        "http://localhost:8001/",
        "https://localhost:8000/",
        "http://localhost:8000@example.com/",
        "http://127.0.0.1:8000/",
        "http://[",
        "",
    ]
    assert all(map(reach.allows, yes)) and not any(map(reach.allows, no))
    assert not Reach().allows("file:///")
    for origin in (
        "http://example.com:80",
        "http://127.0.0.1",
        "http://10.0.0.1:80",
        "http://127.0.0.1:80/x",
        "x",
        "ftp://localhost:1",
    ):
        with pytest.raises(OndolError, match="loopback"):
            Reach(None, (origin,))
    with pytest.raises(OndolError, match="origins"):
        parts.make("tools", {"name": "browser", "origins": ["http://example.com:80"]})


def test_a_missing_browser_is_named():
    tool = Browser(executable="no-such-chromium")
    assert tool.unavailable() == "there is no program 'no-such-chromium'"
    with pytest.raises(OndolError, match="no-such-chromium"):
        use(tool, "goto(data:text/html,x)")
