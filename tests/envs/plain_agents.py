"""Agents that know nothing of Ondol: they speak to an OpenAI endpoint. Also a program: python tests/envs/plain_agents.py < QUESTION"""

from __future__ import annotations

import sys
import threading

_local = threading.local()


def client(base_url: str | None = None, api_key: str | None = None):
    """A client a thread, as making one takes a while."""
    import openai

    if getattr(_local, "made", None) is None:
        _local.made = openai.OpenAI(base_url=base_url or None, api_key=api_key or None, max_retries=0, timeout=60)
        return _local.made
    return _local.made.with_options(base_url=base_url, api_key=api_key)


def once(question: str, base_url: str | None = None, api_key: str | None = None) -> str:
    """One question, one answer."""
    c = client(base_url, api_key)
    return (
        c.chat.completions.create(model="any", messages=[{"role": "user", "content": question}])
        .choices[0]
        .message.content
    )


def loop(question: str, base_url: str | None = None, api_key: str | None = None) -> str:
    """Adds up with a tool of its own until the model answers without a call; then asks anew what it heard."""
    c = client(base_url, api_key)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    while True:
        said = c.chat.completions.create(model="any", messages=messages, stop=["</add>"]).choices[0].message.content
        messages.append({"role": "assistant", "content": said})
        if "<add>" not in said:
            break
        messages.append({"role": "user", "content": str(sum(map(int, said.split("<add>")[1].split("+"))))})
    other = [{"role": "user", "content": f"Repeat: {said}"}]
    return c.chat.completions.create(model="any", messages=other).choices[0].message.content


def silent(question: str, base_url: str, api_key: str) -> str:
    return "42"


def broken(question: str, base_url: str, api_key: str) -> str:
    once(question, base_url, api_key)
    raise ValueError("lost my way")


def endless(question: str, base_url: str, api_key: str) -> str:
    while True:
        once(question, base_url, api_key)


if __name__ == "__main__":
    print(loop(sys.stdin.read()))
