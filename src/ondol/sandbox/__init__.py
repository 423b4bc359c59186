"""Where untrusted code runs. `monty`: a Python interpreter without files, network or processes, in worker processes."""
