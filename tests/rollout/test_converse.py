"""Conversations: the same token ids as the rollout driver makes, tools that remember, and a context that is finite."""

from __future__ import annotations

import pytest

from forcing import forced
from ondol.engines.base import Sampling
from ondol.engines.torch import TorchEngine
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.models.chat import renderer_for
from ondol.models.tiny import make_tiny
from ondol.records import Problem, StopReason
from ondol.rollout.converse import Conversation
from ondol.rollout.driver import Plan, rollout
from ondol.tasks.two_addends import TwoAddends

END = "<|im_end|>"
CONTEXT = 256


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = make_tiny(hidden=32, layers=1, context=CONTEXT)
    return model, tokenizer, renderer_for(tokenizer)


def engine_of(tiny) -> TorchEngine:
    return TorchEngine(tiny[0], tiny[1], CONTEXT)


def tool_env(**more) -> ToolEnv:
    return ToolEnv(**{"tools": ("python",), "system": "Use <python>.", "max_turns": 3, **more})


def script(tokenizer, *turns: list[str]):
    """Texts by question (from 1) and turn, as `forced` wants them."""
    return lambda seed: tokenizer.encode(turns[seed[-2] - 1][seed[-1]], add_special_tokens=False)


def test_one_question_is_a_trajectory(tiny):
    """Ids, turns and messages equal those of the rollout driver, tool call and observation included."""
    texts = [f"so <python>6 * 7</python>{END}", f"it is 42{END}"]

    def encode(turn: int):
        return tiny[1].encode(texts[turn], add_special_tokens=False)

    sampling = Sampling(max_tokens=40)
    with forced(lambda seed: encode(seed[-1])):
        plan = Plan(TwoAddends(), tool_env(), [Problem("p", "6 * 7?", "42")], 1, sampling, seed=(5,))
        [group] = rollout(engine_of(tiny), tiny[2], plan)
        watched = []
        with Conversation(engine_of(tiny), tiny[2], tool_env(), sampling, 5, watch=watched.append) as conversation:
            answer = conversation.ask("6 * 7?")
            [t] = group.trajectories
            assert conversation.ids == t.ids and conversation.messages == t.messages
    assert [(x.start, x.end, x.text, x.finish, x.calls) for x in answer.turns] == [
        (x.start, x.end, x.text, x.finish, x.calls) for x in t.turns
    ]
    assert answer.turns[0].results[0].text == t.turns[0].results[0].text == "42"
    assert (answer.text, answer.stop_reason) == ("it is 42", StopReason.ANSWERED) and watched == answer.turns


def test_what_was_said_is_never_rewritten_and_tools_remember(tiny):
    turns = [
        ["<python>x = 20</python>", f"set{END}"],
        ["<python>x + 3</python>", f"23{END}"],
        ["<python>x</python>", f"gone{END}"],
    ]
    with (
        forced(script(tiny[1], *turns)),
        Conversation(engine_of(tiny), tiny[2], tool_env(), Sampling(max_tokens=40)) as c,
    ):
        c.ask("a")
        before = list(c.ids)
        second = c.ask("b")
        assert c.ids[: len(before)] == before
        assert second.turns[0].results[0].text == "23"
        # the whole conversation as the chat format renders it, turn by turn
        assert c.ids == [*tiny[2].prompt(c.messages[:-1]), *tiny[1].encode(f"23{END}", add_special_tokens=False)]
        c.new()
        assert c.ids == [] and c.messages == []
        c.asked = 2  # the third script
        assert "NameError" in c.ask("c").turns[0].results[0].text


def test_reasons_to_stop(tiny):
    call = "<python>1</python>"
    cases = [
        ([call, call, call], StopReason.MAX_TURNS, 3),
        ([f" {END}"], StopReason.EMPTY, 1),
        (["y" * 30], StopReason.TURN_LENGTH, 1),
    ]
    for texts, reason, count in cases:
        with (
            forced(script(tiny[1], texts, [f"ok{END}"])),
            Conversation(engine_of(tiny), tiny[2], tool_env(), Sampling(max_tokens=20)) as c,
        ):
            answer = c.ask("?")
            assert (answer.stop_reason, len(answer.turns)) == (reason, count)
            assert not answer.turns[-1].results
            assert c.ask("!").text == "ok"  # and the conversation goes on


def test_a_full_context_begins_anew_and_says_so(tiny):
    with forced(lambda seed: tiny[1].encode(f"{'z' * 25}{END}", add_special_tokens=False)):
        with Conversation(engine_of(tiny), tiny[2], ToolEnv(), Sampling(max_tokens=30)) as c:
            answers = []
            for number in range(9):
                answers.append(c.ask(f"question {number}"))
                assert len(c.ids) <= CONTEXT
        with Conversation(engine_of(tiny), tiny[2], ToolEnv(), Sampling(max_tokens=30)) as alone:
            first = next(n for n, a in enumerate(answers) if a.anew)
            alone.ask(f"question {first}")
            asked_alone = list(alone.ids)
        with Conversation(engine_of(tiny), tiny[2], ToolEnv(), Sampling(max_tokens=30)) as c:
            for number in range(first + 1):
                c.ask(f"question {number}")
            assert c.ids == asked_alone
    assert all(a.stop_reason is StopReason.ANSWERED for a in answers)
    assert [a.anew for a in answers].count(True) >= 2 and not answers[0].anew


def test_a_question_without_room(tiny):
    with Conversation(engine_of(tiny), tiny[2], ToolEnv(), Sampling(max_tokens=10)) as c:
        with pytest.raises(OndolError, match="context is 256"):
            c.ask("w" * 300)
        assert c.ask("short").turns  # nothing of the long one stays


def test_a_result_that_fills_the_context(tiny):
    env = tool_env(tools=({"name": "python", "output_chars": 400},))
    with (
        forced(script(tiny[1], ["<python>'a' * 300</python>"], [f"fine{END}"])),
        Conversation(engine_of(tiny), tiny[2], env, Sampling(max_tokens=40)) as c,
    ):
        assert c.ask("?").stop_reason is StopReason.CONTEXT
        again = c.ask("again")
        assert again.anew


def test_seeds_make_a_conversation_again(tiny):
    def said(seed: int) -> list[list[int]]:
        with Conversation(engine_of(tiny), tiny[2], ToolEnv(), Sampling(max_tokens=12), seed) as c:
            out = []
            for question in ("a", "b"):
                c.ask(question)
                out.append(list(c.ids))
            c.new()
            c.ask("a")
            return [*out, list(c.ids)]

    assert said(1) == said(1) != said(2)
    first, _, once_more = said(1)
    assert first == once_more
