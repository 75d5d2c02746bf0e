"""Boundary expand: forget images move to a further label, dropped afterwards (Chen et al., arXiv 2303.11570).

Shapes: B batch, D features, J labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from classification_ext.methods.base import METHODS, Method, Step


class ShadowLabel(nn.Module):
    """One more output beside a classifier's last linear layer; the classifier itself keeps its shape.

    Its weights start at the mean of the others' rows, so that no random number is drawn.

    Raises:
        ValueError: the classifier does not end in a Linear with one output per label.
    """

    def __init__(self, model: nn.Module, num_labels: int):
        super().__init__()
        heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not heads or heads[-1].out_features != num_labels:
            raise ValueError("boundary_expand needs a classifier that ends in a Linear with one output per label")
        head = heads[-1]
        self.weight = nn.Parameter(head.weight.detach().mean(0))  # (D,)
        self.bias = nn.Parameter(head.weight.detach().new_zeros(()))
        self._features: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]

    def forward(self, logits_BJ: Tensor) -> Tensor:
        """The logits the classifier has just given, with the further one behind them (B, J + 1)."""
        assert self._features is not None
        further_B = self._features.float() @ self.weight + self.bias
        return torch.cat([logits_BJ.float(), further_B[:, None]], dim=1)

    def remove(self) -> None:
        """Leave the classifier as it would be without."""
        self._hook.remove()
        self._features = None


METHODS.register(Method("boundary_expand", Step.ordinary_loss, shadow_label=True))
