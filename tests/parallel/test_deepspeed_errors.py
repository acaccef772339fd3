"""DeepSpeedBLUR used wrongly, and engines that it refuses, on two processes."""

import copy
import importlib.util
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from engine_problem import (
    FLOAT32,
    STAGES,
    backward,
    config,
    largest_errors,
    make_engine,
    make_opt,
    masters,
    on_one_process,
    tokens,
    train,
)

LAUNCH = "deepspeed"  # Of both files at once: to import it takes longer than most tests.
pytestmark = [
    pytest.mark.ranks(2),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def step_in(phase, engine):
    with phase():
        backward(engine, 0, "forget")
        engine.step()


@pytest.mark.parametrize("stage", STAGES)
def test_steps_and_backward_passes_out_of_order(stage):
    engine = make_engine(config(stage))
    opt = make_opt(engine)
    before = masters(engine)
    with pytest.raises(RuntimeError, match=r"engine\.step\(\) cannot run between opt\.forget\(\) and opt\.step\(\)"):
        step_in(opt.forget, engine)
    with opt.forget():
        backward(engine, 0, "forget")
    with pytest.raises(RuntimeError, match=r"engine\.step\(\) cannot run between"):
        engine.step()
    backward(engine, 0, "retain")
    with pytest.raises(RuntimeError, match="Gradients were computed outside both phases"), opt.retain():
        pass
    backward(engine, 0, "forget")
    with pytest.raises(RuntimeError, match=r"already holds gradients, which are part of neither loss"), opt.forget():
        pass
    with pytest.raises(RuntimeError, match=r"opt\.step\(\) must follow the two phases, got neither"):
        opt.step()
    for phase in (opt.forget, opt.retain):
        with phase():
            backward(engine, 0, "retain")
    with pytest.raises(RuntimeError, match="belong between two steps"), opt.forget():
        pass
    assert all(torch.equal(p, before[name]) for name, p in masters(engine).items())
    assert max(largest_errors(train(opt, engine), engine, on_one_process())) < FLOAT32


def test_steps_of_the_engine_alone_beside_those_of_both():
    engine = make_engine(config(2, micro_batches=2))
    opt = make_opt(engine)
    train(opt, engine, [0])
    for micro in range(4):  # Two steps by the engine's own count, one ends in the middle of its accumulation.
        backward(engine, 1, "retain", micro % 2)
        engine.step()
    assert engine.global_steps in (2, 3)
    engine.optimizer.zero_grad()
    opt.zero_grad()
    train(opt, engine, [2])


def test_backward_of_accelerate():
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    engine = make_engine(config(3))
    opt = make_opt(engine)
    wrapped = DeepSpeedEngineWrapper(engine)
    with pytest.raises(RuntimeError, match=r"accelerator\.backward may step"), opt.forget():
        wrapped.backward(engine(tokens(0, "forget", 0, 0), "forget"))
    assert engine.global_steps == 0


@pytest.mark.parametrize(("stage", "offload"), [(2, True), (3, True)])
def test_an_update_of_which_the_engine_does_not_know_is_noticed(stage, offload):
    engine = make_engine(config(stage, offload=offload, clip=0.05))
    opt = make_opt(engine)
    # The norms, by which the engine clips, are then those of the retain gradients.
    opt._gradients.written = lambda: None
    with pytest.raises(RuntimeError, match=r"must step on the update, of norm .*, got one of"):
        train(opt, engine)


def test_a_step_that_is_none_is_noticed():
    engine = make_engine(config(2))
    opt = make_opt(engine)
    opt._gradients.step = engine.step  # At no boundary, for the engine.
    with pytest.raises(RuntimeError, match=r"must take one step, got 0"):
        train(opt, engine)


def test_ranks_that_differ():
    engine = make_engine(config(2))
    opt = make_opt(engine)
    opt.param_groups[0]["gamma"] = 1.0 + dist.get_rank()
    with pytest.raises(RuntimeError, match=r"All ranks must take the same step"):
        train(opt, engine)


def test_arguments():
    engine = make_engine(config(2, clip=1.0))
    with pytest.raises(ValueError, match=r"`stash` must not be 'recompute'"):
        make_opt(engine, stash="recompute")
    with pytest.raises(ValueError, match=r"`metric` must be 'euclidean' with an engine"):
        make_opt(engine, metric="retain")
    with pytest.raises(ValueError, match=r"`max_grad_norm` must be None where the engine clips"):
        make_opt(engine, max_grad_norm=1.0)
    with (
        patch.object(importlib.import_module("deepspeed"), "__version__", "0.19.6"),
        pytest.raises(ImportError, match=r"`deepspeed` must be at least 0\.19\.8, got 0\.19\.6"),
    ):
        make_opt(engine)
    with pytest.raises(TypeError, match=r"`engine` must be a DeepSpeedEngine, got Linear"):
        make_opt(torch.nn.Linear(1, 1))
    opt = make_opt(engine)
    with pytest.raises(ValueError, match=r"`stash` must not be 'recompute'"):
        opt.configure(stash="recompute")
    opt.configure(stash="int8", rule="conflict")
    assert (opt.stash, opt.rule) == ("int8", "conflict")
    with pytest.raises(TypeError, match=r"must be called without closures"):
        opt.step(lambda: None, lambda: None)
    with pytest.raises(TypeError, match=r"`grad_scale` must be None"), opt.retain(grad_scale=2.0):
        pass
    for refused in (opt.state_dict, lambda: opt.load_state_dict({}), lambda: opt.add_param_group({})):
        with pytest.raises(RuntimeError, match="engine"):
            refused()


def test_what_is_refused():
    from blur_optim.integrations.deepspeed.setup import REFUSED

    engine = make_engine(config(2, offload=True))
    settings = {
        "a mixture of experts": {"has_moe_layers": True},
        "model or tensor parallelism": {"mpu": object()},
        "sequence parallelism": {"seq_dp_world_size": 4},
        "zero_hpz_partition_size": {"zero_hpz_partition_size": lambda: 2},
        "ZenFlow": {"zenflow_config": lambda: object()},
        "quantized gradients": {"zero_quantized_gradients": lambda: True},
        "Muon inside ZeRO": {"basic_optimizer": type("Muon", (torch.optim.SGD,), {})([torch.zeros(1)])},
        "a 1-bit optimizer": {"basic_optimizer": type("OnebitAdam", (torch.optim.SGD,), {})([torch.zeros(1)])},
        "sparse gradients": {"sparse_gradients_enabled": lambda: True},
        "the optimizer on NVMe": {"zero_offload_optimizer": lambda: SimpleNamespace(device="nvme")},
        "offload_optimizer.ratio": {"zero_offload_optimizer": lambda: SimpleNamespace(ratio=0.5)},
        "SuperOffload": {"zero_offload_optimizer": lambda: SimpleNamespace(super_offload=True)},
        "DeepCompile": {"is_deepcompile_enabled": lambda: True},
        "apex AMP or torch_autocast": {"torch_autocast_enabled": lambda: True},
        "managed_gradient_accumulation: false": {"managed_gradient_accumulation": lambda: False},
        "fp16 without ZeRO": {"fp16_enabled": lambda: True, "zero_optimization": lambda: False},
        "MiCS": {"optimizer": type("MiCS_Optimizer", (), {})()},
        "no optimizer": {"basic_optimizer": None},
        "pipeline stages": {"__class__": type("PipelineEngine", (type(engine),), {})},
        "the hybrid engine": {"__class__": type("DeepSpeedHybridEngine", (type(engine),), {})},
    }
    assert settings.keys() == REFUSED.keys()
    make_opt(engine)
    for what, attributes in settings.items():
        changed = copy.copy(engine)  # Whose class can be another one.
        for name, value in attributes.items():
            object.__setattr__(changed, name, value)
        with pytest.raises(ValueError, match=rf"`engine` must not have {re.escape(what)}: "):
            make_opt(changed)


def test_blur_itself_beside_an_engine():
    """ZeRO-0 leaves gradients in p.grad, averaged where the engine takes a micro-batch for the last of its count."""
    from blur_optim import BLUR

    for micro_batches in (1, 2):
        engine = make_engine(config(0, micro_batches=micro_batches))
        opt = BLUR(base=engine.optimizer)
        if micro_batches == 1:
            errors = largest_errors(train(opt, engine), engine, on_one_process())
            assert max(errors) < FLOAT32
            continue
        with pytest.raises(RuntimeError, match=r"forget phase must end with its gradients reduced.*DeepSpeedBLUR"):
            train(opt, engine)
    for stage in (1, 2, 3):
        engine = make_engine(config(stage))
        opt = BLUR(engine.module.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match=r"got parameters that DeepSpeed manages"), opt.forget():
            pass
        for base in (engine.optimizer, engine):
            with pytest.raises(TypeError, match=r"`base` must step on p\.grad, got DeepSpeed.*DeepSpeedBLUR"):
                BLUR(base=base)
