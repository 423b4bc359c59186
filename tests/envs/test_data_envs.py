"""stream, feedback and moves: what comes back, when it ends, and that scores are the task's own."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol import parts
from ondol.envs.feedback import FeedbackEnv
from ondol.envs.moves import MovesEnv
from ondol.envs.stream import StreamEnv
from ondol.errors import OndolError
from ondol.records import Message
from ondol.tasks.arithmetic import Arithmetic
from ondol.tasks.puzzles import PUZZLES, Hanoi, puzzle_of
from ondol.tasks.recall import Recall


def play(env, task, problem, texts, most=None):
    """Opening messages, and results of the turns up to the end."""
    style = env.call_style(None)

    async def run():
        episode = env.episode(task, problem, "t", None)
        first, out = await episode.reset(), []
        for i, text in enumerate(texts):
            calls = tuple(style.parse(text)) if style else ()
            out.append(await episode.step(Message("assistant", text, calls), i + 1 == (most or env.max_turns)))
            if out[-1].terminated or out[-1].truncated:
                with pytest.raises(RuntimeError, match="is over"):
                    await episode.step(Message("assistant", "x"), False)
                break
        await episode.close()
        return first, out

    return asyncio.run(run())


# -- stream -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(2, 9), st.integers(1, 4))
def test_with_the_memory_a_demonstration_is_right_and_contexts_are_short(index, pairs, window) -> None:
    task = Recall(pairs=pairs)
    problem = task.problem(index)
    env = StreamEnv(tools=["memory"], system="", window=window)
    first, results = play(env, task, problem, task.demonstration(problem, Random(index), True))
    assert [m.content for m in first] == [problem.data["parts"][0]]
    assert results[-1].terminated and results[-1].score == results[-1].reward == 1 and results[-1].messages == []
    assert [r.reward for r in results[:-1]] == [0] * (pairs + 1) and all(x.ok for r in results for x in r.results)
    assert [i + 1 for i, r in enumerate(results) if r.anew] == list(range(window, pairs + 1, window))
    contexts, now = [], [*first]
    for r in results:
        if r.anew:
            contexts.append(now)
            now = []
        now += r.messages
    for context in [*contexts, now]:
        shown = " ".join(m.content for m in context)
        assert sum(p in shown for p in problem.data["parts"]) <= window
    assert f"<result>{problem.answer}</result>" in now[-1].content


def test_a_wrong_demonstration_is_wrong_and_a_guess_is_a_guess() -> None:
    task, env = Recall(), StreamEnv(tools=["memory"], system="")
    for i in range(30):
        p = task.problem(i)
        assert play(env, task, p, task.demonstration(p, Random(i), False))[1][-1].score == 0
    guess, bare = Recall(demonstrate="guess"), StreamEnv(system="")
    scores = [
        play(bare, guess, p, guess.demonstration(p, Random(i), True))[1][-1].score
        for i in range(200)
        for p in [guess.problem(i)]
    ]
    assert 0.03 < sum(scores) / 200 < 0.2 and guess.chance == 0.1


def test_stream_ends_after_its_turns() -> None:
    task = Recall(pairs=2)
    p = task.problem(0)
    read = "<memory>list</memory>"
    _, results = play(StreamEnv(tools=["memory"], answer_turns=2, max_turns=9), task, p, [read] * 9)
    assert len(results) == 4 and results[-1].truncated and not results[-1].terminated and results[-1].score == 0
    _, results = play(StreamEnv(tools=["memory"], max_turns=3), task, p, [read] * 9)
    assert len(results) == 3 and results[-1].truncated
    with pytest.raises(OndolError, match=r"raise env\.max_turns"):
        play(StreamEnv(max_turns=2), task, p, [])
    with pytest.raises(OndolError, match="does not come in parts"):
        play(StreamEnv(), Arithmetic(), Arithmetic().problem(0), [])


def test_results_open_the_next_context() -> None:
    task = Recall(pairs=2)
    p = task.problem(0)
    _, results = play(StreamEnv(tools=["memory"], system="Hi."), task, p, ["<memory>read x</memory>", "-"])
    assert results[0].anew and [m.role for m in results[0].messages] == ["system", "user"]
    assert results[0].messages[1].content.startswith("<result>Error: there is no note 'x'</result>\n")


# -- feedback ---------------------------------------------------------------------------------------------------------


def test_feedback_leads_to_the_answer() -> None:
    """A policy that believes what it is told finds any number by halving."""
    task, env = Arithmetic(forms=("a + b",)), FeedbackEnv(max_turns=9, discount=0.9)
    for index in range(10):
        problem, low, high = task.problem(index), 0, 256

        async def halve(problem=problem, low=low, high=high):
            episode = env.episode(task, problem, "t", None)
            await episode.reset()
            for k in range(9):
                guess = (low + high) // 2
                result = await episode.step(Message("assistant", str(guess)), k == 8)
                if result.terminated:
                    return k, result
                low, high = (guess, high) if "too small" in result.messages[0].content else (low, guess)

        k, result = asyncio.run(halve())
        assert result.score == 1 and result.reward == pytest.approx(0.9**k)


def test_feedback_of_partial_scores_and_the_last_try() -> None:
    pytest.importorskip("reasoning_gym")
    task = parts.make("tasks", {"name": "reasoning-gym", "dataset": "tower_of_hanoi", "options": {"max_disks": 3}})
    problem = task.problem(0)
    half = "\n".join(task.gold(problem).split("\n")[:2])
    _, results = play(FeedbackEnv(), task, problem, ["no idea", half, task.gold(problem)])
    assert [r.messages[0].content for r in results[:2]] == [
        "Not right (score 0.00). Try again.",
        "Not right (score 0.05). Try again.",
    ]
    assert results[-1].score == 1 and results[0].reward == results[1].reward == 0
    _, results = play(FeedbackEnv(max_turns=2, tell=False), task, problem, ["no idea", half])
    assert results[0].messages[0].content == "Not right. Try again."
    assert results[-1].terminated and results[-1].score == pytest.approx(0.05)


# -- moves ------------------------------------------------------------------------------------------------------------

SMALL = {
    "tower_of_hanoi": {"min_disks": 2, "max_disks": 4},
    "sokoban": {"min_w": 5, "max_w": 6, "min_h": 5, "max_h": 6, "min_boxes": 1, "max_boxes": 2},
}
STEPS = {"tower_of_hanoi": [f"{a} {b}" for a in range(1, 5) for b in range(1, 5)], "sokoban": list("UDLR")}


@pytest.fixture(params=sorted(PUZZLES))
def gym(request):
    pytest.importorskip("reasoning_gym")
    return parts.make(
        "tasks", {"name": "reasoning-gym", "dataset": request.param, "options": SMALL[request.param], "timeout_s": 20}
    )


def test_gold_moves_solve_the_puzzle_at_the_last_of_them(gym) -> None:
    for index in range(6):
        problem = gym.problem(index)
        gold = gym.gold(problem)
        moves = gold.split("\n") if "\n" in gold or " " in gold else list(gold)
        first, results = play(MovesEnv(max_turns=200), gym, problem, moves)
        assert first[0].role == "system" and first[1].content.endswith(puzzle_of(gym.dataset, problem).screen())
        ends = [i for i, r in enumerate(results) if r.terminated]
        assert ends == [len(results) - 1] and results[-1].score == results[-1].reward == 1
        if gym.dataset == "tower_of_hanoi":
            assert len(results) == len(moves)
        _, short = play(
            MovesEnv(max_turns=len(results) - 1 or 1), gym, problem, moves[:-1] if len(moves) > 1 else ["x"]
        )
        assert short[-1].truncated and short[-1].score < 1


def test_random_moves_score_as_the_verifier_says(gym) -> None:
    """Our world and reasoning-gym's agree on which moves can be made, and on when a puzzle is solved."""
    random = Random(1)
    for index in range(5):
        problem = gym.problem(index)
        puzzle, gold = puzzle_of(gym.dataset, problem), gym.gold(problem)
        for _ in range(12):
            puzzle.act(random.choice(STEPS[gym.dataset]))
        assert (gym.score(problem, f"<answer>{puzzle.solution}</answer>") == 1) <= puzzle.solved
        if gym.dataset == "sokoban":  # what reasoning-gym ignores, we refuse: the state after all letters is the same
            walk = "".join(random.choice("UDLR") for _ in range(10)) + gold
            mine = puzzle_of(gym.dataset, problem)
            for letter in walk:
                mine.act(letter)
            assert (gym.score(problem, f"<answer>{walk}</answer>") == 1) == mine.solved


