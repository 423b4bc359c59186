"""Verifiers: how right a response is, in [0, 1]."""
