"""How the processes of one run part."""

import atexit
import os
import sys
from typing import NoReturn

import torch.distributed as dist


def part(code: int = 0) -> NoReturn:
    """End this process, which belongs to an initialized process group, with ``code``.

    A good end waits for the others, since a process that leaves gloo early takes them down. A bad one does not: they
    may wait in a collective operation. What was registered with ``atexit`` runs, a logger's last upload for instance;
    the rest of Python's own end is left out, for on a busy machine it now and then meets a thread of the group, and
    aborts a run that had finished.
    """
    if not code:
        dist.barrier()
        dist.destroy_process_group()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
