"""An agent that knows nothing of Ondol: it asks a model behind OpenAI's API and returns what it says."""

from __future__ import annotations

import threading
from typing import Any

import openai

_made = threading.local()


def client(base_url: str, api_key: str) -> Any:
    """One client a thread: making one takes a while, another base URL does not."""
    if getattr(_made, "client", None) is None:
        _made.client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=120)
    return _made.client.with_options(base_url=base_url, api_key=api_key)


def solve(question: str, base_url: str, api_key: str) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    said = client(base_url, api_key).chat.completions.create(model="any", messages=messages)
    return said.choices[0].message.content or ""
