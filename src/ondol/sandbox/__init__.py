"""Where untrusted code runs.

monty    tier 1: a Python interpreter without files, network or processes, in worker processes
boxes    tier 2: full CPython, a shell and files, in a sandbox for each trajectory; `inside/` is its far side
levels   which walls this machine can put up: bubblewrap, namespaces, or limits only
judge    programs in, verdicts out: a queue and workers on tier 2 (`judge_http`: over HTTP; `judge_trial`: tried)
escapes  attempts to get out, against each level
"""
