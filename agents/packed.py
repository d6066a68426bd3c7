"""Linear layers with their weights as oneDNN wants them: for decoding on the CPU.

A product with few rows spends much of its time on bringing the weights into the library's own
order, anew at each call. Done once per update, it is 1.1 to 3 times as fast, most with few rows.
"""

import torch as th
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agents.states import example, run


class PackedLinear(nn.Module):
    """A linear map (..., K) to (..., N) without gradients, with the weights as they were."""

    def __init__(self, weight: th.Tensor, bias: th.Tensor | None) -> None:
        """Pack a weight (N, K); the bias is (N,)."""
        super().__init__()
        self.weight = th.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias if bias is None else bias.detach()

    @classmethod
    def of(cls, layer: nn.Module) -> "PackedLinear":
        """Pack what an `nn.Linear`, or GPT-2's `Conv1D`, has learned so far."""
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        return cls(weight, layer.bias)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Map (..., K) to (..., N)."""
        return th.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def called_linears(lm: PreTrainedModel) -> set[str]:
    """Return the names of a model's linear layers that may be packed, found by running it.

    A layer that is not called has its weight used by another (Mamba's time step); the output layer
    has a product of its own; DoRA looks at the weights it adapts.
    """
    called: set[nn.Module] = set()
    linears = {n: m for n, m in lm.named_modules() if type(m) in (nn.Linear, Conv1D)}
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in linears.values()]
    with th.no_grad():
        run(lm, **example(lm, n_tokens=4), use_cache=False)
    for hook in hooks:
        hook.remove()
    for module in lm.modules():
        if len(getattr(module, "lora_magnitude_vector", ())):
            called -= set(module.children())
    return {name for name, layer in linears.items() if layer in called}


def pack_linears(lm: PreTrainedModel, names: set[str]) -> None:
    """Put packed layers in the place of these linear ones."""
    for name in names:
        lm.set_submodule(name, PackedLinear.of(lm.get_submodule(name)))


def can_pack(device: th.device, dtype: th.dtype) -> bool:
    """Say whether packing is possible here, and worth it."""
    ops = th.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if device.type != "cpu" or not th.backends.mkldnn.is_available():
        return False
    if not all(hasattr(ops, name) for name in names):
        return False
    return dtype == th.float32 or (dtype == th.bfloat16 and ops._is_mkldnn_bf16_supported())
