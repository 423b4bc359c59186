"""One battery over every registered task; then what is particular to each."""

from __future__ import annotations

import json
import pickle
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ondol import parts
from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.base import Task, split_of
from ondol.tasks.miniwob import pages_folder
from ondol.tools.chromium import missing

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A recipe's table for every built-in task, some in several settings."""
    path = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + {i}?", "answer": 2 * i}) + "\n" for i in range(60)))
    forms = ["a * b - c", "(a + b) * c", "a // b", "a % b - c * 2"]
    return {
        "arithmetic": {"name": "arithmetic"},
        "arithmetic, many forms": {
            "name": "arithmetic",
            "forms": forms,
            "low": -20,
            "high": 20,
            "ranges": {"c": [100, 999]},
        },
        "two-addends": {"name": "two-addends"},
        "digits": {"name": "digits"},
        "recall": {"name": "recall"},
        "search-qa": {"name": "search-qa"},
        "search-qa, two hops": {"name": "search-qa", "hops": 2},
        "search-qa, python": {"name": "search-qa", "corpus": "python"},
        "sql": {"name": "sql"},
        "sql, duckdb": {"name": "sql", "engine": "duckdb"},
        "widgets": {"name": "widgets"},
        "widgets, many": {"name": "widgets", "tabs": 3, "widgets": 9, "goals": [1, 5]},
        "widgets, places": {"name": "widgets", "tabs": 3, "widgets": 20, "actions": "places", "look": "desktop"},
        "jsonl": {"name": "jsonl", "path": str(path)},
        "gymnasium": {"name": "gymnasium"},
        "gymnasium, taxi": {"name": "gymnasium", "id": "Taxi-v4"},
        "gymnasium, cards": {"name": "gymnasium", "id": "Blackjack-v1"},
        "textworld": {"name": "textworld"},
        "miniwob": {"name": "miniwob", "pages": ["click-test-2"]},
        "reasoning-gym": {"name": "reasoning-gym", "dataset": "chain_sum"},
        "reasoning-gym, options": {
            "name": "reasoning-gym",
            "dataset": "countdown",
            "options": {"min_numbers": 3, "max_numbers": 3},
            "timeout_s": 0.5,
        },
        "reasoning-gym, listed items": {"name": "reasoning-gym", "dataset": "gsm_symbolic"},
        "reasoning-gym, many lines": {"name": "reasoning-gym", "dataset": "mini_sudoku"},
        "reasoning-gym, an example": {"name": "reasoning-gym", "dataset": "graph_color"},
    }


CASES = [
    "arithmetic",
    "arithmetic, many forms",
    "two-addends",
    "digits",
    "recall",
    "search-qa",
    "search-qa, two hops",
    "search-qa, python",
    "sql",
    "sql, duckdb",
    "widgets",
    "widgets, many",
    "widgets, places",
    "jsonl",
    "gymnasium",
    "gymnasium, taxi",
    "gymnasium, cards",
    "textworld",
    "miniwob",
    "reasoning-gym",
    "reasoning-gym, options",
    "reasoning-gym, listed items",
    "reasoning-gym, many lines",
    "reasoning-gym, an example",
]


@pytest.fixture
def task(request, tables) -> Task:
    if request.param.startswith("reasoning-gym"):
        pytest.importorskip("reasoning_gym")
    if request.param.endswith("duckdb"):
        pytest.importorskip("duckdb")
    if request.param.startswith("gymnasium"):
        pytest.importorskip("gymnasium")
    if request.param == "textworld":
        pytest.importorskip("textworld")
    no_pages = missing() or (None if pages_folder() else "the package miniwob is not installed")
    if request.param.startswith("miniwob") and no_pages:
        pytest.skip(no_pages)
    return parts.make("tasks", tables[request.param])


every_task = pytest.mark.parametrize("task", CASES, indirect=True)


def test_every_built_in_task_has_a_case(tables):
    elsewhere = {"openenv", "verifiers"}  # tests/tasks/test_openenv.py, tests/tasks/test_verifiers_package.py
    assert {t["name"] for t in tables.values()} == set(parts.BUILT_IN["tasks"]) - elsewhere and set(tables) == set(
        CASES
    )


