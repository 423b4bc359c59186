"""Ondol: an open lab for foundation models. One fire, many rooms.

import ondol
run = ondol.run("arithmetic", "train.steps=5")
for rung in ondol.ladder(run):
    print(rung)
print(run.path / "model")
"""

from typing import Any

__version__ = "0.1.0"
_API = ("capabilities", "comparison", "ladder", "load_recipe", "open_run", "reproduce", "run")


def __getattr__(name: str) -> Any:
    """The API is imported when it is first used: `import ondol` stays instant."""
    if name in _API:
        from ondol import api

        return getattr(api, name)
    raise AttributeError(f"module 'ondol' has no attribute '{name}'")
