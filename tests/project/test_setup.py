"""setup.py: what it needs, from wherever it is called, and for which devices it compiles."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def run_setup(monkeypatch):
    """Run setup.py up to where it would build, under ``name``; its names."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("BLUR_OPTIM_BUILD", "1")
    monkeypatch.delenv("BLUR_OPTIM_CUDA", raising=False)
    return lambda name=ROOT / "setup.py": runpy.run_path(str(name))


def test_torch_is_found_whatever_the_files_name(run_setup, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_setup("setup.py")["TORCH"] == run_setup()["TORCH"]
    assert run_setup("setup.py")["ROOT"] == ROOT


def test_an_old_setuptools_is_refused_by_name(run_setup, monkeypatch):
    required = re.search(r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    assert int(required) == run_setup()["OLDEST_SETUPTOOLS"]
    monkeypatch.setattr(setuptools, "__version__", "65.5.1")
    with pytest.raises(SystemExit, match=r"setuptools must be 77 or newer, got 65\.5\.1\. `pip install"):
        run_setup()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
class TestArchitectures:
    def targets(self, run_setup, monkeypatch, value):
        monkeypatch.setenv("BLUR_OPTIM_CUDA_ARCHITECTURES", value)
        return [re.sub(r"arch=compute_|code=", "", target) for target in run_setup()["cuda_targets"]()]

    def test_one_and_its_ptx(self, run_setup, monkeypatch):
        assert self.targets(run_setup, monkeypatch, "9.0") == ["90,sm_90", "90,compute_90"]

    def test_several_and_the_default(self, run_setup, monkeypatch):
        for value in ("80;90", "80, 90"):
            assert self.targets(run_setup, monkeypatch, value) == ["80,sm_80", "90,sm_90", "90,compute_90"]
        assert len(self.targets(run_setup, monkeypatch, "")) > 2

    @pytest.mark.parametrize("value", ["hopper", "90 12345"])
    def test_what_nvcc_does_not_know_is_refused(self, run_setup, monkeypatch, value):
        with pytest.raises(RuntimeError, match=rf"compute capabilities that this nvcc knows, .* got '{value}'"):
            self.targets(run_setup, monkeypatch, value)
