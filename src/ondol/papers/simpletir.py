"""SimpleTIR (arXiv 2509.02479): trajectories with a void turn do not count.

Arms: the method, and the same without its filter. A quarter of what the warm start shows ends in a void turn: random
letters, as the paper's void turns too are made of improbable tokens; the episode is over then, as in the official code. The
learning rate is higher than in other papers' runs, so that there is something to stabilise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondol.compare.arms import Arm, parse_arm
from ondol.compare.comparison import Comparison
from ondol.errors import OndolError
from ondol.methods.base import TokenInputs
from ondol.methods.simpletir import SimpleTIR, has_void_turn, token_gradient_norm
from ondol.papers import tool_sums
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.recipe import override, read_table
from ondol.records import Batch, Group

if TYPE_CHECKING:
    from torch import Tensor

_VOID = "void=ondol.papers.tool_sums:says_nothing"
# no further sampling where groups drop out: both arms get the same prompts
_ARMS = tuple(
    f"{label}=simpletir:filter={kind},resamples=0,{_VOID}" for label, kind in (("all", "none"), ("kept", "void"))
)


def _arms() -> Sequence[Arm]:
    return tool_sums.arms(
        *_ARMS,
        settings=("task.void_share=0.25", "optimizer.learning_rate=1e-3"),
    )


def _long_arms() -> Sequence[Arm]:
    """SmolLM2 and the real Python tool, from the recipe `arithmetic`."""
    table = read_table("arithmetic")
    for setting in ("method.minibatches=4", "train.steps=10", "evaluate.samples=4"):
        override(table, setting)
    return [parse_arm(f"smollm2-{text}", table) for text in _ARMS]


# -- what can be computed exactly, on a batch that was recorded -------------------------------------------------------------


def _gradients(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The first batch of the arm "kept" under the weights that sampled it, in float64."""
    from ondol.models.load import load_model
    from ondol.store import Run
    from ondol.train.dump import groups_of

    job = comparison.jobs["kept", seed]
    start, path = job.start.finished if job.start else None, job.finished
    if start is None or path is None:
        raise OndolError(f"the runs of seed {seed} are not finished", "run the arms first")
    with Run.open(path) as run:
        groups = groups_of(run.db.trajectories(phase="rl", step=1))
    model = load_model(str(start / "model"), dtype="float64").model
    return exactly(
        model, groups, {a.label: a.recipe(seed).method for a in comparison.arms if a.label in ("all", "kept")}
    )


