"""Detection of this machine's devices without JAX."""

import glob

__all__ = ["has_tpu"]


def has_tpu() -> bool:
    """Returns whether this machine has TPU chips. Does not use JAX, which would claim them."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
