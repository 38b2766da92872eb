"""Whether cuDNN takes a sum, a bias and a ReLU into its convolution: decided once, for a device."""

from __future__ import annotations

import torch

# fp32 stays out: with full precision cuDNN may have no such kernel, and the setting can change
# after the choice.
DTYPES = (torch.float16, torch.bfloat16)
# Its fused kernels are made for tensor cores that take bf16.
CAPABILITY = (8, 0)


def cudnn_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why `torch.cudnn_convolution_add_relu` is not used on a CUDA device; None where it is.

    It is where the type is fp16 or bf16, the compute capability 8.0 or more, deterministic
    algorithms are not asked for (PyTorch's operator does not heed that), and cuDNN has plans for a
    convolution of 64 channels with a stride of 1 and of 2, which is tried.
    """
    if dtype not in DTYPES:
        return f"it is for fp16 and bf16, not {dtype}"
    cudnn = torch.backends.cudnn
    if not cudnn.is_available() or not cudnn.enabled:
        return "this PyTorch has no cuDNN, or it is switched off"
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"it is for compute capability 8.0 and more, not {capability[0]}.{capability[1]}"
    last = torch.channels_last
    for stride in (1, 2):
        x = torch.zeros(1, 64, 8, 32, device=device, dtype=dtype).contiguous(memory_format=last)
        weight = torch.zeros(64, 64, 3, 3, device=device, dtype=dtype)
        z = torch.zeros(1, 64, 8 // stride, 32 // stride, device=device, dtype=dtype)
        z, weight = z.contiguous(memory_format=last), weight.contiguous(memory_format=last)
        try:
            torch.cudnn_convolution_add_relu(
                x, weight, z, 1.0, z.new_zeros(64), [stride] * 2, [1, 1], [1, 1], 1
            )
        except RuntimeError as error:
            return f"cuDNN has no plan for it: {error}"
    return None