HANOI = "Solve the Tower of Hanoi problem with 3 disks and 3 pegs.\nMove all disks from Peg 1 to Peg 3 following"


@settings(max_examples=150)
@given(st.lists(st.one_of(st.sampled_from(STEPS["tower_of_hanoi"]), st.text(max_size=20)), max_size=30))
def test_hanoi_keeps_its_rules(texts) -> None:
    puzzle = Hanoi(HANOI)
    for text in texts:
        before, made = puzzle.screen(), len(puzzle.moves)
        wrong = puzzle.act(text)
        assert (wrong is None) == (len(puzzle.moves) == made + 1) and (wrong is None) == (puzzle.screen() != before)
        assert sorted(d for disks in puzzle.pegs.values() for d in disks) == [1, 2, 3]
        assert all(disks == sorted(disks, reverse=True) for disks in puzzle.pegs.values())


def test_moves_are_written_in_several_ways_and_refused_with_a_reason() -> None:
    puzzle = Hanoi(HANOI)
    assert puzzle.screen() == "peg 1: 3 2 1\npeg 2: -\npeg 3: -" and "peg 3" in puzzle.goal()
    for text, said in (("1 3", None), ("Move disk 2 from Peg 1 to Peg 2", None), ("1 -> 2", "disk 3 cannot lie on disk 2"),
                       ("Move disk 1 from Peg 1 to Peg 3", "disk 1 is not on top of peg 1"), ("9 1", "there is no peg 9"),
                       ("2 2", "a move needs two pegs"), ("3, 2", None), ("3 1", "peg 3 is empty"),
                       ("up", 'not a move; write the two pegs, such as "1 3"')):  # fmt: skip
        assert puzzle.act(text) == said
    assert puzzle.solution.split("\n")[0] == "Move disk 1 from Peg 1 to Peg 3"


def test_other_tasks_have_no_moves() -> None:
    with pytest.raises(OndolError, match="no puzzle"):
        MovesEnv().episode(Arithmetic(), Arithmetic().problem(0), "t", None)
    pytest.importorskip("reasoning_gym")
    other = parts.make("tasks", {"name": "reasoning-gym", "dataset": "chain_sum"})
    with pytest.raises(OndolError, match="environment 'feedback'"):
        MovesEnv().episode(other, other.problem(0), "t", None)
