"""Which implementation an operation runs: Triton on CUDA; on a processor C where there is a kernel
and a compiler (`native.py`), and else plain torch.
"""

import os

from torch import Tensor

VARIABLE = "KVTOOL_KERNELS"
"""Environment variable that forces one: `reference`, or `native` or `triton` where there is such a
kernel.
"""


def forced() -> str:
    """Which one it forces, or nothing.

    Raises:
        ValueError: It names no implementation.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "reference", "native", "triton"):
        raise ValueError(f"{VARIABLE} is {choice!r}; it can be reference, native or triton")
    return choice


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor runs its Triton kernel.

    On the CPU a kernel runs only where it is forced, and then needs `TRITON_INTERPRET=1`.

    Raises:
        ValueError: :data:`VARIABLE` names no implementation, or one that cannot run here.
    """
    choice = forced()
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{VARIABLE}=triton needs TRITON_INTERPRET=1 on a {tensor.device.type}")
    return choice == "triton" if choice in ("reference", "triton") else tensor.is_cuda