@every_task
def test_checks_itself(task):
    task.check(8)


@every_task
def test_determinism_ids_and_splits(task):
    again = pickle.loads(pickle.dumps(task))
    order = [("test", 3), ("train", 0), ("train", 7), ("test", 0), ("train", 0)]
    assert [task.problem(i, s) for s, i in order] == [again.problem(i, s) for s, i in reversed(order)][::-1]
    seen = {s: [task.problem(i, s) for i in range(12)] for s in SPLITS}
    for split in SPLITS:
        for p in seen[split]:
            assert split_of(p.question) == split and re.fullmatch("[0-9a-f]{16}", p.id) and p.question
            json.dumps(p.data)
    assert not {p.question for p in seen["train"]} & {p.question for p in seen["test"]}
    everything = seen["train"] + seen["test"]
    assert len({p.id for p in everything}) == len({p.question for p in everything})
    other = type(task)(**{**task.model_dump(), "seed": 1})
    assert [p.id for p in seen["train"]] != [other.problem(i).id for i in range(12)]


@every_task
def test_a_finite_task_visits_each_problem_once_per_pass(task):
    for split in SPLITS:
        size = task.size(split)
        if size is None:
            continue
        passes = [[task.problem(k * size + i, split).id for i in range(size)] for k in range(2)]
        assert len(set(passes[0])) == size and set(passes[0]) == set(passes[1])
    if task.size("train"):
        assert passes[0] != passes[1]


@every_task
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    response=st.one_of(
        st.text(),
        st.sampled_from(
            ["<answer>", "\\boxed{", "9" * 6000, "1/0", "{}", "[[", "nan", "inf", "1e9999999", "\ud800", "\0", "None"]
        ),
    )
)
def test_hostile_responses_score_in_range(task, response):
    assert 0.0 <= task.score(task.problem(0), response) <= 1.0


@every_task
def test_marked_gold_scores_too(task):
    if task.__class__.__name__ in ("ReasoningGym", "Arithmetic"):
        p = task.problem(0)
        assert task.score(p, f"Let me think. <answer>{task.gold(p)}</answer>") == 1.0


def test_check_names_the_slip():
    class Bad(Task):
        def problem(self, index, split="train"):
            return Problem("x", f"q{index}", "1")

        def size(self, split):
            return 2

        def score(self, problem, response):
            return 1.0

        def near_misses(self, problem):
            return ["2"]

    with pytest.raises(OndolError, match=r"train problem 0 \('q0'\): the wrong response '2' scores 1"):
        Bad().check()


def test_arithmetic_is_right():
    task = parts.make(
        "tasks", {"name": "arithmetic", "forms": ["a * b + c", "(a - b) * c"], "template": "{expression} = "}
    )
    forms = set()
    for i in range(50):
        p = task.problem(i)
        assert p.question == p.data["expression"] + " = " and eval(p.data["expression"]) == int(p.answer)
        assert all(12 <= int(n) <= 98 for n in re.findall(r"\d+", p.question))
        forms.add(re.sub(r"\d+", "n", p.question))
        assert task.score(p, f"First 1, then {int(p.answer):,}.") == 1.0
    assert forms == {"n * n + n = ", "(n - n) * n = "}


@pytest.mark.parametrize(
    "settings",
    [
        {"low": 9, "high": 3},
        {"forms": []},
        {"forms": ["a ** b"]},
        {"forms": ["a / b"]},
        {"forms": ["ab"]},
        {"forms": ["a +"]},
        {"forms": ["1 + 1"]},
        {"forms": ["2a"]},
        {"template": "What?"},
        {"ranges": {"a": [2, 1]}},
        {"forms": ["__import__('os')"]},
        {"high": 10**2000},
    ],
)
def test_bad_arithmetic_is_refused(settings):
    with pytest.raises(OndolError):
        parts.make("tasks", {"name": "arithmetic", **settings})


def test_an_empty_split_is_named():
    task = parts.make("tasks", {"name": "arithmetic", "low": 12, "high": 12})
    empty = next(s for s in SPLITS if split_of("What is 12 * 12 + 12?") != s)
    with pytest.raises(OndolError, match=f"belongs to the {empty} split"):
        task.problem(0, empty)


