"""DeepSpeedBLUR on real engines, two processes: against the same steps by BLUR in one float64 process."""

import importlib.util
import inspect
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from engine_problem import (
    FLOAT32,
    MICRO,
    STAGES,
    backward,
    config,
    largest_errors,
    make_engine,
    make_network,
    make_opt,
    masters,
    on_one_process,
    shared_folder,
    tokens,
    train,
    without_weights,
)

LAUNCH = "deepspeed"  # Of both files at once: to import it takes longer than most tests.
pytestmark = [
    pytest.mark.ranks(2),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
#: ZeRO's stages, and those of them that can have their optimizer in host memory.
KINDS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
#: float16 with a loss scale of 1024: its rounding to 2^-11.
FLOAT16 = 1e-3
#: bfloat16: sums over ranks and micro-batches are rounded to 2^-9, and so is the update: of the gradients, and of
#: parameters, which two steps of AdamW have moved by 2e-2.
BFLOAT16, BFLOAT16_PARAMS = 2e-3, 5e-4


def assert_trained(settings, expected, tolerances=(FLOAT32, FLOAT32), make=make_engine, **options):
    engine = make(settings)
    opt = make_opt(engine, **options)
    errors = largest_errors(train(opt, engine), engine, expected)
    assert_named(opt._gradients)
    print("dots {:.1e}, parameters {:.1e}".format(*errors))
    assert all(error <= tolerance for error, tolerance in zip(errors, tolerances, strict=True)), errors


@pytest.mark.parametrize(("stage", "offload"), KINDS)
def test_float32(stage, offload):
    assert_trained(config(stage, offload=offload, clip=0.05), on_one_process(clip=0.05))


@pytest.mark.parametrize(("stage", "offload"), KINDS)
def test_bfloat16(stage, offload):
    expected = on_one_process(low=torch.bfloat16, warm=stage == 0)
    assert_trained(config(stage, "bf16", offload=offload), expected, (BFLOAT16, BFLOAT16_PARAMS))


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_bfloat16_that_adds_up_in_float32(stage, offload):
    expected = on_one_process(low=torch.bfloat16)
    settings = config(stage, "bf16", accumulate="fp32", offload=offload)
    assert_trained(settings, expected, (BFLOAT16, BFLOAT16_PARAMS))


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (2, True), (3, False)])
def test_float16_and_its_loss_scale(stage, offload):
    from deepspeed.accelerator import get_accelerator

    settings = config(stage, "fp16", offload=offload, clip=0.05)
    settings["fp16"] |= {"loss_scale": 0, "initial_scale_power": 10, "hysteresis": 1}
    cpu = type(get_accelerator())
    with (  # DeepSpeed has no float16 on a CPU. torch has.
        patch.object(cpu, "is_fp16_supported", lambda self: True),
        patch.object(cpu, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16]),
    ):
        engine = make_engine(settings)
    opt = make_opt(engine)
    train(opt, engine, [5], times=float("nan") if dist.get_rank() == 1 else 1.0)
    assert (engine.optimizer.loss_scale, engine.skipped_steps) == (512, 1)
    assert int(opt.statistics.skipped) == 1
    errors = largest_errors(train(opt, engine), engine, on_one_process(low=torch.float16, clip=0.05))
    print("dots {:.1e}, parameters {:.1e}".format(*errors))
    assert max(errors) < FLOAT16


