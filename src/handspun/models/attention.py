"""Which of PyTorch's attention kernels are taken."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def without_cudnn() -> AbstractContextManager[None]:
    """Attention by any kernel but cuDNN's, PyTorch's choice for bfloat16 behind a mask on a GPU: that is planned
    anew for every shape, 25 ms forward and 25 backward on an H100."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