@given(st.integers(-5, 70), st.integers(-5, 70), st.sampled_from(["{}+{}", " {}+{}\n", "{} + {}", "{}+{}.", "+{}+{}"]))
def test_two_addends(a, b, form):
    task = parts.make("tasks", "two-addends")
    p = Problem("", "40", "", {"n": 40})
    right = a >= 1 and b >= 1 and a + b == 40 and form in ("{}+{}", " {}+{}\n")
    assert task.score(p, form.format(a, b)) == float(right)
    assert (task.answer_class(p, form.format(a, b)) is not None) == right
    if right:
        assert task.answer_class(p, f"{a}+{b}") == task.answer_class(p, f"{b}+{a}") == str(min(a, b) // 3)


def test_reasoning_gym_names_what_is_wrong():
    pytest.importorskip("reasoning_gym")
    for table, says in [
        ({"dataset": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "options": {"min_termz": 2}}, "min_termz"),
        ({"dataset": "chain_sum", "options": {"min_terms": -2}}, "min_terms"),
        ({"dataset": "chain_sum", "options": {"seed": 2}}, "options.seed"),
        ({}, "dataset: this key is required"),
    ]:
        with pytest.raises(OndolError, match=re.escape(says)):
            parts.make("tasks", {"name": "reasoning-gym", **table})


def test_reasoning_gym_missing_package(monkeypatch):
    import sys

    from ondol.tasks import reasoning_gym

    reasoning_gym.source.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(OndolError, match=r"pip install 'ondol\[tasks\]'"):
        parts.make("tasks", {"name": "reasoning-gym", "dataset": "chain_sum"})
    reasoning_gym.source.cache_clear()


@pytest.mark.parametrize("dataset", ["polynomial_multiplication", "list_functions"])
def test_reasoning_gym_makes_the_same_items_in_every_process(dataset):
    """These datasets follow the order of sets, or draw from a shared generator."""
    pytest.importorskip("reasoning_gym")
    from ondol.tasks import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2} if dataset == "polynomial_multiplication" else {}
    task = parts.make("tasks", {"name": "reasoning-gym", "dataset": dataset, "options": options})
    before = [task.problem(i) for i in (0, 1, 2)]
    reasoning_gym._judge.stop()
    reasoning_gym._question.cache_clear()
    assert [task.problem(i) for i in (2, 1, 0)] == before[::-1]


def test_reasoning_gym_reads_numbers_from_prose():
    pytest.importorskip("reasoning_gym")
    task = parts.make("tasks", {"name": "reasoning-gym", "dataset": "chain_sum"})
    p = task.problem(0)
    assert task.score(p, f"3 steps later we have {int(p.answer):,}.") == 1.0


@pytest.mark.parametrize("dataset", ["countdown", "n_queens", "simple_integration"])
def test_reasoning_gym_evaluates_no_programs(dataset, tmp_path):
    """These scorers hand the response to `eval`: it must reach neither files nor processes, and never hang."""
    pytest.importorskip("reasoning_gym")
    task = parts.make("tasks", {"name": "reasoning-gym", "dataset": dataset, "timeout_s": 0.5})
    p, probe = task.problem(0), tmp_path / "probe"
    for attack in [
        f"__import__('os').system('touch {probe}')",
        f"open('{probe}', 'w')",
        f"[open('{probe}', 'w')]",
        f"exec('import os; os.mkdir(\"{probe}\")')",
        f"(lambda: open('{probe}', 'w'))()",
        f"type('', (), {{}}).mro()[1].__subclasses__()[0]('{probe}')",
        "print('1.0')",
        "exit()",
        "9**9**9**9",
        "[0]*10**11",
    ]:
        assert task.score(p, f"<answer>{attack}</answer>") < 1.0
        assert not probe.exists()
    assert task.score(p, task.gold(p)) == 1.0


