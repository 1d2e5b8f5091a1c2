"""Critic training on a language-model trunk: everything that runs inside the container."""

__version__ = "0.1.0"
