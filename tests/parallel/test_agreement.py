"""When a rank learns that the ranks disagree: at once on the CPU (tested beside FSDP2), later on a device."""

from types import SimpleNamespace

import pytest
import torch

from blur_optim.parallel.ranks import Ranks


class Verdict:
    """What a pinned tensor is while the device has not got as far as the copy, and then: False."""

    def copy_(self, agree, non_blocking):
        assert non_blocking

    def __bool__(self):
        return False


class Device:
    def __init__(self):
        self.finished = False

    def current_stream(self, device):
        return SimpleNamespace(record_event=lambda: SimpleNamespace(query=lambda: self.finished))


def test_on_a_device_the_verdict_is_read_when_it_is_there(monkeypatch):
    """Simulated, for it takes a GPU: no wait in the step itself, none later, and the error in the end."""
    device, ranks = Device(), Ranks()
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: Verdict())
    monkeypatch.setattr(torch.accelerator, "current_stream", device.current_stream)
    ranks._judge(SimpleNamespace(device=torch.device("cuda")), "gradients of all of them")
    ranks.update([])
    device.finished = True
    with pytest.raises(
        RuntimeError, match=r"same step, got different ones; nothing was updated.*gradients of all of them"
    ):
        ranks.update([])
    ranks.update([])  # Once is enough.
