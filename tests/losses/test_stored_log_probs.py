"""Log-probabilities that are computed once, kept in a file, and found by content."""

import copy
import itertools
import os
import random
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blur_optim.losses import ReferenceLogProbs, npo_loss, reference_log_probs, sequence_log_probs, stored_log_probs
from blur_optim.losses.fingerprints import example_keys, model_fingerprint
from blur_optim.losses.log_prob_file import read_log_probs

NEEDS_SAFETENSORS = "safetensors isn't installed: nothing can be stored"
NEEDS_TRANSFORMERS = "transformers isn't installed: no Llama to compare with"
NEEDS_PEFT = "peft isn't installed: no adapter to switch off"
pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)

VOCABULARY = 13


class ToyModel(nn.Module):
    """A causal model that remembers every token attended to. Counts its calls, and raises on demand."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.LayerNorm(8).eval().requires_grad_(False)
        self.head = nn.Linear(8, VOCABULARY)
        self.rows = []  # how many, by call
        self.error_at = {}  # number of the call -> error

    def forward(self, input_ids, attention_mask=None):
        self.rows.append(len(input_ids))
        if len(self.rows) in self.error_at:
            raise self.error_at[len(self.rows)]
        tokens = self.dropout(self.embedding(input_ids))
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        memory, states = torch.zeros_like(tokens[:, 0]), []
        for token, mask in zip(tokens.unbind(1), attended.unbind(1), strict=True):
            memory = torch.where(mask[:, None] != 0, torch.tanh(0.7 * memory + token), memory)
            states.append(memory + 0.3 * token)
        return SimpleNamespace(logits=self.head(self.frozen_norm(torch.stack(states, dim=1))))


# Prompt and answer of each example.
EXAMPLES = [([1, 2, 3], [4, 5]), ([1, 2], [4, 5]), ([1], [2, 3, 4, 5]), ([7, 8, 9, 10], [11]), ([6], [6, 6])]


def collate(examples, side="right", extra=0, pad_id=0, ids_dtype=torch.int64, with_mask=True):
    width = max(len(prompt) + len(answer) for prompt, answer in examples) + extra

    def padded(sequences, value):
        padding = [[value] * (width - len(sequence)) for sequence in sequences]
        pairs = zip(sequences, padding, strict=True)
        return torch.tensor([s + p if side == "right" else p + s for s, p in pairs])

    batch = {
        "input_ids": padded([prompt + answer for prompt, answer in examples], pad_id).to(ids_dtype),
        "labels": padded([[-100] * len(prompt) + answer for prompt, answer in examples], -100),
    }
    if with_mask:
        batch["attention_mask"] = padded([[1] * len(prompt + answer) for prompt, answer in examples], 0)
    return batch


def batches_of(*groups):
    return [collate([EXAMPLES[i] for i in group]) for group in groups]


ALL = batches_of([0, 1], [2, 3], [4])
PATH_NAME = "reference.safetensors"


@pytest.fixture
def path(tmp_path):
    return tmp_path / PATH_NAME


def compute(path, model, batches=ALL, **options):
    return ReferenceLogProbs.load_or_compute(path, model, batches, **{"progress": False, **options})


PADDINGS = {
    "right": {},
    "wide": {"extra": 3},
    "left": {"side": "left"},
    "left, wide": {"side": "left", "extra": 2},
    "other id": {"pad_id": 5},
    "id of a label, left": {"side": "left", "pad_id": 4},
    "int32": {"ids_dtype": torch.int32},
    "no mask": {"with_mask": False},
    "no mask, wide": {"with_mask": False, "extra": 3, "pad_id": 9},
}


CHANGED = {
    "token of the prompt": [([1, 9, 3], [4, 5])],
    "token of the answer": [([1, 2, 3], [4, 9])],
    "order": [([2, 1, 3], [4, 5])],
    "where the answer begins": [([1, 2], [3, 4, 5])],
    "longer": [([1, 2, 3], [4, 5, 5])],
    "shorter": [([1, 2, 3], [4])],
}


IDS = torch.ones(2, 3, dtype=torch.int64)
INVALID = {
    "not a mapping": ((IDS, IDS), TypeError, r"`batch` must be a mapping .*, got tuple\."),
    "no labels": ({"input_ids": IDS}, ValueError, r"must have the keys \['input_ids', 'labels'\], got"),
    "no ids": ({"labels": IDS}, ValueError, r"must have the keys \['input_ids', 'labels'\], got \['labels'\]"),
    "shape": ({"input_ids": IDS[:, 1:], "labels": IDS}, ValueError, r"`input_ids` .* \(2, 3\) .*got \(2, 2\)\."),
    "mask": (
        {"input_ids": IDS, "labels": IDS, "attention_mask": IDS[None]},
        ValueError,
        r"`attention_mask` must have shape \(2, 3\) like `labels`, got \(1, 2, 3\)\.",
    ),
    "one row": ({"input_ids": IDS[0], "labels": IDS[0]}, ValueError, r"`labels` must have shape \[B, T\], got"),
    "int32 labels": ({"input_ids": IDS, "labels": IDS.int()}, TypeError, r"`labels` .* torch.int64, got"),
    "float ids": ({"input_ids": IDS.float(), "labels": IDS}, TypeError, r"`input_ids` must be integers, got"),
}


class TestExampleKeys:
    @pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS.keys())
    def test_padding_changes_no_key(self, padding):
        alone = [example_keys(collate([example]))[0] for example in EXAMPLES]
        assert example_keys(collate(EXAMPLES, **padding)) == alone

    def test_mask_may_be_of_any_dtype(self):
        batch = collate(EXAMPLES, extra=1)
        expected = example_keys(batch)
        for mask in (batch["attention_mask"].bool(), 2.0 * batch["attention_mask"]):
            assert example_keys({**batch, "attention_mask": mask}) == expected

    def test_other_entries_of_the_batch_do_not_count(self):
        assert example_keys({**ALL[0], "index": torch.tensor([3, 4]), "text": "?"}) == example_keys(ALL[0])

    def test_a_label_in_the_first_column_does_not_count(self):
        batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
        assert example_keys(batch) == example_keys({**batch, "labels": torch.tensor([[-100, 2, 3]])})

    def test_tokens_after_the_last_label_do_not_count(self):
        batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[-100, 2, -100, -100]])}
        assert example_keys(batch) == example_keys({**batch, "input_ids": torch.tensor([[1, 2, 9, 9]])})

    def test_every_example_without_labels_has_the_same_key(self):
        assert len(set(example_keys({**ALL[0], "labels": torch.full_like(ALL[0]["labels"], -100)}))) == 1

    @pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
    def test_another_example_has_another_key(self, changed):
        assert example_keys(collate(changed)) != example_keys(collate(EXAMPLES[:1]))

    def test_a_label_that_is_not_the_token_counts(self):
        batch = collate(EXAMPLES[:1])
        assert example_keys({**batch, "labels": batch["labels"].where(batch["labels"] != 4, 6)}) != example_keys(batch)

    def test_equal_keys_mean_equal_log_probabilities(self):
        # Every batch row of three columns: tokens, labels (also on padding), masks (also with holes).
        columns = list(itertools.product((1, 2), (-100, 1, 2), (0, 1)))
        rows = torch.tensor(list(itertools.product(columns, repeat=3)))
        batch = dict(zip(("input_ids", "labels", "attention_mask"), rows.unbind(-1), strict=True))
        groups = defaultdict(list)
        log_probs = reference_log_probs(ToyModel().double(), batch).tolist()
        for key, log_prob in zip(example_keys(batch), log_probs, strict=True):
            groups[key].append(log_prob)
        # Rounding alone: the numbers of different contents are 1e-4 apart and more.
        assert max(max(group) - min(group) for group in groups.values()) < 1e-9
        assert 100 < len(groups) < len(rows)

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
    def test_nothing_has_the_key_of_nothing(self, shape):
        keys = example_keys({"input_ids": torch.ones(shape).long(), "labels": torch.ones(shape).long()})
        assert len(keys) == shape[0]
        assert len(set(keys)) <= 1

    @pytest.mark.parametrize(("batch", "error", "message"), INVALID.values(), ids=INVALID.keys())
    def test_wrong_batches_are_refused(self, batch, error, message):
        with pytest.raises(error, match=message):
            example_keys(batch)
        with pytest.raises(error, match=message):
            ReferenceLogProbs("0", {})(batch)


class Tensors(nn.Module):
    """A module that holds one buffer."""

    def __init__(self, tensor, persistent=True):
        super().__init__()
        self.register_buffer("tensor", tensor, persistent=persistent)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


DTYPES = [
    *(torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.complex128),
    *(torch.int64, torch.int8, torch.uint8, torch.bool),  # such as quantized weights
]


class TestModelFingerprint:
    def test_it_is_that_of_a_copy_a_wrapper_and_any_mode(self):
        model = ToyModel()
        expected = model_fingerprint(model)
        assert len(expected) == 32
        same = [copy.deepcopy(model), Wrapper(model), copy.deepcopy(model).eval().requires_grad_(False)]
        assert [model_fingerprint(other) for other in same] == [expected] * 3

    def test_every_single_element_counts(self):
        # Of 1500 words of two elements the samples see every fifth; the others are in the sum alone, the last in none.
        weights = torch.randn(3001)
        expected = model_fingerprint(Tensors(weights))
        for position in (*range(0, 3000, 61), 3000):
            changed = weights.clone()
            changed[position] = torch.nextafter(changed[position], torch.tensor(9.0))
            assert model_fingerprint(Tensors(changed)) != expected

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_dtype(self, dtype):
        ones = torch.ones(3, 5).to(dtype)
        changed = torch.tensor([[1.0] * 5, [1.0] * 5, [1.0] * 4 + [0.0]]).to(dtype)
        assert model_fingerprint(Tensors(ones)) == model_fingerprint(Tensors(ones.clone()))
        assert model_fingerprint(Tensors(ones)) != model_fingerprint(Tensors(changed))

    def test_shape_dtype_and_memory_layout(self):
        ones = torch.ones(2, 3)
        others = [ones.T, ones.bfloat16(), ones[:1], torch.ones(()), torch.ones(0)]
        assert len({model_fingerprint(Tensors(tensor)) for tensor in [ones, *others]}) == 6
        zeros = torch.zeros(4)
        assert model_fingerprint(Tensors(zeros)) != model_fingerprint(Tensors(zeros.int()))
        assert model_fingerprint(Tensors(ones.T)) == model_fingerprint(Tensors(ones.T.contiguous()))

    def test_tensors_that_change_places_count(self):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        assert model_fingerprint(nn.Sequential(first, second)) != model_fingerprint(nn.Sequential(second, first))

    def test_buffers_that_are_not_kept_do_not_count(self):
        # Such as the frequencies of rotary embeddings, which differ by rounding between devices.
        assert len({model_fingerprint(Tensors(torch.full((1,), x), persistent=False)) for x in (1.0, 2.0)}) == 1

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
    def test_shards_are_gathered(self):
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        model = nn.Linear(3, 4)
        expected = model_fingerprint(model)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]))
            assert model_fingerprint(model) == expected
        finally:
            torch.distributed.destroy_process_group()

    def test_weights_that_are_elsewhere_are_refused(self):
        with pytest.raises(ValueError, match=r"`model` must hold its weights, got 'weight' on the meta device\. "):
            model_fingerprint(nn.Linear(2, 2, device="meta"))

    @pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9])
    def test_where_a_tensor_begins_in_memory_does_not_matter(self, size):
        half = torch.randn(20).half()
        for start in range(4):
            view = half[start : start + size]
            assert model_fingerprint(Tensors(view)) == model_fingerprint(Tensors(view.clone()))


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
            "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_stored_log_probs as t\n"
            "def kill(handle, saves=iter(range(9))):\n"
            "    if next(saves) == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.fsync = kill\n"
            "t.compute(t.Path(sys.argv[2]), t.ToyModel(), save_every=0)"
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


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, attention_dropout=0.3, **sizes)
    return transformers.LlamaForCausalLM(config).train()


class TestLlama:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_numbers_do_not_depend_on_the_padding_that_the_key_ignores(self, llama, path, side):
        stored = compute(path, llama)
        batch = collate(EXAMPLES, side=side, extra=2)
        torch.testing.assert_close(stored(batch), reference_log_probs(llama, batch))

    def test_it_is_found_again_after_saving_and_loading(self, llama, path, tmp_path):
        compute(path, llama)
        llama.save_pretrained(tmp_path / "model")
        loaded = type(llama).from_pretrained(tmp_path / "model")
        assert compute(path, loaded).computed == 0


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# peft 0.21 asks transformers 5.23 for a property that is deprecated there.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapter:
    @staticmethod
    def adapt(llama, fresh=True):
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        config = peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            init_lora_weights=fresh,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(llama, config)

    def test_the_file_of_the_plain_model_is_that_of_one_with_a_fresh_adapter(self, llama, path):
        stored = compute(path, llama)
        adapted = self.adapt(copy.deepcopy(llama))
        assert compute(path, adapted).computed == 0
        assert compute(path, Wrapper(adapted)).computed == 0
        assert torch.equal(stored(ALL[0]), reference_log_probs(llama, ALL[0]))

    def test_an_adapter_that_was_trained_is_part_of_the_model(self, llama, path, tmp_path):
        adapted = self.adapt(copy.deepcopy(llama), fresh=False)
        stored = compute(path, adapted)
        with torch.no_grad():
            expected = sequence_log_probs(adapted.eval()(**inputs_of(ALL[0])).logits, ALL[0]["labels"])
        torch.testing.assert_close(stored(ALL[0]), expected)
        assert (stored(ALL[0]) - reference_log_probs(llama, ALL[0])).abs().max() > 0.1, "the adapter has to matter"
        compute(tmp_path / "plain", llama)
        with pytest.raises(ValueError, match="with the log-probabilities of the model"):
            compute(tmp_path / "plain", adapted)
        with torch.no_grad():
            adapted.get_base_model().lm_head.modules_to_save["default"].weight[0, 0] += 1.0
        with pytest.raises(
            ValueError, match=r"If `model` was trained since, read the file with ReferenceLogProbs\.load"
        ):
            compute(path, adapted)

    def test_a_changed_base_is_another_model(self, llama, path):
        adapted = self.adapt(llama)
        compute(path, adapted)
        with torch.no_grad():
            adapted.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight[0, 0] += 1e-3
        with pytest.raises(ValueError, match="with the log-probabilities of the model"):
            compute(path, adapted)

    def test_an_adapter_that_stays_on_counts(self, llama):
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.inject_adapter_in_model(config, llama)  # offers no disable_adapter()
        before = model_fingerprint(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] += 1.0
        assert model_fingerprint(model) != before
