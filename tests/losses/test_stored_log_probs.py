"""Log-probabilities that are computed once, kept in a file, and found by content."""

import copy
import itertools
import random
import subprocess
import sys

import pytest
import torch
from stored_rows import ALL, EXAMPLES, NEEDS_SAFETENSORS, PATH_NAME, ToyModel, batches_of, collate, compute

from blur_optim.losses import ReferenceLogProbs, npo_loss, reference_log_probs, sequence_log_probs
from blur_optim.losses.fingerprints import model_fingerprint

pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / PATH_NAME


class TestReading:
    def test_numbers_are_those_of_the_reference(self, path):
        model = ToyModel()
        computed, read = compute(path, model), compute(path, model)
        assert (len(computed), computed.computed, read.computed) == (5, 5, 0)
        for batch in ALL:
            expected = reference_log_probs(model, batch)
            for stored in (computed, read, ReferenceLogProbs.load(path)):
                found = stored(batch)
                assert torch.equal(found, expected)
                assert (found.dtype, found.device, found.requires_grad) == (torch.float32, expected.device, False)

    def test_numbers_are_found_in_any_order_and_padding(self, path):
        model = ToyModel()
        stored = compute(path, model)
        for side, order in itertools.product(("left", "right"), ([4, 2, 0], [3, 1, 3])):
            batch = collate([EXAMPLES[i] for i in order], side=side, extra=2)
            # Up to rounding: the reference ran them in other batches.
            torch.testing.assert_close(stored(batch), reference_log_probs(model, batch))

    def test_a_loss_reads_them(self, path):
        model = ToyModel()
        stored = compute(path, model)
        log_probs = sequence_log_probs(model(ALL[0]["input_ids"], ALL[0]["attention_mask"]).logits, ALL[0]["labels"])
        npo_loss(log_probs, stored(ALL[0]), beta=0.1).backward()
        assert model.head.weight.grad.abs().max() > 0

    def test_an_example_that_is_not_stored_is_named(self, path):
        stored = compute(path, ToyModel(), batches_of([0, 1]))
        message = r"`batch` must hold .*, got 2 of 4 that are not, the first in row 1\. Call ReferenceLogProbs\.load"
        with pytest.raises(ValueError, match=message):
            stored(collate([EXAMPLES[i] for i in (0, 3, 1, 4)]))

    def test_several_files_are_read_as_one(self, path, tmp_path):
        model, other = ToyModel(), tmp_path / "other"
        compute(path, model, batches_of([0, 1]))
        compute(other, model, batches_of([1, 2]))
        both = ReferenceLogProbs.load(path, str(other))
        assert len(both) == 3
        both.save(tmp_path / "both")
        assert torch.equal(ReferenceLogProbs.load(tmp_path / "both")(ALL[0]), reference_log_probs(model, ALL[0]))
        with pytest.raises(ValueError, match="`paths` must name at least one file, got none"):
            ReferenceLogProbs.load()
        with pytest.raises(FileNotFoundError, match="nowhere"):
            ReferenceLogProbs.load(tmp_path / "nowhere")

    def test_files_of_two_models_are_not_read_as_one(self, path, tmp_path):
        compute(path, ToyModel())
        compute(tmp_path / "other", ToyModel(seed=1))
        with pytest.raises(ValueError, match=rf"Only files of one model .*, and the first is '.*{PATH_NAME}'\."):
            ReferenceLogProbs.load(path, tmp_path / "other")


