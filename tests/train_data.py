"""Trajectories as rollouts leave them, made up, for tests of the learner."""

from __future__ import annotations

import random

from ondol.records import Problem, Trajectory

TEMPERATURE = 0.8


def trajectories(seed: int = 0, prompts: int = 3, samples: int = 4) -> list[Trajectory]:
    """Groups with a prompt each; sampled turns, observations between, some sampled tokens that are not trained."""
    rng = random.Random(seed)
    out = []
    begun = [
        rng.randrange(4, 99) for _ in range(rng.randint(0, 6))
    ]  # all prompts begin alike, as with a system message
    for p in range(prompts):
        prompt = begun + [rng.randrange(4, 99) for _ in range(rng.randint(3, 20))]
        for s in range(samples):
            ids, sampled, trained = list(prompt), [False] * len(prompt), [False] * len(prompt)
            for turn in range(rng.randint(1, 3)):
                for kind in (True, False) if turn < 2 else (True,):
                    n = rng.randint(1, 8)
                    ids += [rng.randrange(4, 99) for _ in range(n)]
                    sampled += [kind] * n
                    trained += [kind and rng.random() < 0.85 for _ in range(n)]
            t = Trajectory(
                (0, p, s),
                Problem(str(p), "q", "a"),
                ids,
                len(prompt),
                sampled,
                trained,
                [-4 * rng.random() if k else 0.0 for k in sampled],
                [0 if k else -1 for k in sampled],
                temperature=TEMPERATURE,
            )
            t.reward = t.score = float(rng.random() < 0.5)
            out.append(t)
    return out
