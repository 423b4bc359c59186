"""Pictures on their way: seen by a tool, stored once, referred to by records, shown by name, read back whole."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any, ClassVar

import pytest
from PIL import Image as Pillow
from rich.console import Console

from ondol.engines.base import Sampling
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.models.chat import renderer_for, template_message
from ondol.records import Image, Message, ToolResult, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.store import Run
from ondol.tools.base import Tool
from ondol.tools.image import ImageTool, crop, png_of
from ondol.view.trajectory import render_trajectory
from scripted import TOKENIZER, Echo, ScriptedEngine


def picture(colour: str = "red", size: tuple[int, int] = (40, 20)) -> Image:
    return Image.of(png_of(Pillow.new("RGB", size, colour)))


class Camera(Tool):
    """Shows a picture of the colour it is asked for."""

    name: ClassVar[str] = "camera"
    main_argument: ClassVar[str] = "colour"
    parameters: ClassVar[dict[str, Any]] = {"type": "object", "properties": {"colour": {"type": "string"}}}
    description: str = "Takes a picture."

    def session(self, trajectory_id: str):
        class Session:
            async def call(self, arguments):
                return ToolResult("click", images=(picture(arguments["colour"]),))

            async def close(self):
                pass

        return Session()


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    """The same picture twice, another one, and a part of that."""
    said = [
        "<camera>red</camera>",
        "<camera>red</camera>",
        "<camera>blue</camera>",
        "<image>0, 0, 10, 5</image>",
        "yes$",
    ]
    engine = ScriptedEngine(lambda problem, sample, turn: said[turn])
    env = ToolEnv(tools=[Camera(), ImageTool()], max_turns=5)
    plan = Plan(Echo(), env, [Echo().problem(0)], 1, Sampling(max_tokens=64), (0,))
    (group,) = rollout(engine, renderer_for(TOKENIZER), plan)
    (t,) = group.trajectories
    assert t.score == 1, t.info
    return t


def test_a_png_is_known_by_its_content():
    image = picture(size=(40, 20))
    assert (image.width, image.height) == (40, 20) and len(image.sha256) == 64
    assert image == picture() and image != picture("blue") and "png" not in repr(image)
    for junk in (b"", b"GIF89a", image.png[:20], b"\x89PNG\r\n\x1a\n" + b"0" * 40):
        with pytest.raises(ValueError, match="PNG"):
            Image.of(junk)


def test_the_trajectory_has_what_was_seen(trajectory):
    assert [len(m.images) for m in trajectory.messages if m.role == "user"] == [0, 1, 1, 1, 1]
    red, blue, part = trajectory.images
    assert (red, blue) == (picture(), picture("blue")) and (part.width, part.height) == (20, 10)
    with Pillow.open(io.BytesIO(part.png)) as cut:
        assert cut.getcolors() == [(200, (0, 0, 255))], "an area of the last picture"


def test_a_model_that_reads_only_is_told(trajectory):
    text = TOKENIZER.decode(trajectory.ids)
    assert text.count("[image 40x20: not shown, this model reads text only]") == 3
    message = Message("user", "", images=(picture(),))
    assert template_message(message)["content"] == "[image 40x20: not shown, this model reads text only]"
    renderer = renderer_for(TOKENIZER)
    assert renderer.prompt([message]) == renderer.prompt([Message("user", template_message(message)["content"])])


def test_records_refer_and_the_run_keeps_each_once(trajectory, tmp_path):
    data = json.loads(json.dumps(trajectory.to_dict()))
    assert Trajectory.from_dict(data) == trajectory
    again = Trajectory.from_dict(data)
    assert again.to_dict() == trajectory.to_dict() and again.images[0].png is None
    for holder in (*data["messages"], *(r for t in data["turns"] for r in t["results"])):
        del holder["images"]  # as written before there were any
    assert Trajectory.from_dict(data).images == []
    with Run.create(tmp_path / "runs", "x", {}) as run:
        run.db.add_trajectories("rl", 0, [trajectory])
        run.db.add_trajectories("rl", 1, [trajectory, again])
        files = sorted(p.name for p in (run.path / "images").iterdir())
        assert files == sorted(f"{i.sha256}.png" for i in trajectory.images)
        (back, *_) = run.db.trajectories()
        assert back == trajectory
        assert [run.db.images.read(i).png for i in back.images] == [i.png for i in trajectory.images]
        run.export("trajectories", tmp_path / "t.jsonl")
        line = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
        shown = line["turns"][0]["results"][0]["images"]
        assert shown == [{"sha256": picture().sha256, "width": 40, "height": 20}]

        console = Console(file=io.StringIO(), width=300)
        console.print(render_trajectory(back, images=run.db.images))
        printed = console.file.getvalue()
        for image in back.images:
            assert f"[{image}, {image.sha256[:12]}]" in printed
            assert f"{image} {image.sha256[:12]}: {run.db.images.path(image)}" in printed

        run.db.images.path(back.images[0]).write_bytes(b"no picture")
        with pytest.raises(OndolError, match="damaged"):
            run.db.images.read(back.images[0])
        run.db.images.path(back.images[1]).unlink()
        with pytest.raises(OndolError, match="cannot be read"):
            run.db.images.read(back.images[1])
        with pytest.raises(OndolError, match="not the hash"):
            run.db.images.path(Image("../../etc/passwd", 1, 1))


def test_a_question_may_have_a_picture():
    class Coloured(Echo):
        def images(self, problem):
            return (picture("green"),)

    async def go():
        task = Coloured()
        env = ToolEnv(tools=[ImageTool()])
        episode = env.episode(task, task.problem(0), "t", renderer_for(TOKENIZER))
        first = await episode.reset()
        from ondol.records import ToolCall

        call = ToolCall("image", {"area": "0 0 4 4", "zoom": 1})
        result = await episode.step(Message("assistant", "", (call,)), False)
        await episode.close()
        return first, result

    first, result = asyncio.run(go())
    assert first[-1].images == (picture("green"),)
    assert result.results[0].images == (picture("green", (4, 4)),) == result.messages[0].images


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"area": "1 2 3"}, "left, top, right, bottom"),
        ({"area": "50, 0, 60, 9"}, "it is 40x20"),
        ({"area": "0 0 9 9", "image": 3}, "the last is 1"),
        ({"area": "0 0 9 9", "zoom": 9}, "1 to 8"),
    ],
)
def test_what_cannot_be_cut_is_said(arguments, said):
    session = ImageTool().session("t")
    session.see([picture()])
    result = asyncio.run(session.call(arguments))
    assert not result.ok and said in result.text
    assert "no picture yet" in asyncio.run(ImageTool().session("t").call({"area": "0 0 9 9"})).text
    with pytest.raises(ValueError, match="reference"):
        crop(Image("0" * 64, 9, 9), (0, 0, 1, 1))
