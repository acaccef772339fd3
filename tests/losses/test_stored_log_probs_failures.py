"""Stored log-probabilities: runs that are interrupted, and files that are refused."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored_rows import ALL, NEEDS_SAFETENSORS, PATH_NAME, ToyModel, batches_of, compute

from blur_optim.losses import ReferenceLogProbs, reference_log_probs, stored_log_probs
from blur_optim.losses.fingerprints import model_fingerprint
from blur_optim.losses.log_prob_file import read_log_probs

pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / PATH_NAME


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
    def test_an_interrupted_run_goes_on(self, path, error):
        model = ToyModel()
        model.error_at = {3: error}
        with pytest.raises(type(error)):
            compute(path, model)
        assert len(ReferenceLogProbs.load(path)) == 4
        stored = compute(path, model)
        assert model.rows == [2, 2, 1, 1]
        assert stored.computed == 1
        assert all(torch.equal(stored(batch), reference_log_probs(ToyModel(), batch)) for batch in ALL)

    def test_an_interruption_in_the_data_set_counts_too(self, path):
        def interrupted():
            yield ALL[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compute(path, ToyModel(), interrupted())
        assert len(ReferenceLogProbs.load(path)) == 2

    def test_nothing_computed_is_nothing_written(self, path):
        model = ToyModel()
        model.error_at = {1: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            compute(path, model)
        assert not path.exists()

    @pytest.mark.parametrize(("save_every", "expected"), [(0, [1, 2, 3, 4, 5]), (25.0, [2, 4, 5]), (1e9, [5])])
    def test_it_is_saved_as_often_as_asked(self, path, monkeypatch, save_every, expected):
        sizes, clock = [], itertools.count(0.0, 15.0)  # a batch takes 15 seconds, and so does writing

        def write(path, model, log_probs):
            sizes.append(len(log_probs))

        monkeypatch.setattr(stored_log_probs, "write_log_probs", write)
        monkeypatch.setattr(stored_log_probs.time, "monotonic", lambda: next(clock))
        compute(path, ToyModel(), batches_of([0], [1], [2], [3], [4]), save_every=save_every)
        assert sizes == expected

    def test_a_full_disk_leaves_the_old_file_and_no_other(self, path, monkeypatch):
        compute(path, ToyModel(), ALL[:1])

        def no_space(handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", no_space)
            with pytest.raises(OSError, match="No space left"):
                compute(path, ToyModel())
        assert [p.name for p in path.parent.iterdir()] == [PATH_NAME]
        assert len(ReferenceLogProbs.load(path)) == 2

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
    def test_a_kill_while_writing_leaves_the_last_whole_file(self, path):
        code = (
            "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import stored_rows as t\n"
            "def kill(handle, saves=iter(range(9))):\n"
            "    if next(saves) == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.fsync = kill\n"
            "t.compute(sys.argv[2], t.ToyModel(), save_every=0)"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(ReferenceLogProbs.load(path)) == 2
        model = ToyModel()
        assert len(compute(path, model)) == 5
        assert model.rows == [2, 1]


FOREIGN = {
    "text": b"no tensors in here, but more than eight bytes",
    "empty": b"",
    "other tensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
}


class TestRefusal:
    def test_another_model_s_file(self, path):
        compute(path, ToyModel())
        before, other = path.read_bytes(), ToyModel(seed=1)
        message = rf"got '.*{PATH_NAME}' with those of {model_fingerprint(ToyModel())}\. If `model` was trained since"
        with pytest.raises(ValueError, match=message):
            compute(path, other)
        assert other.rows == []
        assert path.read_bytes() == before

    def test_a_model_that_was_trained_since(self, path):
        model = ToyModel()
        compute(path, model)
        model.head(torch.ones(8)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        with pytest.raises(ValueError, match=r"read the file with ReferenceLogProbs\.load\."):
            compute(path, model)
        assert torch.equal(ReferenceLogProbs.load(path)(ALL[0]), reference_log_probs(ToyModel(), ALL[0]))

    @pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
    def test_a_file_of_another_kind(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"can read, got '.*{PATH_NAME}': .*\. Give another path, or delete"):
            compute(path, ToyModel())
        assert path.read_bytes() == content

    def test_a_truncated_file(self, path):
        compute(path, ToyModel())
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"can read, got '.*{PATH_NAME}': "):
            ReferenceLogProbs.load(path)

    def test_a_file_of_another_version(self, path, monkeypatch):
        compute(path, ToyModel())
        monkeypatch.setattr("blur_optim.losses.log_prob_file.VERSION", "2")
        with pytest.raises(ValueError, match=r"it has version 1, this code reads 2\. "):
            read_log_probs(path)

    def test_a_folder(self, tmp_path):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            compute(tmp_path, ToyModel())

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
    def test_a_log_probability_that_is_not_finite(self, path, value):
        class Broken(ToyModel):
            def forward(self, input_ids, attention_mask):
                logits = super().forward(input_ids, attention_mask).logits
                logits[..., 11] = logits[..., 11].masked_fill(input_ids == 10, value)
                return SimpleNamespace(logits=logits)

        # 10, 11 end example 3, in row 1 of the second batch.
        message = rf"`model` must give every example a finite .*, got {value} for row 1 of batches\[1\]\."
        with pytest.raises(ValueError, match=message):
            compute(path, Broken())
        assert len(ReferenceLogProbs.load(path)) == 2

    @pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
    def test_no_data(self, path, batches):
        with pytest.raises(ValueError, match=r"`batches` must yield at least one batch, got none\."):
            compute(path, ToyModel(), batches)
        assert not path.exists()

    def test_an_exhausted_iterator_although_the_file_is_full(self, path):
        compute(path, ToyModel())
        with pytest.raises(ValueError, match="Is it an exhausted iterator"):
            compute(path, ToyModel(), iter(()))

    @pytest.mark.parametrize("save_every", [-1.0, float("nan")])
    def test_a_negative_interval(self, path, save_every):
        with pytest.raises(ValueError, match=rf"`save_every` must be a number of seconds >= 0, got {save_every}\."):
            compute(path, ToyModel(), save_every=save_every)
