"""How often something waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountHostReads(TorchDispatchMode):
    """Count the operations that move a value to the host; on an accelerator each is a synchronisation."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
        self.count += name in self.READS or to_host
        return func(*args, **(kwargs or {}))
