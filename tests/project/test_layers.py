"""Imports go down only, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blur_optim

PACKAGE = Path(blur_optim.__file__).parent

# Each module may import from those before it. A new module gets its place here.
LAYERS = [
    "kernels.plan",
    "kernels.layout",
    "kernels.blocks",
    "kernels.reference",
    "kernels.foreach.slabs",
    "kernels.foreach.gradients",
    "kernels.foreach.metric",
    "kernels.foreach",
    "kernels.unlike_layouts",
    "kernels.schema",
    "kernels.native",
    "kernels.triton.kernels.access",
    "kernels.triton.kernels.dots",
    "kernels.triton.kernels.blend",
    "kernels.triton.kernels.metric",
    "kernels.triton.kernels.compress",
    "kernels.triton.kernels.adam",
    "kernels.triton.kernels.sgd",
    "kernels.triton.kernels",
    "kernels.triton.checks",
    "kernels.triton.launch",
    "kernels.triton",
    "kernels.select",
    "kernels",
    "optimizer_wrapper",
    "parallel",
    "parallel.instances",
    "parallel.data_parallel",
    "parallel.fsdp1",
    "parallel.fsdp2",
    "parallel.engines",
    "parallel.wrappers",
    "parallel.ranks",
    "losses.checks",
    "losses.text",
    "losses.rmu",
    "losses.forward",
    "losses.reference",
    "losses.fingerprints",
    "losses.log_prob_file",
    "losses.reference_ranks",
    "losses.stored_log_probs",
    "losses",
    "step",
    "step.rules",
    "step.capturing",
    "step.plan",
    "step.stash",
    "step.pairs",
    "step.gradients",
    "step.settings",
    "step.projection",
    "step.nothing",
    "step.recompute",
    "step.statistics",
    "step.phases",
    "step.base",
    "step.capture",
    "step.dynamo",
    "step.base_state",
    "step.fitting",
    "step.fused",
    "step.under_way",
    "step.metric",
    "step.two_phase",
    "step.metric_pairs",
    "step.metric_update",
    "step.metric_step",
    "env",
    "chained",
    "optimizer",
    "record.record_file",
    "record.recorder",
    "record.plot_rows",
    "record.plot_alignment",
    "record.plot",
    "record",
    "",
    "integrations",
    "integrations.pairs",
    "integrations.objectives",
    "integrations.deepspeed.gradients",
    "integrations.deepspeed.zero12",
    "integrations.deepspeed.zero3",
    "integrations.deepspeed.setup",
    "integrations.deepspeed.two_phase",
    "integrations.deepspeed.optimizer",
    "integrations.deepspeed",
    "integrations.trainer_checks",
    "integrations.trainer_step",
    "integrations.arguments",
    "integrations.record",
    "integrations.run_start",
    "integrations.trainer_reference",
    "integrations.transformers",
    "integrations.stopping",
    "integrations.axolotl",
    "integrations.split_loss",
    "integrations.open_unlearning",
    "integrations.lightning",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "blur_optim":
            base = node.module.removeprefix("blur_optim").lstrip(".")
            submodules = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & MODULES.keys()
            names |= submodules or {base}
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "blur_optim"]
            names |= {name.removeprefix("blur_optim").lstrip(".") for name in ours}
    return names


def test_every_module_has_a_layer():
    assert set(LAYERS) == MODULES.keys()


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "blur_optim")
def test_imports_go_down(name):
    position = LAYERS.index(name)
    for other in imported(MODULES[name]):
        assert LAYERS.index(other) < position, f"{name or 'blur_optim'} imports {other}, which is above it"


def test_the_optimizer_is_found_to_import_the_rules():
    assert "step.rules" in imported(MODULES["optimizer"])


def test_the_optimizer_wrapper_stands_alone():
    assert imported(MODULES["optimizer_wrapper"]) == set()


def test_importing_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import blur_optim; "
        "heavy = {'triton', 'transformers', 'accelerate', 'peft', 'lightning', 'numpy', 'matplotlib'}; "
        "heavy |= {'torch.distributed.tensor', 'torch._dynamo'}; "
        "new = {m for m in set(sys.modules) - before if m in heavy}; "
        "assert not new, new; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
