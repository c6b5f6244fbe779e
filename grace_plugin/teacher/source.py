"""A teacher's checkpoint as it lies on disk: its config, what it is known by, and its head, read without the rest.

A snapshot of the hub is known by its commit. A folder is known by the SHA-256 of its config, its index and each weights file
that is there. A weights file that is missing is no fault here: only the one that holds the head is needed to train from a
cache.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grace_plugin.teacher.digest import file_digests
from grace_plugin.vlm.checkpoint_files import checkpoint_file
from grace_plugin.vlm.loading import check_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is not loaded; `config` and `name_or_path` are named as on a model."""

    name_or_path: str
    revision: str
    config: Any

    @property
    def layer(self) -> int:
        """Number of the decoder layer whose output the relational term reads, from 0."""
        return self.config.get_text_config().num_hidden_layers - 2

    @property
    def rows(self) -> int:
        """V_t."""
        return self.config.get_text_config().vocab_size

    @property
    def width(self) -> int:
        """d_t."""
        return self.config.get_text_config().hidden_size

    def dtype(self, asked: str) -> torch.dtype:
        """What "auto" or a name means for this checkpoint, as `from_pretrained` takes it."""
        if asked != "auto":
            return getattr(torch, asked)
        return self.config.dtype or self.head("auto")[0].dtype

    def state_bytes(self, asked: str) -> int:
        """Bytes of a token's hidden state."""
        return self.width * self.dtype(asked).itemsize

    def fingerprint(self) -> dict[str, str]:
        """The commit of a hub snapshot, or digests of the folder's files by name."""
        from transformers.utils.hub import extract_commit_hash

        config = checkpoint_file(self.name_or_path, "config.json", self.revision)
        assert config is not None
        commit = extract_commit_hash(str(config), None)
        if commit is not None:
            return {"commit": commit}
        names = ["config.json", _INDEX, *sorted(set(self._tensors().values()))]
        files = {name: checkpoint_file(self.name_or_path, name, self.revision) for name in names}
        return file_digests({name: file for name, file in files.items() if file is not None})

    def head(self, asked: str) -> tuple[Tensor, Tensor | None]:
        """Weight [V_t, d_t] and bias of the output head; no other tensor of the checkpoint is read.

        Raises:
            ValueError: no tensor of that name, more than one, a quantized one, or its file is missing.
        """
        tensors = self._tensors()
        packed = [n for n in tensors if re.search(r"lm_head\.weight_\w+$", n)]
        if packed:
            raise ValueError(
                f"the head of the teacher {self.name_or_path!r} is quantized ({packed[0]}), so it cannot be read alone; use "
                "teacher.kind: resident or offload, or take a teacher with an unquantized head"
            )
        name = self._one([n for n in tensors if n.endswith("lm_head.weight")])
        name = name or self._one([n for n in tensors if n.endswith("embed_tokens.weight")])
        if name is None:
            raise ValueError(f"the teacher {self.name_or_path!r} has neither lm_head.weight nor embed_tokens.weight")
        bias = name.removesuffix("weight") + "bias"
        weight = self._read(name, tensors[name], asked)
        return weight, self._read(bias, tensors[bias], asked) if bias in tensors else None

    def _one(self, names: list[str]) -> str | None:
        if len(names) > 1:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has {len(names)} tensors that could be its head: {names}"
            )
        return names[0] if names else None

    def _tensors(self) -> dict[str, str]:
        """File of each tensor by the tensor's name."""
        index = checkpoint_file(self.name_or_path, _INDEX, self.revision)
        if index is not None:
            return json.loads(index.read_text())["weight_map"]
        with self._opened(_WEIGHTS) as file:
            return dict.fromkeys(file.keys(), _WEIGHTS)

    def _opened(self, name: str) -> Any:
        file = checkpoint_file(self.name_or_path, name, self.revision)
        if file is None:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has no {name}; its head is read from safetensors files"
            )
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"cannot read {file} of the teacher: {error}; fetch or save it again") from error

    def _read(self, tensor: str, name: str, asked: str) -> Tensor:
        with self._opened(name) as file:
            found = file.get_tensor(tensor)
        return found if asked == "auto" and self.config.dtype is None else found.to(self.dtype(asked))


def open_checkpoint(source: str, revision: str = "main", *, role: str = "teacher") -> Checkpoint:
    """Read a checkpoint's config alone; how it is quantized and whether an adapter lies next to it is checked.

    Raises:
        ValueError: nothing readable at `source`, or a checkpoint that cannot be a student or a cached teacher.
    """
    return Checkpoint(source, revision, check_checkpoint(source, role, revision=revision, kind="cached"))