class TestComputing:
    def test_a_second_run_neither_calls_the_model_nor_writes(self, path):
        compute(path, ToyModel())
        before, model = path.stat(), ToyModel()
        compute(path, model)
        assert model.rows == []
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_only_what_is_new_is_computed_and_the_rest_stays(self, path):
        compute(path, ToyModel(), batches_of([0, 1, 2]))
        model = ToyModel()
        stored = compute(path, model, batches_of([2, 4, 0, 3]))
        assert model.rows == [2]
        assert (len(stored), stored.computed) == (5, 2)
        batch = collate(EXAMPLES)
        torch.testing.assert_close(stored(batch), reference_log_probs(model, batch))
        assert len(ReferenceLogProbs.load(path)) == 5

    @pytest.mark.parametrize("position_ids", [torch.arange(5), torch.arange(5)[None], torch.arange(5).expand(2, 5)])
    def test_a_part_of_a_batch_keeps_its_positions(self, path, position_ids):
        class Positions(ToyModel):
            def forward(self, input_ids, attention_mask, position_ids):
                assert position_ids.expand(len(input_ids), 5).tolist() == [[0, 1, 2, 3, 4]] * len(input_ids)
                return super().forward(input_ids, attention_mask)

        compute(path, ToyModel(), batches_of([0]))
        model = Positions()
        compute(path, model, [{**ALL[0], "position_ids": position_ids}])
        assert model.rows == [1]

    def test_a_changed_row_is_computed_anew(self, path):
        compute(path, ToyModel())
        model, changed = ToyModel(), collate([EXAMPLES[0], ([1, 2], [4, 6])])
        stored = compute(path, model, [changed, *ALL[1:]])
        assert model.rows == [1]
        torch.testing.assert_close(stored(changed), reference_log_probs(model, changed))

    def test_the_same_example_is_computed_once(self, path):
        model = ToyModel()
        stored = compute(path, model, batches_of([0, 1, 0, 0], [1, 0], [2, 1]))
        assert model.rows == [2, 1]
        assert len(stored) == 3

    def test_model_and_random_state_stay_as_they_were(self, path):
        model = ToyModel()
        modes = {name: module.training for name, module in model.named_modules()}
        state = torch.get_rng_state(), random.getstate()
        expected = copy.deepcopy(model.state_dict())
        compute(path, model)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert modes == {"": True, "embedding": True, "dropout": True, "frozen_norm": False, "head": True}
        assert [p.requires_grad for p in model.parameters()] == [True, False, False, True, True]
        assert all(param.grad is None for param in model.parameters())
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)

    def test_the_folder_is_made(self, tmp_path):
        compute(tmp_path / "a" / "b" / PATH_NAME, ToyModel())
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [PATH_NAME]

    def test_path_may_be_a_string(self, path):
        compute(str(path), ToyModel())
        assert len(ReferenceLogProbs.load(str(path))) == 5

    def test_a_default_device_changes_nothing(self, path):
        model = ToyModel()
        torch.set_default_device("meta")
        try:
            first, second = compute(path, model), compute(path, model)
            found = first(ALL[0]), second(ALL[0])
        finally:
            torch.set_default_device(None)
        assert all(torch.equal(log_probs, reference_log_probs(model, ALL[0])) for log_probs in found)

    def test_the_file_is_plain_safetensors(self, path):
        safetensors = pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)
        compute(path, ToyModel())
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.get_tensor("keys").shape == (5, 16)
            assert file.get_tensor("log_probs").dtype == torch.float32
            assert file.metadata()["model"] == model_fingerprint(ToyModel())


class TestProgressAndImports:
    def test_a_bar_is_shown(self, path, capsys):
        pytest.importorskip("tqdm", reason="tqdm isn't installed: no progress bar")
        ReferenceLogProbs.load_or_compute(path, ToyModel(), ALL)
        shown = capsys.readouterr().err
        assert "reference log-probabilities: 100%" in shown
        assert "3/3" in shown

    def test_no_bar_is_shown_unless_asked(self, path, capsys):
        compute(path, ToyModel(), progress=False)
        assert capsys.readouterr() == ("", "")

    def test_another_bar_may_take_its_place(self, path):
        seen = []

        def progress(batches):
            for batch in batches:
                seen.append(len(batch["labels"]))
                yield batch

        assert len(compute(path, ToyModel(), progress=progress)) == 5
        assert seen == [2, 2, 1]

    def test_without_tqdm_the_message_says_how_to_get_it(self, path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
        model = ToyModel()
        with pytest.raises(ImportError, match=r"`tqdm` must be installed .* `pip install tqdm`\."):
            compute(path, model, progress=True)
        assert model.rows == []
        assert len(compute(path, model, progress=False)) == 5

    def test_without_safetensors_the_message_comes_before_the_work(self, path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        model = ToyModel()
        with pytest.raises(ImportError, match=r"`safetensors` must be installed .* `pip install safetensors`\."):
            compute(path, model)
        assert model.rows == []

    def test_importing_the_losses_imports_neither(self):
        code = (
            "import sys, torch; before = set(sys.modules); import blur_optim.losses; "
            "new = {name for name in set(sys.modules) - before if name in {'safetensors', 'tqdm', 'numpy'}}; "
            "assert not new, new"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