def exactly(model: Any, groups: list[Group], methods: dict[str, SimpleTIR]) -> dict[str, float]:
    """Of groups that the model sampled: "change_<label>" is the greatest change of any parameter's gradient when other
    tokens stand in the turns of void trajectories; for what the formula has, see `_formula`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    garbled = [Group(g.problem, [_garbled(t, vocabulary) for t in g.trajectories]) for g in groups]
    void = sum(has_void_turn(t, tool_sums.says_nothing) for g in groups for t in g.trajectories)
    out = {"void_trajectories": float(void), **_formula(model, groups, methods["all"])}
    for label, method in methods.items():
        change = _gradient(model, groups, method) - _gradient(model, garbled, method)
        out[f"change_{label}"] = float(change.abs().max())
    return out


def _garbled(t: Any, vocabulary: int) -> Any:
    """A trajectory with a void turn, with another token in place of each that was sampled; any other as it is."""
    if not has_void_turn(t, tool_sums.says_nothing):
        return t
    other = copy.copy(t)
    other.ids = [(i + 1) % vocabulary if trained else i for i, trained in zip(t.ids, t.trained)]
    return other


def _gradient(model: Any, groups: list[Group], method: SimpleTIR) -> Tensor:
    """The gradient of the loss of the whole batch as one update, all parameters in a row."""
    import torch

    from ondol.train.logprobs import log_probs

    model.zero_grad()
    for batch in _packed(groups, method):
        x = _inputs(log_probs(model, batch)[0], batch)
        (method.token_loss(x)[0] * batch.weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _formula(model: Any, groups: list[Group], method: SimpleTIR) -> dict[str, float]:
    """Each token's gradient with respect to its own logits: autograd against the paper's formula.

    token_norm_...: means of the formula's root, which is the norm at an advantage and a ratio of 1.
    """
    import torch

    from ondol.models.forward import head
    from ondol.train.logprobs import target_states

    errors, roots, void = [], [], []
    with_void = torch.tensor(
        [has_void_turn(t, tool_sums.says_nothing) for g in method.keep(groups) for t in g.trajectories]
    )
    for batch in _packed(groups, method):
        with torch.no_grad():
            logits = target_states(model, batch) @ head(model).T
        logits.requires_grad_()
        x = _inputs(logits.log_softmax(-1).gather(-1, batch.target.unsqueeze(-1)).squeeze(-1), batch)
        (gradient,) = torch.autograd.grad(method.token_loss(x)[0].sum(), logits)
        ratio = torch.exp(x.logp - x.old_logp).detach()
        said = token_gradient_norm(logits.detach(), batch.target, x.advantage, ratio)
        errors.append((gradient.norm(dim=-1) - said).abs())
        one = torch.ones_like(ratio)
        roots.append(token_gradient_norm(logits.detach(), batch.target, one, one))
        void.append(with_void[batch.sequence])
    root, of_void = torch.cat(roots), torch.cat(void)
    return {
        "formula_error": float(torch.cat(errors).max()),
        "token_norm_void": float(root[of_void].mean()),
        "token_norm_other": float(root[~of_void].mean()),
    }


def _packed(groups: list[Group], method: SimpleTIR) -> list[Batch]:
    """What the learner makes of the groups in one update; all targets of these batches are trained."""
    from ondol.train.credit import credit
    from ondol.train.packing import pack

    found = credit(method.keep(groups), method, {})
    return pack(found.sequences(range(len(found.trajectories)), method), 8192)


def _inputs(logp: Tensor, batch: Batch) -> TokenInputs:
    old, advantage, reward = (v.to(logp.dtype) for v in (batch.logp, batch.advantage, batch.reward))
    return TokenInputs(logp, old, None, advantage, batch.sequence, batch.group, reward)


# -- claims ---------------------------------------------------------------------------------------------------------------


def _falls(m: Measured) -> Outcome:
    name = "void_share"
    held = m.mean("kept", name) < m.mean("kept", f"start/{name}")
    return Outcome(
        held, f"{m.text('kept', f'start/{name}')} -> {m.text('kept', name)}; without the filter {m.text('all', name)}"
    )


def _calm(m: Measured) -> Outcome:
    name = "gradient_p95"
    return Outcome(
        m.mean("kept", name) <= m.mean("all", name),
        f"with the filter {m.text('kept', name)}, without {m.text('all', name)} "
        f"(medians {m.text('kept', 'gradient_p50')} and {m.text('all', 'gradient_p50')})",
    )


def _score(m: Measured) -> Outcome:
    name = "score_sampled"
    return Outcome(
        m.mean("kept", name) >= m.mean("all", name),
        f"with the filter {m.text('kept', name)}, without {m.text('all', name)}; "
        f"at the start {m.text('kept', f'start/{name}')}",
    )


def _norm_formula(m: Measured) -> Outcome:
    worst = max(m.values("gradients", "formula_error"))
    void, other = (m.text("gradients", f"token_norm_{kind}") for kind in ("void", "other"))
    return Outcome(
        worst <= 1e-6,
        f"largest difference {worst:.1e}; the root is {void} in trajectories with a void turn, else {other}",
    )


def _zero(m: Measured) -> Outcome:
    kept, every = max(m.values("gradients", "change_kept")), min(m.values("gradients", "change_all"))
    return Outcome(kept == 0 and every > 0, f"with the filter {kept:g}, without at least {every:.1e}")


def _smollm2(m: Measured) -> Outcome:
    void, score = "void_share", "score_sampled"
    kept, every = "smollm2-kept", "smollm2-all"
    held = (
        m.mean(kept, void) <= m.mean(kept, f"start/{void}")
        and m.mean(kept, "gradient_p95") <= m.mean(every, "gradient_p95")
        and m.mean(kept, score) >= m.mean(every, score)
    )
    return Outcome(
        held,
        f"void {m.text(kept, f'start/{void}')} -> {m.text(kept, void)} (without the filter {m.text(every, void)}), "
        f"gradient norm {m.text(kept, 'gradient_p95')} against {m.text(every, 'gradient_p95')}, "
        f"score {m.text(kept, score)} against {m.text(every, score)}",
    )


PAPER = Paper(
    id="2509.02479",
    claims=(
        Claim(
            text="Void turns become rarer, although nothing is learned from them",
            paper="7B: training without collapse; no number of void turns in the card",
            how=f"share of held-out episodes with a void turn, {tool_sums.SAMPLES} samples each, before RL and after it",
            must="lower after it",
            judge=_falls,
        ),
        Claim(
            text="The filter keeps gradients small",
            paper="gradient norm stays flat, where it explodes without the filter",
            how="gradient norm before clipping, the greatest of a batch's 4 updates, 95th percentile over batches",
            must="with the filter not above without",
            judge=_calm,
        ),
        Claim(
            text="The filter does not cost accuracy",
            paper="AIME24 50.5 against 20 to 26 for naive multi-turn RL (Qwen2.5-7B; the latter as the card recalls)",
            how=f"pass@1 on held-out sums, {tool_sums.SAMPLES} samples each",
            must="with the filter not below without",
            judge=_score,
        ),
        Claim(
            text="A token's gradient norm is |A| rho sqrt(1 - 2 P(c) + sum of P squared)",
            paper="derived: largest where the chosen token is improbable and another one nearly certain",
            how="every token of a recorded batch, in float64: autograd with respect to its logits, and the formula",
            must="differ by at most 1e-6",
            judge=_norm_formula,
        ),
        Claim(
            text="Trajectories with a void turn have no gradient at all",
            paper="their loss is masked",
            how="greatest change of any parameter's gradient when other tokens stand in their turns, recorded batch, float64",
            must="exactly zero with the filter, and not without",
            judge=_zero,
        ),
        Claim(
            text="The same with a pretrained model and Python",
            paper="Qwen2.5-7B, fenced Python",
            how="SmolLM2-135M-Instruct, recipe arithmetic, 10 steps in 4 updates, both arms (--long): void turns, gradient norm, pass@1",
            must="void turns not more than at the start, gradient norm not above, pass@1 not below that without the filter",
            judge=_smollm2,
        ),
    ),
    arms=_arms,
    long_arms=_long_arms,
    measure=tool_sums.measure,
    studies={"gradients": _gradients},
    scales={
        "laptop": "sums in several turns with a calculator, a model from scratch, 40 steps of 16 prompts x 8 samples in 4 updates, 2 arms",
        "gpu": "SmolLM2-135M-Instruct with fenced Python, G = 8, 64 prompts, 3 turns, 40 to 60 steps; one GPU",
        "full": "Qwen2.5-7B, 512 prompts x 16 samples, 5 turns, AIME24 avg@32 at 10 turns; 8 nodes of GPUs",
    },
)
