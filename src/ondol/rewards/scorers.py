"""Scorers: parts that say which two of a group's answers mean the same (Darling, arXiv 2509.02534).

Only the responses are compared, never the prompt. Those that guess (`ngram`, `embedding`, `model`) are asked about what
the rule for short answers cannot decide; those that know (`exact`, `canonical`) are asked about every pair.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ondol.errors import OndolError
from ondol.models.embedding import MINILM, Encoder, load_encoder
from ondol.parts import Part, find
from ondol.rewards.base import marked_answer
from ondol.rewards.diversity import FLOOR, Clusters, cluster_diversity, merge, ngram_novelty, ngrams, short_answer

if TYPE_CHECKING:
    from torch import Tensor

_RETRIES, _BACKOFF_S = 3, 0.5  # waits 0.5, 1 and 2 seconds
_REMEMBERED = 100_000  # verdicts, or embeddings


class PairScorer(Part):
    """Says which pairs of responses mean the same. A subclass defines `judge`."""

    knows: ClassVar[bool] = False  #: it never guesses, so the rule for short answers is not asked first

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two of each pair mean the same. May raise anything: it is asked again, then the run ends.

        Need not be symmetric: it is asked once for each pair, the earlier response first.
        """
        raise NotImplementedError(f"{type(self).__name__} must define judge()")

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """`judge` behind the rule for short answers, each pair of texts judged once.

        Raises OndolError when `judge` failed four times: a pair that was taken for different would be rewarded.
        """
        known = self._verdicts
        if len(known) > _REMEMBERED:
            known.clear()
        for pair in pairs:
            if pair not in known and (decided := self._at_once(*pair)) is not None:
                known[pair] = decided
        asked = list(dict.fromkeys(p for p in pairs if p not in known))
        if asked:
            known.update(zip(asked, self._patiently(asked)))
        return [known[p] for p in pairs]

    def clusters(self, responses: Sequence[str]) -> Clusters:
        """Groups of responses that mean the same, chains included."""
        n = len(responses)
        indices = [(i, j) for i in range(n) for j in range(i + 1, n)]
        verdicts = self.same([(responses[i], responses[j]) for i, j in indices])
        return merge(n, (pair for pair, same in zip(indices, verdicts) if same))

    def diversity(self, responses: Sequence[str], floor: float = FLOOR) -> list[float]:
        """Of each response: share of the others that mean something else, at least `floor`; 1 for a response alone."""
        return cluster_diversity(self.clusters(responses), floor)

    @cached_property
    def _verdicts(self) -> dict[tuple[str, str], bool]:
        return {}

    def _at_once(self, a: str, b: str) -> bool | None:
        if self.knows:
            return None
        return True if a == b else short_answer(a, b)

    def _patiently(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        for attempt in range(_RETRIES + 1):
            try:
                verdicts = [bool(v) for v in self.judge(pairs)]
                if len(verdicts) != len(pairs):
                    raise ValueError(f"{len(verdicts)} verdicts for {len(pairs)} pairs")
                return verdicts
            except OndolError:
                raise  # a package or a model is missing: waiting cures nothing
            except Exception as e:
                if attempt == _RETRIES:
                    raise OndolError(
                        f"the scorer {type(self).__name__} failed {attempt + 1} times: {type(e).__name__}: {e}",
                        "look at the scorer; the run can be resumed from its last checkpoint",
                    ) from e
                time.sleep(_BACKOFF_S * 2**attempt)
        raise AssertionError("unreachable")


class ShortAnswer(PairScorer):
    """The rule for short answers alone; longer ones are the same when their texts are."""

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [_plain(a) == _plain(b) for a, b in pairs]


class Exact(PairScorer):
    """Equal answers, but for case and white space: what the last `<answer>` or `\\boxed{}` holds, else the whole text."""

    knows: ClassVar[bool] = True

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [_plain(_answer(a)) == _plain(_answer(b)) for a, b in pairs]


class Canonical(PairScorer):
    """Answers of the same class, as a function from text to class says. Answers without a class (None) are alike."""

    knows: ClassVar[bool] = True

    function: str = Field(
        default="ondol.rewards.scorers:two_addends",
        description='"module:function" from a response to its class (None: it has none); by default the pairs of two-addends',
    )

    def model_post_init(self, context: Any) -> None:
        if ":" not in self.function:
            raise OndolError(f"canonical: '{self.function}' is no reference", 'give "module:function"')
        if not callable(self._function):
            raise OndolError(f"canonical: '{self.function}' is no function", 'give "module:function"')

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [self._function(a) == self._function(b) for a, b in pairs]

    @cached_property
    def _function(self) -> Callable[[str], Any]:
        return find("scorers", self.function)


class NGram(PairScorer):
    """The lexical baseline: a response's diversity is the share of its n-grams that no other response has.

    As a judge of pairs: the shorter response's n-grams are found in the other.
    """

    n: int = Field(default=4, ge=1, description="words in a row; 4 in the paper")
    threshold: float = Field(
        default=0.3, gt=0, le=1, description="share of the shorter one's n-grams that makes two the same; ours"
    )

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [self._overlap(a, b) >= self.threshold for a, b in pairs]

    def diversity(self, responses: Sequence[str], floor: float = FLOOR) -> list[float]:
        if len(responses) == 1:
            return [1.0]
        return [max(v, floor) for v in ngram_novelty(responses, self.n)]

    def _overlap(self, a: str, b: str) -> float:
        u, v = ngrams(a, self.n), ngrams(b, self.n)
        return len(u & v) / max(min(len(u), len(v)), 1)


class Embedding(PairScorer):
    """Cosine of sentence embeddings (mean of the last layer over tokens), by all-MiniLM-L6-v2 or any such encoder."""

    path: str = Field(
        default=MINILM, description=f"an encoder: the package '{MINILM}', a folder in HF layout, or a hub id"
    )
    threshold: float = Field(default=0.75, gt=-1, le=1, description="cosine from which on two are the same; ours")
    max_tokens: int = Field(
        default=256, ge=1, description="more of a response is cut; 256 in all-MiniLM-L6-v2's settings"
    )
    batch: int = Field(default=32, ge=1, description="responses embedded at once")
    device: str = Field(default="cpu", description="cpu, cuda ...")

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        vectors = self.embed(list(dict.fromkeys(text for pair in pairs for text in pair)))
        return [float(vectors[a] @ vectors[b]) >= self.threshold for a, b in pairs]

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A vector of length 1 for each text."""
        known = self._vectors
        if len(known) > _REMEMBERED:
            known.clear()
        new = [t for t in texts if t not in known]
        known.update(zip(new, self._encoder.embed(new)))
        return {t: known[t] for t in texts}

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.path, "the scorer 'embedding'", self.max_tokens, self.batch, self.device)


class PairModel(PairScorer):
    """A sequence-pair classifier, [CLS] a [SEP] b [SEP]; its last class is "same". Each side may fill half the budget."""

    path: str = Field(description="a classifier: a folder in HF layout, or a hub id")
    threshold: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="P(same) above which two are the same; 0.5 for math, 0.32 for chat in the paper",
    )
    max_tokens: int = Field(default=4096, ge=8, description="of a pair; 4096 for math, 2048 for chat in the paper")
    batch: int = Field(default=16, ge=1, description="pairs judged at once")
    device: str = Field(default="cpu", description="cpu, cuda ...")

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        import torch

        tokenizer, model = self._loaded
        cut = {text: self._cut(text) for pair in pairs for text in pair}
        out: list[bool] = []
        for start in range(0, len(pairs), self.batch):
            chunk = pairs[start : start + self.batch]
            first, second = [cut[a] for a, _ in chunk], [cut[b] for _, b in chunk]
            inputs = tokenizer(first, second, padding=True, return_tensors="pt").to(self.device)
            with torch.no_grad():
                same = model(**inputs).logits.float().softmax(-1)[:, -1]
            out += (same > self.threshold).tolist()
        return out

    def _cut(self, text: str) -> str:
        """The beginning of a text that fills half the budget."""
        tokenizer = self._loaded[0]
        half = (self.max_tokens - tokenizer.num_special_tokens_to_add(pair=True)) // 2
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(spans) <= half else text[: spans[half - 1][1]]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification

        return load_encoder(AutoModelForSequenceClassification, self.path, self.device, "the scorer 'model'")


_ADDENDS = re.compile(r"([0-9]{1,18})\+([0-9]{1,18})")


def two_addends(response: str) -> str | None:
    """Class of an answer "a+b": the smaller addend in buckets of 3, as the task `two-addends` classes right answers."""
    match = _ADDENDS.fullmatch(response.strip())
    return None if match is None else str(min(int(match[1]), int(match[2])) // 3)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _answer(text: str) -> str:
    marked = marked_answer(text)
    return text if marked is None else marked
