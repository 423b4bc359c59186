"""The embedded engine: continuous batching over the learner's own model.

- One KV slot a session, preallocated; a session keeps its slot between turns, so only what is new is prefilled.
- A new prompt copies the KV of the longest prefix that any slot already holds: the samples of one prompt, and
  prompts with a common beginning, compute it once. `stats.prefix_hit_share` says how often.
- Finished rows leave at once and waiting ones enter; prefilling and decoding rows share one forward pass.
- Every row draws from its own random stream, so company and order do not change what is sampled (up to rounding:
  matrix products of another shape may differ in the last bit).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ondol.engines.attention import CachedAttention, Slots
from ondol.engines.base import Completion, EngineStats, Request, uniforms
from ondol.engines.graphs import DecodeGraphs
from ondol.engines.sampling import sample
from ondol.errors import OndolError
from ondol.models import forward
from ondol.models.lean import make_lean
from ondol.models.packed import PackedWeights
from ondol.records import Finish

_MARGIN = 8  # tokens read beyond a stop string's bytes, for characters that the first of them cut in two
_WAIT = 16  # tokens more than its own that a row waits a pass for, when another one computes them


@dataclass
class _Row:
    """A session in a slot: its turn being sampled, or None while a tool runs."""

    slot: int
    cached: int = 0  # tokens whose KV is in the slot
    tokens: list[int] = field(default_factory=list)  # whole sequence so far; tokens[cached:] are to be computed
    request: Request | None = None
    uniforms: np.ndarray | None = None
    out: Completion | None = None
    started: float = 0.0
    tail: int = 0  # tokens that any of the stop strings can span


class TorchEngine:
    """Samples with a transformers causal LM. See `ondol.engines.base.Engine`.

    Args:
        model: a causal LM; its attention is switched to ours.
        tokenizer: used to read text for stop strings.
        context_length: most tokens of one sequence.
        max_batch: most sequences in the KV at once; the rest wait.
        prefill_tokens: most new prompt tokens in one forward pass.
        share_prefixes: copy KV of common prefixes; off is the plain path.
        pack_weights: on a CPU, hold a second copy of the weights that is quicker to multiply; off is the plain path.
        cuda_graphs: decode with fixed shapes, on a GPU as CUDA graphs; the KV then stays between steps of training.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        context_length: int,
        *,
        max_batch: int = 64,
        prefill_tokens: int = 2048,
        share_prefixes: bool = True,
        pack_weights: bool = True,
        cuda_graphs: bool = False,
    ) -> None:
        self.model = forward.prepare(model)
        self.tokenizer = tokenizer
        self.context_length, self.max_batch = context_length, max_batch
        self.prefill_tokens, self.share_prefixes = prefill_tokens, share_prefixes
        self.version = 0
        self.stats = EngineStats()
        self._waiting: deque[Request] = deque()
        self._rows: dict[str, _Row] = {}
        self._cache = Slots(forward.causal_lm(model).config)
        self._packed = PackedWeights(model) if pack_weights else None
        if pack_weights:
            make_lean(model)
        self._graphs = DecodeGraphs(model, self._cache) if cuda_graphs else None

    # -- Engine -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(r.request is not None for r in self._rows.values())

    def submit(self, request: Request) -> None:
        if len(request.ids) == 0:
            raise OndolError("an engine request has no tokens", "render a prompt first")
        if len(request.ids) >= self.context_length:
            raise OndolError(
                f"a prompt of {len(request.ids)} tokens does not fit the model's context of {self.context_length}",
                "shorten the prompt or the observations, or take a model with a longer context",
            )
        row = self._rows.get(request.session)
        if (row is not None and row.request is not None) or any(w.session == request.session for w in self._waiting):
            raise OndolError(f"session '{request.session}' has a turn under way", "wait for it, or release the session")
        self._waiting.append(request)

    def release(self, session: str) -> None:
        self._rows.pop(session, None)
        if any(w.session == session for w in self._waiting):
            self._waiting = deque(w for w in self._waiting if w.session != session)

    def partial(self, session: str) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities so far of a turn under way; empty when there is none."""
        row = self._rows.get(session)
        return (row.out.ids, row.out.logp) if row is not None and row.out is not None else ([], [])

    def sync(self, version: int) -> None:
        if any(r.request is not None for r in self._rows.values()):
            raise OndolError("weights changed while turns were being sampled", "finish or release them first")
        self.version = version
        self._rows.clear()
        if self._graphs is None:
            self._cache.free()
        if self._packed is not None:
            self._packed.free()

    def renew(self, version: int) -> None:
        """The weights have changed, and turns under way go on with the new ones: what they hold is computed again with those (nothing is
        sampled again), so that each token's log-prob is its own version's of all that came before it."""
        for row in self._rows.values():
            row.cached = 0
            if row.out is not None and version != self.version:
                row.out.versions = row.out.token_versions
        self.version = version
        if self._packed is not None:
            self._packed.free()

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        started = time.perf_counter()
        self._admit()
        rows = [r for r in self._rows.values() if r.request is not None]
        if not rows:
            return []
        now = time.monotonic()
        late = [r for r in rows if r.request is not None and now >= r.started + r.request.timeout_s]
        done = [self._finish(r, Finish.TIMEOUT) for r in late]
        rows = [r for r in rows if r.request is not None]
        self._close_ranks(rows)
        batch, ready = self._compose(rows) if rows else ([], [])
        if batch:
            if self._packed is not None:
                self._packed.refresh()
            logits = self._replay(batch)
            if logits is None:
                states = self._forward(batch)
                logits = forward.logits(self.model, states) if ready else None
            if logits is not None:
                done += self._sample(ready, logits)
        self.stats.steps += 1
        self.stats.seconds += time.perf_counter() - started
        return done

    # -- scheduling ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests a row: their session's own, or a free slot."""
        held: list[Request] = []
        while self._waiting:
            request = self._waiting.popleft()
            row = self._rows.get(request.session)
            if row is None:
                if len(self._rows) >= self.max_batch:
                    idle = next((s for s, r in self._rows.items() if r.request is None), None)
                    if idle is None or any(w.session == idle for w in self._waiting):
                        held.append(request)
                        continue
                    self.release(idle)  # a session between turns gives way; it is prefilled again when it returns
                used = {r.slot for r in self._rows.values()}
                row = _Row(slot=next(i for i in range(self.max_batch) if i not in used))
                self._rows[request.session] = row
            tokens = list(request.ids)
            row.cached = min(_common(row.tokens[: row.cached], tokens), len(tokens) - 1)
            self.stats.reused_tokens += row.cached
            row.tokens, row.request = tokens, request
            row.uniforms = uniforms(request.seed, request.sampling.max_tokens)
            row.tail = max((len(s.encode()) for s in request.stop), default=0) + _MARGIN
            row.started = time.monotonic()
            row.out = Completion(request.session, [], [], [], "", Finish.LENGTH, self.version, cached_tokens=row.cached)
        self._waiting.extend(held)

    def _close_ranks(self, rows: list[_Row]) -> None:
        """Move sampling rows down into free slots, so that attention runs over a dense view of the first ones."""
        used = {r.slot for r in self._rows.values()}
        for row in sorted(rows, key=lambda r: -r.slot):
            free = next((i for i in range(row.slot) if i not in used), None)
            if free is None:
                return
            if row.cached:
                self._cache.copy(row.slot, free, row.cached)
            used = (used - {row.slot}) | {free}
            row.slot = free

    def _compose(self, rows: list[_Row]) -> tuple[list[tuple[_Row, int]], list[_Row]]:
        """What one forward pass computes: (row, new tokens), and the rows that can then be sampled from."""
        batch: list[tuple[_Row, int]] = []
        ready: list[_Row] = []
        budget = self.prefill_tokens
        leaders: list[_Row] = []
        reach = max(
            len(r.tokens) + (r.request.sampling.max_tokens - len(r.out.ids) if r.request and r.out else 1) for r in rows
        )
        self._cache.reserve(max(r.slot for r in rows) + 1, max(len(r.tokens) for r in rows) + 1, reach, self.model)
        for row in sorted(rows, key=lambda r: r.slot):
            if self.share_prefixes and len(row.tokens) - row.cached > 1:
                donor, shared = self._donor(row)
                if donor is not None:
                    self._cache.copy(donor.slot, row.slot, shared)
                    self.stats.reused_tokens += shared - row.cached
                    if row.out is not None:
                        row.out.cached_tokens += shared - row.cached
                    row.cached = shared
                if any(_common(o.tokens, row.tokens) > row.cached + _WAIT for o in leaders):
                    continue  # another row of this pass computes a longer prefix: wait one pass and copy it
            new = len(row.tokens) - row.cached
            if new > 1:
                new = min(new, budget)
                if new == 0:
                    continue
                budget -= new
                leaders.append(row)
                self.stats.prefilled_tokens += new
            batch.append((row, new))
            if row.cached + new == len(row.tokens):
                ready.append(row)
        return batch, ready

    def _donor(self, row: _Row) -> tuple[_Row | None, int]:
        """The slot that holds more of this row's tokens than its own does, the most of all, and how many."""
        best, length = None, row.cached
        for other in self._rows.values():
            if other is not row and other.cached > length:
                shared = min(_common(other.tokens[: other.cached], row.tokens), len(row.tokens) - 1)
                if shared > length:
                    best, length = other, shared
        return best, length

    # -- computing ----------------------------------------------------------------------------------------------

    def _forward(self, batch: list[tuple[_Row, int]]) -> Tensor:
        """Run the model over the new tokens; last hidden states [ready rows, width], in batch order."""
        ids, positions, last = [], [], []
        for row, new in batch:
            ids += row.tokens[row.cached : row.cached + new]
            positions += range(row.cached, row.cached + new)
            if row.cached + new == len(row.tokens):
                last.append(len(ids) - 1)
        device = forward.head(self.model).device
        attend = CachedAttention(self._cache, [(r.slot, r.cached, n) for r, n in batch], device)
        states = forward.hidden(
            self.model, torch.tensor(ids, device=device), torch.tensor(positions, device=device), attend
        )
        for row, new in batch:
            row.cached += new
        return states[torch.tensor(last, device=device, dtype=torch.long)]

    def _replay(self, batch: list[tuple[_Row, int]]) -> Tensor | None:
        """Logits by a step of fixed shape, where that is possible."""
        if self._graphs is None or any(new != 1 for _, new in batch):
            return None
        tokens = {row.slot: (row.tokens[row.cached], row.cached) for row, _ in batch}
        logits = self._graphs.run(tokens, {r.slot: r.cached for r in self._rows.values()})
        if logits is not None:
            for row, new in batch:
                row.cached += new
        return logits

    def _sample(self, rows: list[_Row], logits: Tensor) -> list[Completion]:
        """Draw one token for each row, record it, and return the turns that ended with it."""
        done: list[Completion] = []
        kinds: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            assert row.request is not None
            kinds.setdefault(row.request.sampling, []).append(i)
        for sampling, members in kinds.items():
            u = torch.tensor([rows[i].uniforms[len(rows[i].out.ids)] for i in members], dtype=torch.float64)  # type: ignore[index,union-attr]
            picked = logits if len(kinds) == 1 else logits[torch.tensor(members, device=logits.device)]
            tokens, logp, truncated = sample(picked, sampling, u.to(logits.device))
            columns = (
                tokens.tolist(),
                logp.tolist(),
                truncated.tolist() if truncated is not None else [None] * len(members),
            )
            for i, token, lp, lp_truncated in zip(members, *columns):
                finish = self._append(rows[i], token, lp, lp_truncated)
                if finish is not None:
                    done.append(self._finish(rows[i], finish))
        self.stats.sampled_tokens += len(rows)
        return done

    def _append(self, row: _Row, token: int, logp: float, logp_truncated: float | None) -> Finish | None:
        request, out = row.request, row.out
        assert request is not None and out is not None
        row.tokens.append(token)
        out.ids.append(token)
        out.logp.append(logp)
        if out.versions or out.version != self.version:
            out.versions.append(self.version)
        if logp_truncated is not None:
            out.logp_truncated.append(logp_truncated)
        if token in request.end_ids:
            return Finish.END
        if request.stop:
            tail = self.tokenizer.decode(out.ids[-row.tail :], skip_special_tokens=False)
            if any(s in tail for s in request.stop):
                return Finish.STOP
        if len(out.ids) >= request.sampling.max_tokens:
            return Finish.LENGTH
        if len(row.tokens) >= self.context_length:
            return Finish.CONTEXT
        return None

    def _finish(self, row: _Row, finish: Finish) -> Completion:
        """End the row's turn; its KV stays in the slot for the session's next one."""
        request, out = row.request, row.out
        assert request is not None and out is not None
        ids = out.ids[:-1] if finish is Finish.END else out.ids
        out.text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if finish is Finish.STOP:  # the last token may hold text past the stop string: the action ends at the string
            ends = [out.text.index(s) + len(s) for s in request.stop if s in out.text]
            out.text = out.text[: min(ends, default=len(out.text))]
        out.finish, out.seconds = finish, time.monotonic() - row.started
        row.request = row.out = row.uniforms = None
        return out


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
