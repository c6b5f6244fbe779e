"""Runnable examples of grace_plugin; run them from a clone of the repository."""
