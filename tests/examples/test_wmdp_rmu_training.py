"""BLUR-RMU on a tiny Llama: what is trained, what it is held to, and the step itself."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import wmdp_rmu
from shared_lib.errors import InputError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from wmdp_rmu_lib.corpora import Batch, Corpus, alternating, collate, endless_batches
from wmdp_rmu_lib.layers import FROZEN, activations, choose_trained, decoder_layers, median_norm
from wmdp_rmu_lib.options import parse_options

WIDTH, VOCABULARY = 16, 40
SMALL = ["--model", "m", "--forget", "a", "--forget", "b", "--retain", "c", "--batch", "2", "--lr", "1e-2"]
DOWN_PROJECTIONS = [f"model.layers.{number}.mlp.down_proj.weight" for number in (5, 6, 7)]

Step = tuple[Tensor, Batch, Batch, Tensor]  # steering vector, forget batch, retain batch, frozen activations


def tiny_llama(vocabulary: int = VOCABULARY, layers: int = 9) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # As in a trained model, every layer is to change what it is given.
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def passages(first: int, count: int = 7) -> list[list[int]]:
    """Passages of different lengths that all begin with a token of their corpus."""
    generator = torch.Generator().manual_seed(first)
    lengths = [3 + i % 4 for i in range(count)]
    return [[first, *torch.randint(10, VOCABULARY, (n,), generator=generator).tolist()] for n in lengths]


CORPORA = [Corpus(name, passages(first), []) for name, first in (("a", 1), ("b", 2), ("c", 3))]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Step]]:
    """What every step is given, in order."""
    seen: list[Step] = []
    take_step = wmdp_rmu.take_step

    def spy(model: Any, optimizer: Any, layer: int, vector: Tensor, f: Batch, r: Batch, frozen: Tensor) -> Any:
        seen.append((vector, f, r, frozen))
        return take_step(model, optimizer, layer, vector, f, r, frozen)

    monkeypatch.setattr(wmdp_rmu, "take_step", spy)
    return seen


def train(model: LlamaForCausalLM, *more: str) -> list[dict[str, Any]]:
    options = parse_options([*SMALL, *more])
    records: list[dict[str, Any]] = []
    trained = choose_trained(model, options.layers, options.param_pattern)
    wmdp_rmu.train(model, trained, CORPORA[:2], CORPORA[2], options, records.append)
    return records


def whole_forward(model: LlamaForCausalLM, layer: int, batch: Batch) -> Tensor:
    """The activations by a way of their own: all layers run, and transformers collects."""
    # hidden_states[0] are the embeddings; the last has been through the final norm.
    return model(**batch, output_hidden_states=True).hidden_states[layer + 1]


def test_only_the_chosen_matrices_change(model: LlamaForCausalLM) -> None:
    before = copy.deepcopy(model.state_dict())
    train(model, "--steps", "2")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == DOWN_PROJECTIONS


def test_a_pattern_chooses_others(model: LlamaForCausalLM) -> None:
    chosen = choose_trained(model, [2, 4], "self_attn.[qk]_proj.*")
    assert list(chosen) == [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (2, 4) for p in "qk"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(chosen)


def test_activations_are_the_layers_and_no_layer_above_runs(model: LlamaForCausalLM) -> None:
    batch = collate(passages(1))
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = activations(model, 7, batch)
    assert ran == [0, 1, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(found, whole_forward(model, 7, batch))
    assert found.requires_grad


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_activations_are_those_of_an_untouched_copy_at_every_step(
    model: LlamaForCausalLM, steps: list[Step], frozen: str
) -> None:
    untouched = copy.deepcopy(model)
    train(model, "--steps", "5", "--frozen", frozen)
    for _, _, r_batch, held_to in steps:
        assert not held_to.requires_grad
        torch.testing.assert_close(held_to, whole_forward(untouched, 7, r_batch), rtol=0, atol=0)
    # The model itself has moved away meanwhile.
    assert (activations(model, 7, steps[-1][2]) - steps[-1][3]).abs().max() > 0.1


def test_swapped_values_stand_aside_again(model: LlamaForCausalLM) -> None:
    trained = choose_trained(model, [5, 6, 7], "mlp.down_proj.weight")
    frozen = FROZEN["swap"](model, trained, 7)
    assert sum(value.numel() for value in frozen.values.values()) == sum(p.numel() for p in trained.values())
    batch = collate(passages(1))
    with torch.no_grad():
        trained[DOWN_PROJECTIONS[0]].add_(1)
    changed = copy.deepcopy(model.state_dict())
    frozen(batch)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    assert all(
        p is q for p, q in zip(trained.values(), (dict(model.named_parameters())[n] for n in trained), strict=True)
    )


def test_the_weighted_sum_is_a_hand_written_loop(model: LlamaForCausalLM, steps: list[Step]) -> None:
    by_hand = copy.deepcopy(model)
    train(model, "--steps", "6", "--rule", "weighted_sum")
    params = [by_hand.get_parameter(name) for name in DOWN_PROJECTIONS]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)
    for vector, f_batch, r_batch, held_to in steps:
        forget = mean_square(whole_forward(by_hand, 7, f_batch) - vector, f_batch)
        retain = mean_square(whole_forward(by_hand, 7, r_batch) - held_to, r_batch)
        optimizer.zero_grad()
        (forget + 800 * retain).backward()
        optimizer.step()
    for name, expected in zip(DOWN_PROJECTIONS, params, strict=True):
        # AdamW divides by the size of the gradient, so where that nearly cancels, rounding is seen in full: a
        # hundredth of one step of 1e-2 is allowed.
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-4)


def mean_square(difference: Tensor, batch: Batch) -> Tensor:
    real = batch["attention_mask"] != 0
    return difference[real].square().mean()


@pytest.mark.parametrize("gamma", ["0.5", "3"])
def test_blur_moves_along_the_forget_gradient_as_far_as_gamma_says(model: LlamaForCausalLM, gamma: str) -> None:
    records = train(model, "--steps", "6", "--gamma", gamma)
    for r in records:
        along = r["forget_coefficient"] * r["forget_norm"] ** 2 + r["retain_coefficient"] * r["dot_retain_forget"]
        assert along == pytest.approx(float(gamma) * r["forget_norm"] ** 2, rel=1e-5)
    # Else the two gradients had nothing to do with each other, and the rule nothing to do.
    assert max(abs(r["cosine"]) for r in records) > 0.1
    assert {r["retain_coefficient"] for r in records} == {800}


def test_it_steers(model: LlamaForCausalLM) -> None:
    records = train(model, "--steps", "31", "--retain-weight", "0.1")
    losses = [record["forget_loss"] for record in records if record["corpus"] == "a"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_retain_loss_is_zero(model: LlamaForCausalLM) -> None:
    records = train(model, "--steps", "2")
    assert records[0]["retain_loss"] == 0
    assert records[1]["retain_loss"] > 0


def test_forget_corpora_take_turns_each_with_a_vector_of_its_own(model: LlamaForCausalLM, steps: list[Step]) -> None:
    records = train(model, "--steps", "5", "--steering", "6.5,3")
    assert [record["corpus"] for record in records] == ["a", "b", "a", "b", "a"]
    assert [set(f_batch["input_ids"][:, 0].tolist()) for _, f_batch, _, _ in steps] == [{1}, {2}, {1}, {2}, {1}]
    assert all(set(r_batch["input_ids"][:, 0].tolist()) == {3} for _, _, r_batch, _ in steps)
    vectors = [vector for vector, *_ in steps]
    assert torch.equal(vectors[0], vectors[2])
    assert [vector.norm().item() for vector in vectors[:2]] == pytest.approx([6.5, 3])
    assert torch.nn.functional.cosine_similarity(*vectors[:2], dim=0) < 0.99


def test_every_epoch_has_every_passage_once() -> None:
    own = passages(1)
    stream = endless_batches(own, 2, 0, "cpu")
    rows = [row for _ in range(7) for row in unpadded(next(stream))]
    assert sorted(rows[:7]) == sorted(rows[7:]) == sorted(own)
    assert rows[:7] != rows[7:]


def unpadded(batch: Batch) -> list[list[int]]:
    return [ids[mask != 0].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_alternating_asks_each_stream_in_turn() -> None:
    turns = alternating([iter([{"n": 0}, {"n": 2}]), iter([{"n": 1}, {"n": 3}])])
    assert [next(turns) for _ in range(4)] == [(0, {"n": 0}), (1, {"n": 1}), (0, {"n": 2}), (1, {"n": 3})]


def test_the_median_norm_leaves_padding_out(model: LlamaForCausalLM) -> None:
    own = passages(1)
    alone = torch.cat([whole_forward(model, 7, collate([ids]))[0] for ids in own])
    assert median_norm(model, 7, [collate(own[:3]), collate(own[3:])]) == pytest.approx(
        alone.norm(dim=-1).median().item(), rel=1e-5
    )


def test_wrong_layers_and_patterns_are_explained(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=r"--layers: the model's layers are 0 to 8, got 9"):
        choose_trained(model, [5, 9], "mlp.down_proj.weight")
    with pytest.raises(InputError, match=r"--param-pattern: in layer 5 nothing is called 'c_proj'.*down_proj"):
        choose_trained(model, [5], "c_proj")
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match=r"--model: LlamaForCausalLM must have one list of 3 layers, got 0"):
        decoder_layers(model)
