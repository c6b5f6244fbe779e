"""Read a checkpoint's config, fingerprint and output head without loading the model.

The fingerprint of a hub snapshot is its commit; that of a folder is the SHA-256 of its config, its index and each weights file
that exists. Weights files may be missing: to train from a cache only the one that holds the head is needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_plugin.digest import file_digests
from grace_plugin.vlm import family_of
from grace_plugin.vlm.checkpoint_files import INDEX, WEIGHTS, checkpoint_file, open_safetensors
from grace_plugin.vlm.loading import check_checkpoint

__all__ = ["UnloadedCheckpoint", "open_checkpoint"]


@dataclass(frozen=True)
class UnloadedCheckpoint:
    """A checkpoint that is not loaded, with the attributes `config` and `name_or_path` of a model."""

    name_or_path: str
    revision: str
    config: Any

    @property
    def layer(self) -> int:
        """Return the index, from 0, of the decoder layer whose output the relational term reads."""
        return self.config.get_text_config().num_hidden_layers - 2

    @property
    def rows(self) -> int:
        """Return the rows of the output head, V_t."""
        return self.config.get_text_config().vocab_size

    @property
    def width(self) -> int:
        """Return the decoder's hidden size, d_t."""
        return self.config.get_text_config().hidden_size

    def dtype(self, asked: str) -> torch.dtype:
        """Return the dtype that "auto" or a name means for this checkpoint, as in `from_pretrained`."""
        if asked != "auto":
            return getattr(torch, asked)
        # Configs of some checkpoints state no dtype; from_pretrained then takes that of the weights.
        return self.config.dtype or self.head("auto")[0].dtype

    def state_bytes(self, asked: str) -> int:
        """Return the bytes of one token's hidden state."""
        return self.width * self.dtype(asked).itemsize

    def fingerprint(self) -> dict[str, str]:
        """Return the commit of a hub snapshot, or the digests of a folder's files by name."""
        from transformers.utils.hub import extract_commit_hash

        config = checkpoint_file(self.name_or_path, "config.json", self.revision)
        assert config is not None
        # The path of a hub snapshot contains its commit, so its files need not be read.
        commit = extract_commit_hash(str(config), None)
        if commit is not None:
            return {"commit": commit}
        names = ["config.json", INDEX, *sorted(set(self._tensors().values()))]
        files = {name: checkpoint_file(self.name_or_path, name, self.revision) for name in names}
        return file_digests({name: file for name, file in files.items() if file is not None})

    def head(self, asked: str) -> tuple[Tensor, Tensor | None]:
        """Read weight [V_t, d_t] and bias of the output head, and no other tensor.

        Raises:
            ValueError: no such tensor, more than one, a quantized one, or its file is missing.
        """
        tensors, ends = self._tensors(), family_of(self.config).head_tensors
        # A quantized head is stored as weight_packed, weight_scale and so on instead of weight.
        packed = [n for n in tensors if re.search(rf"{re.escape(ends[0])}_\w+$", n)]
        if packed:
            raise ValueError(
                f"the head of the teacher {self.name_or_path!r} is quantized ({packed[0]}), so it cannot be read alone; use "
                "teacher.kind: resident or offload, or take a teacher with an unquantized head"
            )
        name = next((name for end in ends if (name := self._only([n for n in tensors if n.endswith(end)]))), None)
        if name is None:
            raise ValueError(f"the teacher {self.name_or_path!r} has neither {' nor '.join(ends)}")
        bias = name.removesuffix("weight") + "bias"
        weight = self._read(name, tensors[name], asked)
        return weight, self._read(bias, tensors[bias], asked) if bias in tensors else None

    def _only(self, names: list[str]) -> str | None:
        if len(names) > 1:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has {len(names)} tensors that could be its head: {names}"
            )
        return names[0] if names else None

    def _tensors(self) -> dict[str, str]:
        """Return the file of each tensor by the tensor's name."""
        index = checkpoint_file(self.name_or_path, INDEX, self.revision)
        if index is not None:
            return json.loads(index.read_text())["weight_map"]
        with self._opened(WEIGHTS) as file:
            return dict.fromkeys(file.keys(), WEIGHTS)

    def _opened(self, name: str) -> Any:
        file = checkpoint_file(self.name_or_path, name, self.revision)
        if file is None:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has no {name}; its head is read from safetensors files"
            )
        return open_safetensors(file, "teacher")

    def _read(self, tensor: str, name: str, asked: str) -> Tensor:
        with self._opened(name) as file:
            found = file.get_tensor(tensor)
        return found if asked == "auto" and self.config.dtype is None else found.to(self.dtype(asked))


def open_checkpoint(source: str, revision: str = "main", *, role: str = "teacher") -> UnloadedCheckpoint:
    """Read a checkpoint's config, and check its quantization and that it has no adapter.

    Raises:
        ValueError: nothing readable at `source`, or a checkpoint that cannot be a student or a cached teacher.
    """
    return UnloadedCheckpoint(source, revision, check_checkpoint(source, role, revision=revision, kind="cached"))
