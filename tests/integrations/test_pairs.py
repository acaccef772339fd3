"""What is read with what: pairs of rows, in an order that the seed and the epoch decide."""

from collections import Counter

import pytest
import torch

from blur_optim.integrations.pairs import PairCollator, PairedDataset, PairSampler

FORGET, RETAIN = [f"f{i}" for i in range(3)], [f"r{i}" for i in range(8)]


def epoch(dataset, number, seed=0):
    return list(PairSampler(dataset, seed, lambda: number))


@pytest.mark.parametrize(("over", "length"), [("longer", 8), ("forget", 3), ("retain", 8)])
def test_an_epoch_has_the_length_of_one_data_set(over, length):
    dataset = PairedDataset(FORGET, RETAIN, over)
    assert len(dataset) == len(epoch(dataset, 0)) == len(PairSampler(dataset, 0, lambda: 0)) == length


@pytest.mark.parametrize("over", ["longer", "forget"])
def test_no_row_comes_again_before_all_others(over):
    dataset = PairedDataset(FORGET, RETAIN, over)
    read = [index for number in range(24) for index in epoch(dataset, number)]
    for side, size in ((0, 3), (1, 8)):
        rows = [index[side] for index in read]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_orders_differ_between_epochs_seeds_and_sides():
    dataset = PairedDataset(RETAIN, RETAIN)
    orders = [
        tuple(index[side] for index in epoch(dataset, n, seed)) for side in (0, 1) for n in (0, 1) for seed in (0, 1)
    ]
    assert len(set(orders)) == len(orders)
    assert epoch(dataset, 1) == epoch(dataset, 1)


def test_a_short_side_meets_different_rows():
    dataset = PairedDataset(FORGET, RETAIN)
    partners = Counter(index for number in range(6) for index in epoch(dataset, number))
    assert len(partners) > len(RETAIN) + 5


def test_items():
    dataset = PairedDataset(FORGET, RETAIN)
    assert dataset[(2, 7)] == {"forget": "f2", "retain": "r7"}
    assert dataset[4] == {"forget": "f1", "retain": "r4"}


def test_each_half_is_collated_apart():
    batch = PairCollator(torch.tensor)([{"forget": 1, "retain": 5}, {"forget": 2, "retain": 6}])
    assert batch["forget"].tolist() == [1, 2]
    assert batch["retain"].tolist() == [5, 6]


def test_two_answers_are_two_batches():
    pairs = [{"forget": {"chosen": i, "rejected": -i}, "retain": i} for i in (3, 4)]
    assert PairCollator(list)(pairs)["forget"] == {"chosen": [3, 4], "rejected": [-3, -4]}


def test_a_batch_without_labels_is_warned_of_once(recwarn):
    def batch(*labels):
        return [{"input_ids": torch.ones(3), "labels": torch.tensor(row)} for row in labels]

    collator = PairCollator(torch.utils.data.default_collate)
    trained, untrained = batch([-100, -100, 5]), batch([7, -100, -100])  # Nothing predicts the 7.
    collator([{"forget": f, "retain": r} for f, r in zip(trained + untrained, trained * 2, strict=True)])
    assert not recwarn
    with pytest.warns(UserWarning, match=r"`retain_dataset` gave a batch in which every label is -100"):
        collator([{"forget": trained[0], "retain": untrained[0]}])
    collator([{"forget": trained[0], "retain": untrained[0]}])
    assert not recwarn
    with pytest.warns(UserWarning, match=r"`forget_dataset` gave a batch"):
        collator([{"forget": {"chosen": trained[0], "rejected": untrained[0]}, "retain": trained[0]}])


class Stream:
    def __iter__(self):
        yield 1


@pytest.mark.parametrize(
    ("forget", "retain", "over", "error", "match"),
    [
        (Stream(), RETAIN, "longer", TypeError, r"`forget_dataset` must have a length .* got Stream"),
        (FORGET, [], "longer", ValueError, r"`retain_dataset` must hold at least one row, got none"),
        (FORGET, RETAIN, "both", ValueError, r"`epoch_over` must be one of .* got 'both'"),
    ],
)
def test_what_is_refused(forget, retain, over, error, match):
    with pytest.raises(error, match=match):
        PairedDataset(forget, retain, over)
