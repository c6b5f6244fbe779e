"""Serving: everything that talks to vLLM, which lives in an interpreter of its own.

launch starts `vllm serve CHECKPOINT`, ask puts questions with images to it over HTTP, probe runs a checkpoint offline
for tokens and log-probabilities. Nothing here imports vLLM into this process: the two environments only share files.
"""
