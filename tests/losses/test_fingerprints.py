"""By what an example and a model are known again."""

import copy
import itertools
from collections import defaultdict

import pytest
import torch
from stored_rows import ALL, EXAMPLES, NEEDS_SAFETENSORS, ToyModel, Wrapper, collate
from torch import nn

from blur_optim.losses import ReferenceLogProbs, reference_log_probs
from blur_optim.losses.fingerprints import example_keys, model_fingerprint

pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)
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
