"""Which implementation an operation runs: Triton on CUDA, plain torch anywhere else."""

import os

from torch import Tensor

VARIABLE = "KVTOOL_KERNELS"
"""Environment variable that forces one: `reference`, or `triton` where there is such a kernel."""


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor runs its Triton kernel.

    On the CPU a kernel runs only where it is forced, and then needs `TRITON_INTERPRET=1`.

    Raises:
        ValueError: :data:`VARIABLE` names no implementation, or one that cannot run here.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"{VARIABLE} is {forced!r}; it can be reference or triton")
    if forced == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{VARIABLE}=triton needs TRITON_INTERPRET=1 on a {tensor.device.type}")
    return tensor.is_cuda if not forced else forced == "triton"