#: One after another on one engine, each for a step.
OPTIONS = {
    "weights": {"gamma": 0.3, "retain_weight": 2.0},
    "conflict": {"rule": "conflict"},
    "normalized": {"rule": "normalized"},
    "normalize": {"normalize": True},
    "by group": {"scope": "group"},
    "by parameter": {"scope": "parameter"},
    "clipped": {"max_grad_norm": 0.05},
    "stash in bfloat16": {"stash": "bfloat16"},
    "stash on the host": {"stash": "cpu"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_options(stage):
    engine = make_engine(config(stage))
    seen = []
    for step, options in enumerate(OPTIONS.values()):
        without_weights(engine.basic_optimizer)
        seen += train(make_opt(engine, **options), engine, [step])
    expected = on_one_process(range(len(OPTIONS)), sequence=list(OPTIONS.values()))
    errors = largest_errors(seen, engine, expected)
    print("dots {:.1e}, parameters {:.1e}".format(*errors))
    assert max(errors) < 2 * FLOAT32  # Of more steps.


@pytest.mark.parametrize("stage", [0, 3])
def test_int8_stash(stage):
    engine = make_engine(config(stage))
    seen = train(make_opt(engine, stash="int8"), engine, [0])
    # Its blocks begin anew with each piece. What AdamW makes of an element that is rounded to 0 says nothing.
    dots, _ = largest_errors(seen, engine, on_one_process([0]))
    assert 1e-6 < dots < 3e-3


SETTINGS = {
    "overlap_comm": {"overlap_comm": True},
    "contiguous_gradients": {"contiguous_gradients": False},
    "reduce_scatter": {"reduce_scatter": False},
    "one bucket": {"reduce_bucket_size": 10**5},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stage", [1, 2])
def test_settings_of_zero(stage, name):
    assert_trained(config(stage, micro_batches=2, **SETTINGS[name]), on_one_process())


def test_settings_of_zero_3():
    zero = {"overlap_comm": True, "contiguous_gradients": False, "sub_group_size": 10**9}
    assert_trained(config(3, micro_batches=3, **zero), on_one_process())


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_in_turns_over_the_ranks(stage):
    # DeepSpeed's own getter mixes parameters up under this setting; forward does not.
    engine = make_engine(config(stage, round_robin_gradients=True))
    seen = train(make_opt(engine), engine)
    expected, params = on_one_process()
    errors = [abs(a[k] - e[k]) for a, e in zip(seen, expected, strict=True) for k in ("cosine", "forget_norm")]
    errors += [float((p - params[name]).abs().max().detach()) for name, p in engine.module.named_parameters()]
    assert max(errors) < FLOAT32


@pytest.mark.parametrize(("stage", "offload"), KINDS)
def test_empty_phases(stage, offload):
    micro = [{**MICRO, "forget": 0}, {**MICRO, "retain": 0}, MICRO]
    engine = make_engine(config(stage, offload=offload))
    opt = make_opt(engine)
    seen = [numbers for step in range(3) for numbers in train(opt, engine, [step], micro[step])]
    expected, params = on_one_process(range(3), micro=micro)
    norms = [abs(a[k] - e[k]) for a, e in zip(seen, expected, strict=True) for k in ("forget_norm", "retain_norm")]
    norms += [float((p.double() - params[name].detach()).abs().max()) for name, p in masters(engine).items()]
    assert max(norms) < FLOAT32


def fail_in(phase, engine):
    with phase():
        backward(engine, 7, "forget")
        raise KeyError


@pytest.mark.parametrize(("stage", "offload"), KINDS)
def test_what_fails_leaves_nothing_behind(stage, offload):
    engine = make_engine(config(stage, offload=offload))
    opt = make_opt(engine)
    with pytest.raises(KeyError):
        fail_in(opt.forget, engine)
    with opt.forget():
        backward(engine, 8, "forget")
    with pytest.raises(KeyError):
        fail_in(opt.retain, engine)
    with opt.forget():
        backward(engine, 9, "forget")
    opt.zero_grad()
    # And a NaN on one rank is a step that none takes.
    train(opt, engine, [5], times=float("nan") if dist.get_rank() == 1 else 1.0)
    assert (int(opt.statistics.skipped), engine.global_steps) == (1, 0)
    errors = largest_errors(train(opt, engine), engine, on_one_process())
    assert max(errors) < FLOAT32


@pytest.mark.parametrize(("stage", "offload", "dtype"), [*((*kind, None) for kind in KINDS), (3, False, "bf16")])
def test_checkpoint(stage, offload, dtype):
    settings = config(stage, dtype, offload=offload, accumulate="fp32" if dtype and stage else None)
    with shared_folder() as folder:
        engine = make_engine(settings)
        opt = make_opt(engine)
        opt.param_groups[0]["gamma"] = 0.5
        train(opt, engine, [0, 1])
        engine.save_checkpoint(folder, tag="two")
        train(opt, engine, [2])
        expected = masters(engine)
        again = make_engine(settings)
        resumed = make_opt(again)
        train(resumed, again, [4])
        again.load_checkpoint(folder, tag="two")
        assert [group["gamma"] for group in resumed.param_groups] == [0.5, 1.0]
        train(resumed, again, [2])
    assert all(torch.equal(p, expected[name]) for name, p in masters(again).items())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_block_of_the_documentation(stage):
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- test: deepspeed -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    make_engine(config(stage))  # Which sets up what a launcher would.
    network = make_network()
    batches = {f"{side}_batches": [tokens(0, side, dist.get_rank(), i) for i in range(2)] for side in MICRO}
    names = {"model": network, "config": config(stage), **batches}
    names |= {
        "npo": lambda engine, batch: engine(batch, "forget"),
        "nll": lambda engine, batch: engine(batch, "retain"),
    }
    exec(compile(code, "docs/distributed.md", "exec"), names)
    assert names["engine"].global_steps == 1
    (seen,), _ = on_one_process([0])
    assert float(names["opt"].statistics.cosine) == pytest.approx(seen["cosine"], abs=FLOAT32)


def assert_named(gradients):
    """Each name that the kind uses of the engine and of its optimizer is there, and would be missed."""
    kind = type(gradients)
    named = {"engine": set(kind.engine_names), "optimizer": set(kind.names)}
    assert all(hasattr(gradients.engine, name) for name in named["engine"])
    assert all(hasattr(gradients.optimizer, name) for name in named["optimizer"])
    for cls in [c for c in kind.__mro__ if c.__module__ == kind.__module__]:
        for owner, name in re.findall(r"self\.(engine|optimizer)\.(\w+)", inspect.getsource(cls)):
            assert name in named[owner], f"{cls.__name__} uses {owner}.{name}, which {kind.__name__} does not name"
    with (
        patch.object(kind, "names", (*kind.names, "of_another_version")),
        pytest.raises(ImportError, match=r"`deepspeed` must be a version whose .* has \['of_another_version'\], got"),
    ):
        kind(gradients.engine)


def test_a_recording():
    from blur_optim.record import Recorder, read_record

    engine = make_engine(config(2))
    opt = make_opt(engine, scope="parameter")
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with shared_folder() as folder:
        with Recorder(f"{folder}/run.jsonl", opt, model=engine.module, alignment=True) as recorder:
            train(opt, engine, [0])
            recorder.record()
        dist.barrier()
        record = read_record(f"{folder}/run.jsonl")
    assert {id(p) for p in opt.statistics.params} == set(map(id, trained.values()))
    (line,) = record.steps
    cosines = dict(zip(record.metadata["parameters"], line["alignment"]["cosine"], strict=True))
    assert cosines.keys() == trained.keys()
    # No retain gradient, no angle.
    assert cosines["forget_only.weight"] == 0 != cosines["up.weight"]
