"""FSDP2 on one rank with NCCL: the step of one process."""

import os
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from cases import backends
from helpers import assert_params_close
from torch import Tensor, nn
from torch.optim import AdamW

from blur_optim import BLUR


@pytest.fixture
def one_rank(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def network(device: torch.device) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 7)).to(device)
    return model, torch.randn(2, 16, 33).to(device)


@backends
@pytest.mark.parametrize("stash", ["reference", "int8", "cpu"])
def test_a_sharded_step_is_that_of_one_process(backend: str, stash: str, device: torch.device, one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (False, True):
        model, x = network(device)
        if sharded:
            mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        opt = BLUR(model.parameters(), AdamW, lr=1e-3, backend=backend, stash=stash, max_grad_norm=0.5)
        for _ in range(3):
            opt.step(lambda: -model(x[0]).square().mean(), lambda: model(x[1]).sin().mean())  # noqa: B023
        params = [p.detach() for p in model.parameters()]
        found.append([p.full_tensor() if hasattr(p, "full_tensor") else p for p in params])
    assert_params_close(found[0], found[1], rtol=1e-6, atol=1e-7)