def test_the_second_fence_holds_alone(tmp_path):
    from ondol.sandbox.child import Judge

    (tmp_path / "fenced.py").write_text(
        "from ondol.sandbox.child import serve\nserve(lambda q: str(eval(q['text'])))\n"
    )
    judge = Judge("fenced")
    import os

    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path) + (os.pathsep + old if old else "")
    try:
        assert judge.ask({"text": "1 + 1"}, 20) == "2"
        probe = tmp_path / "probe"
        for attack in [
            f"__import__('os').system('touch {probe}')",
            f"__import__('subprocess').run(['touch', '{probe}'])",
            f"open('{probe}', 'w')",
            f"__import__('os').mkdir('{probe}')",
            "__import__('socket').socket()",
            "1/0",
        ]:
            assert judge.ask({"text": attack}, 20) is None and not probe.exists()
        pid = judge.pid
        assert judge.ask({"text": "[0 for i in iter(int, 1)]"}, 0.5) is None
        assert judge.ask({"text": "2 + 2"}, 20) == "4" and judge.pid != pid
    finally:
        judge.stop()
        os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


def lines(tmp_path, data: bytes, **more):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return {"name": "jsonl", "path": str(path), **more}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a JSON object is needed, not list"),
        (b'{"question": "q"}', "no field 'answer'"),
        (b'{"problem": "q", "answer": 1}', "no field 'question'"),
        (b'{"question": " ", "answer": 1}', "field 'question'"),
        (b'{"question": 5, "answer": 1}', "field 'question'"),
        (b'{"question": "q", "answer": null}', "field 'answer'"),
        (b'{"question": "q", "answer": ""}', "field 'answer'"),
        (b'{"question": "q", "answer": true}', "field 'answer'"),
        (b'{"question": "q", "answer": "blue"}', "holds no number"),
        (b'{"question": "ok", "answer": "2"}', "the question of line 1 again"),
        (b'{"question": "\xff", "answer": "2"}', "not UTF-8"),
        (b'{"question": "\\ud800", "answer": "2"}', "surrogate"),
        (b"[" * 100000, ""),
    ],
)
def test_jsonl_names_file_line_and_field(tmp_path, line, says):
    with pytest.raises(OndolError) as error:
        parts.make("tasks", lines(tmp_path, b'{"question": "ok", "answer": "1"}\n\n' + line + b"\n"))
    assert "data.jsonl:3: " in str(error.value) and says in str(error.value)


def test_jsonl_lists_the_first_bad_lines(tmp_path):
    with pytest.raises(OndolError) as error:
        parts.make("tasks", lines(tmp_path, b"{\n" * 9))
    assert error.value.what.count("data.jsonl:") == 5 and "and 4 more" in error.value.what


def test_jsonl_other_mistakes(tmp_path):
    good = b'{"question": "1 + 1", "answer": "2"}\n'
    test = tmp_path / "test.jsonl"
    test.write_bytes(good)
    for table, says in [
        ({"name": "jsonl", "path": str(tmp_path / "none.jsonl")}, "No such file"),
        ({"name": "jsonl", "path": str(tmp_path)}, "directory"),
        (lines(tmp_path, good, verifier="numerc"), "did you mean 'numeric'"),
        (lines(tmp_path, good, verifier={"name": "numeric", "tol": 1}), "verifier.tol"),
        (lines(tmp_path, good, test_path=str(test)), "questions are also in"),
    ]:
        with pytest.raises(OndolError, match=re.escape(says)):
            parts.make("tasks", table)


@pytest.mark.parametrize("data", [b"", b" \n\n"])
def test_jsonl_empty_file(tmp_path, data):
    with pytest.raises(OndolError, match="holds no problem"):
        parts.make("tasks", lines(tmp_path, data))


def test_jsonl_fields_verifiers_and_a_test_file(tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_bytes('\ufeff{"q": "capital of Korea?", "a": "Seoul"}\r\n'.encode())
    table = lines(
        tmp_path,
        b'{"q": "capital of France?", "a": "Paris"}',
        question_field="q",
        answer_field="a",
        verifier="exact",
        test_path=str(test),
    )
    task = parts.make("tasks", table)
    assert (task.size("train"), task.size("test")) == (1, 1)
    assert task.score(task.problem(0), "<answer>paris</answer>") == 1.0 and task.problem(5, "test").answer == "Seoul"
    task.check()
