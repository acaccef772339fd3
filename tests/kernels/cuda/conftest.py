import os
import re
from pathlib import Path

import pytest
import torch
from cuda_emulator import Emulated
from cuda_toolchain import CSRC, HERE, emulated_object, linked


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the processes of one run, so that each thing is compiled once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "blur_optim_cuda"


@pytest.fixture(scope="session")
def emulated(build_folder: Path) -> Emulated:
    torch_folder = Path(torch.__file__).parent
    target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (CSRC.parent / "setup.py").read_text())[1]
    flags = ["-O1", "-fPIC", f"-DTORCH_TARGET_VERSION={target}", f"-I{torch_folder / 'include'}"]
    sources = [HERE / "emulated.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    objects = [emulated_object(build_folder / f"emulated-{source.stem}.o", source, *flags) for source in sources]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch"]
    return Emulated(linked(build_folder / "emulated.so", "-shared", *objects, *libraries))
