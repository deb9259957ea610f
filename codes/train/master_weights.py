"""AdamW on float32 copies of bfloat16 weights: mixed precision without casting the weights in every forward pass.

Autocast casts every weight, and the input of every projection, again in each micro-batch. Here the model itself is bfloat16, as
DeepSpeed keeps it; the optimizer holds the float32 masters, adds every micro-batch's gradients up in float32, and writes the
rounded weights back after each step. For one process; several go through DeepSpeed, which does the same with sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose parameters are float32 masters of a low-precision model's weights.

    Gradients leave the model as soon as they are made: ``.grad`` of the model's own parameters is None after a backward pass.

    Args:
        groups: As for ``torch.optim.AdamW``, with the model's parameters. They must be on their device already.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._master_of: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        master_groups = [group | {"params": [self._master(p) for p in group["params"]]} for group in groups]
        super().__init__(master_groups, lr=lr, fused=self._pairs[0][0].device.type in ("cpu", "cuda"))

    def _master(self, weight: torch.nn.Parameter) -> torch.nn.Parameter:
        master = torch.nn.Parameter(weight.detach().float().clone())
        self._pairs.append((weight, master))
        self._master_of[weight] = master
        weight.register_post_accumulate_grad_hook(self._collect)
        return master

    def _collect(self, weight: torch.Tensor) -> None:
        """Move a fresh gradient to the master, in float32."""
        master = self._master_of[weight]  # type: ignore[index]
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One AdamW step on the masters, then the rounded weights."""
        result = super().step(closure)
        torch._foreach_copy_([weight for weight, _ in self._pairs], [master for _, master in self._pairs])
        return result

    def state_dict(self) -> dict[str, Any]:
        """With the masters: the rounded weights alone could not continue a run."""
        return super().state_dict() | {"masters": [master.detach() for _, master in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the optimizer's state and the masters; the model's weights follow from them."""
        rest = {key: value for key, value in state_dict.items() if key != "masters"}
        super().load_state_dict(rest)
        for (weight, master), stored in zip(self._pairs, state_dict["masters"], strict=True):
            master.copy_(stored)
            weight.copy_(master)
