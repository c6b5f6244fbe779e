"""Everything that talks to vLLM.

vLLM needs another compressed-tensors than training does, so it lives in an interpreter of its own and is never imported here.
"""
