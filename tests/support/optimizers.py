"""An optimizer of somebody else's."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


class Momentum:
    """SGD with momentum, whose settings are others than AdamW's."""

    def __init__(self, lr: float, momentum: float):
        self.lr, self.momentum = lr, momentum

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        return optimizer, LambdaLR(optimizer, _fraction)

    def lr_at(self, step: int) -> float:
        return self.lr * _fraction(step)


def _fraction(step: int) -> float:
    return 0.99**step
