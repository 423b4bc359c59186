"""The far side of the sandbox: a program of its own, run by file and never imported by Ondol (but for `walls`' version)."""
