"""Ondol: an open lab for foundation models. One fire, many rooms."""

__version__ = "0.1.0"
