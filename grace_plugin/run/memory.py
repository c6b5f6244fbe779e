"""What saves memory in a run: optimizers with 8-bit states, and activations kept in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer

__all__ = ["check_optimizer", "keep_full_precision_states", "offloaded"]


def check_optimizer(arguments: Any) -> None:
    """Refuse an `optim` whose library is not installed, before a model is loaded.

    Raises:
        ValueError: names the optimizer and the library.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise ValueError(f"optim={getattr(arguments.optim, 'value', arguments.optim)}: {error}") from error
    except ValueError:
        # an optimizer that wants the model, which is not loaded yet
        return


def keep_full_precision_states(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Have an optimizer with 8-bit states keep float32 states for these parameters; any other optimizer does so anyway.

    Learned scales take large steps and are few. Both libraries keep float32 only for fewer than 4096 values.
    """
    library = type(optimizer).__module__.partition(".")[0]
    if library == "torchao":  # it makes a state where none is
        for parameter in parameters:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
    elif library == "bitsandbytes":
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().override_config(list(parameters), "optim_bits", 32)


def offloaded(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model's forward pass, with what it saves for backward in host memory (pinned next to a GPU).

    With gradient checkpointing that is the input of each layer. Without it, it would be the quantized weights too, so `train`
    refuses it.
    """

    def forward(**inputs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return model(**inputs)

    return forward
