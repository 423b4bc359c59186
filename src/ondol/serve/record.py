"""Recording: episodes of an agent that only talks to our endpoint, with the very tokens that were sampled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ondol.engines.base import Completion
from ondol.engines.chat_api import Asked, BadRequest, Dialogue, Said
from ondol.errors import OndolError
from ondol.records import Finish, Message, Problem, StopReason, Trajectory, Turn
from ondol.store import Run
from ondol.tasks.base import question_id
from ondol.tools.speaker import Speaker

_CUT = {Finish.LENGTH: StopReason.TURN_LENGTH, Finish.CONTEXT: StopReason.CONTEXT, Finish.TIMEOUT: StopReason.TIMEOUT}


@dataclass
class Episode:
    """One agent at work. `lock`: its requests come one after the other, as its trajectory is one line of tokens."""

    name: str
    trajectory: Trajectory
    dialogue: Dialogue = field(default_factory=Dialogue)
    ended: bool = False  # the last sampled turn holds its end token
    finish: Finish = Finish.END
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)

    def context(self) -> list[int]:
        t = self.trajectory
        return t.ids[t.restarts[-1] :] if t.restarts else list(t.ids)

    def hear(self, asked: Asked, speaker: Speaker) -> bool:
        """Append what the request adds; whether its context began anew."""
        t, new = self.trajectory, self.dialogue.added(asked)
        if new is not None:
            ids, messages = speaker.more(new, asked, self.ended)
            self.dialogue.take(new, anew=False)
        else:
            ids, messages = speaker.first(asked)
            self.dialogue.take(asked.messages, anew=True)
            if t.ids:
                t.restarts.append(len(t.ids))
        t.observe(ids)
        t.messages += messages
        if not t.turns:
            t.prompt_length = len(t.ids)
        return new is None

    def answer(self, done: Completion, said: Said) -> None:
        turn = Turn(
            len(self.trajectory.ids), len(self.trajectory.ids) + len(done.ids), done.text, done.finish, list(said.calls)
        )
        self.trajectory.act(turn, done.ids, done.logp, done.logp_truncated, done.token_versions)
        self.dialogue.take([said.message()], anew=False)
        self.ended, self.finish = done.finish is Finish.END, done.finish

    def unhear(self, length: int, restarts: int, messages: int, dialogue: Sequence[Message]) -> None:
        """Forget what `hear` appended: no turn came of it, and the agent may ask again."""
        t = self.trajectory
        for values in (t.ids, t.sampled, t.trained, t.logp, t.version, t.logp_truncated):
            del values[length:]
        del t.restarts[restarts:], t.messages[messages:]
        self.dialogue.messages = list(dialogue)


class Recorder:
    """Keeps the episodes that are under way, and writes those that got a score into a run, for `ondol train --from-dump`.

    Episodes with the same problem become a group. A problem's number grows with each new one; `problems_per_step` of them make a step.

    Args:
        run: open for writing.
        most: episodes under way at once;  idle_s: one that is unused for so long is dropped, and said so in the run's events.
    """

    def __init__(self, run: Run, *, problems_per_step: int = 8, most: int = 4096, idle_s: float = 3600.0) -> None:
        self.run, self.per_step, self.most, self.idle_s = run, problems_per_step, most, idle_s
        self.open: dict[str, Episode] = {}
        self.numbers: dict[str, int] = {}
        self.samples: dict[str, int] = {}
        self.written = self.dropped = 0
        for t in run.db.trajectories(phase="rl"):  # a folder that is gone on with
            self.numbers.setdefault(t.problem.id, t.key[1])
            self.samples[t.problem.id] = max(self.samples.get(t.problem.id, 0), t.key[2] + 1)
            self.written += 1

    def episode(self, name: str) -> Episode:
        """The episode of that name, begun now if it is new."""
        self._sweep()
        found = self.open.get(name)
        if found is None:
            if len(self.open) >= self.most:
                raise BadRequest(f"{self.most} episodes are under way: post the scores of some", status=429)
            blank = Trajectory((0, 0, 0), Problem("", "", ""), [], 0, [], [], [], [])
            found = self.open[name] = Episode(name, blank)
        found.used = time.monotonic()
        return found

    def score(self, name: str, score: float, reward: float | None, problem: str | None) -> dict[str, Any]:
        """End an episode and write it. Raises BadRequest for one that is unknown or has said nothing."""
        found = self.open.get(name)
        if found is None or not found.trajectory.turns:
            raise BadRequest(
                f"there is no episode '{name}' with a turn: an episode is scored once, after it", "episode", status=404
            )
        if found.lock.locked():
            raise BadRequest(f"a turn of the episode '{name}' is under way: wait for it", "episode", status=409)
        del self.open[name]
        t = found.trajectory
        question = problem or next((m.content for m in t.messages if m.role == "user"), name)
        identity = question_id(question)
        number = self.numbers.setdefault(identity, len(self.numbers))
        sample = self.samples.get(identity, 0)
        self.samples[identity] = sample + 1
        t.problem = Problem(identity, question, "")
        t.key = (number // self.per_step + 1, number, sample)
        t.score, t.reward = score, score if reward is None else reward
        t.stop_reason = _CUT.get(found.finish, StopReason.ANSWERED if t.turns[-1].text.strip() else StopReason.EMPTY)
        t.info["episode"] = name
        self.run.db.add_trajectories("rl", t.key[0], [t])
        self.written += 1
        return {
            "step": t.key[0],
            "problem": number,
            "sample": sample,
            "tokens": t.sampled_tokens,
            "turns": len(t.turns),
        }

    def groups(self, first: int, size: int, most: int = 64) -> dict[str, Any]:
        """Finished groups, those with at least `size` scored episodes, from problem number `first` on; `next` is where to go on."""
        found: dict[int, list[Trajectory]] = {}
        for t in self.run.db.trajectories(phase="rl"):
            if t.key[1] >= first:
                found.setdefault(t.key[1], []).append(t)
        whole = sorted(n for n, ts in found.items() if len(ts) >= size)[:most]
        rows = [
            {
                "problem": n,
                "question": found[n][0].problem.question,
                "trajectories": [t.to_dict() for t in sorted(found[n], key=lambda t: t.key)],
            }
            for n in whole
        ]
        return {"groups": rows, "next": whole[-1] + 1 if whole else first}

    def close(self) -> None:
        """What is still under way has no score and is not training data."""
        for name in list(self.open):
            self._drop(name, "the server ended")

    def _sweep(self) -> None:
        now = time.monotonic()
        for name in [n for n, e in self.open.items() if now - e.used > self.idle_s and not e.lock.locked()]:
            self._drop(name, f"unused for {self.idle_s:g} s")

    def _drop(self, name: str, why: str) -> None:
        turns = len(self.open.pop(name).trajectory.turns)
        self.dropped += 1
        self.run.db.event("episode_dropped", episode=name, turns=turns, why=why)


def check_episode(name: str) -> str:
    """An episode's name as it stands in a URL. Raises BadRequest."""
    if not 0 < len(name) <= 200 or not name.isprintable() or "/" in name:
        raise BadRequest("an episode's name has 1 to 200 printable characters and no /", "episode")
    return name


def recording_run(root: Any, name: str, recipe: dict[str, Any]) -> Run:
    try:
        return Run.create(root, f"{name}-recorded", recipe)
    except OSError as e:
        raise OndolError(f"no run can be made in {root}: {e}", "give --runs a folder that can be written") from e
