"""StopAtHoldout: what it measures, where it ends a run, and that a resumed run ends there too."""

import re
from pathlib import Path

import pytest
import torch
from blur_trainer import trainer as blur_trainer
from tiny import collate, rows, tiny_llama

pytest.importorskip("transformers", reason="transformers is not installed")

from blur_optim.integrations.stopping import StopAtHoldout, load_ended, reached_at

FORGET, RETAIN, HOLDOUT = rows(6, 1), rows(8, 2), rows(5, 3)


@pytest.fixture(scope="module")
def knowing():
    """Weights of a model that knows what is to be forgotten and kept, and not the others."""
    torch.manual_seed(0)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate([*FORGET, *RETAIN])
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def make(folder, weights, *, every=2, stop=True, forget=FORGET, holdout=HOLDOUT, **changes):
    model = tiny_llama()
    model.load_state_dict(weights)
    options = {"max_steps": 30, "learning_rate": 3e-3, "forget_loss": "ga", "per_device_eval_batch_size": 4}
    made = blur_trainer(folder, model, forget, RETAIN, **{**options, **changes})
    if stop:
        made.add_callback(StopAtHoldout(made, holdout, every=every))
    return made


def log_prob(model, items):
    """Per token, from the model's own loss, which is a mean over tokens."""
    model.eval()
    with torch.no_grad():
        return -model(**collate(items)).loss.item()


def checks(made):
    return [log for log in made.state.log_history if "stop_forget_log_prob" in log]


def test_it_ends_a_run_at_the_first_check_below_the_level(tmp_path, knowing):
    made = make(tmp_path, knowing)
    level = log_prob(made.model, HOLDOUT)
    assert log_prob(made.model, FORGET) > level + 1
    made.train()
    step = made.state.global_step
    assert 2 < step < 30
    assert step % 2 == 0
    found = checks(made)
    assert [log["step"] for log in found] == list(range(2, step + 1, 2))
    assert {log["stop_holdout_log_prob"] for log in found} == {found[0]["stop_holdout_log_prob"]}
    assert found[0]["stop_holdout_log_prob"] == pytest.approx(level, rel=1e-5)
    assert all(log["stop_forget_log_prob"] > level for log in found[:-1])
    assert found[-1]["stop_forget_log_prob"] <= level
    assert found[-1]["stop_forget_log_prob"] == pytest.approx(log_prob(made.model, FORGET), rel=1e-5)


def test_looking_changes_nothing(tmp_path, knowing):
    looked, plain = make(tmp_path, knowing, max_steps=2, every=1), make(tmp_path, knowing, max_steps=2, stop=False)
    looked.train()
    plain.train()
    assert all(torch.equal(p, q) for p, q in zip(looked.model.parameters(), plain.model.parameters(), strict=True))
    assert len(checks(looked)) == 2


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, knowing):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make(tmp_path / "whole", knowing, **options)
    whole.train()
    end = whole.state.global_step
    # One checkpoint from before the end, and the one that ends it.
    before = min(int(path.name.rpartition("-")[2]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    last = tmp_path / "whole" / f"checkpoint-{end}"
    assert before < end
    assert reached_at(last) == end
    assert reached_at(tmp_path / "whole" / f"checkpoint-{before}") is None
    resumed = make(tmp_path / "resumed", {n: p * 0 for n, p in knowing.items()}, **options)
    resumed.args.reference_file = None
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{before}"))
    assert resumed.state.global_step == end
    assert checks(resumed) == checks(whole)
    assert all(torch.equal(p, q) for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    # From the last one there is nothing left to do.
    ended = make(tmp_path / "ended", knowing, **options)
    with pytest.raises(RuntimeError, match=rf"has ended at step {end}"):
        ended.train(resume_from_checkpoint=str(last))
    load_ended(ended, last)
    assert all(torch.equal(p, q) for p, q in zip(ended.model.parameters(), whole.model.parameters(), strict=True))
    assert ended.state.log_history == whole.state.log_history[: len(ended.state.log_history)]
    assert checks(ended) == checks(whole)


def test_of_two_answers_the_one_to_forget_counts(tmp_path, knowing):
    pairs = [{"chosen": c, "rejected": r} for c, r in zip(rows(6, 7), FORGET, strict=True)]
    made = make(tmp_path, knowing, forget=pairs, forget_loss="dpo", max_steps=2)
    made.train()
    assert checks(made)[0]["stop_forget_log_prob"] == pytest.approx(log_prob(made.model, FORGET), rel=1e-5)


def test_a_part_of_the_rows(tmp_path, knowing):
    made = make(tmp_path, knowing, stop=False)
    callback = StopAtHoldout(made, HOLDOUT, rows=3)
    assert callback.holdout == [HOLDOUT[0], HOLDOUT[1], HOLDOUT[3]]
    assert callback.forget == FORGET[::2]
    made.model.train()
    assert callback.log_prob(callback.forget) == pytest.approx(log_prob(made.model, FORGET[::2]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, r"`every` must be at least 1, got 0"),
        ({"rows": 0}, r"`rows` must be at least 1, got 0"),
        ({"holdout": []}, r"`holdout` must hold at least one row"),
    ],
    ids=["every", "rows", "holdout"],
)
def test_what_is_refused(tmp_path, options, match):
    made = blur_trainer(tmp_path)
    with pytest.raises(ValueError, match=match):
        StopAtHoldout(made, **{"holdout": HOLDOUT, **options})


def test_rows_that_the_model_knows_are_no_level(tmp_path, knowing):
    before = [value.clone() for value in knowing.values()]
    made = make(tmp_path, knowing, holdout=FORGET)
    with pytest.raises(ValueError, match=r"`holdout` must be less probable than the rows to forget, got -\d"):
        made.train()
    assert all(torch.equal(p, b) for p, b in zip(made.model.state_dict().values(), before, strict=True))


def test_a_checkpoint_without_a_level(tmp_path, knowing):
    options = {"save_strategy": "steps", "save_steps": 2}
    make(tmp_path / "plain", knowing, stop=False, max_steps=4, **options).train()
    with pytest.raises(RuntimeError, match=r"a run with StopAtHoldout.* got one of step 2 without"):
        make(tmp_path / "more", knowing, **options).train(
            resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2")
        )


def test_each_process_has_its_share(tmp_path, knowing, monkeypatch):
    """As many batches on each, rows that are there twice count once: what the processes have adds up to the whole."""
    made = make(tmp_path, knowing, stop=False)
    callback = StopAtHoldout(made, HOLDOUT)
    sums, batches = torch.zeros(2, dtype=torch.float64), set()
    for rank in range(3):
        monkeypatch.setattr(type(made.args), "process_index", rank)
        monkeypatch.setattr(type(made.args), "world_size", 3)
        parts = [callback._sums(made.model.eval(), *part) for part in callback._batches(HOLDOUT)]
        sums += sum(parts).detach()
        batches.add(len(parts))
    assert len(batches) == 1
    assert (sums[0] / sums[1]).item() == pytest.approx(log_prob(made.model, HOLDOUT), rel=1e-5)


# The Trainer looks for a GPU to pin memory for.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_documented_callback(tmp_path, knowing, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "unlearn.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- test: stopping -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    model = tiny_llama()
    model.load_state_dict(knowing)
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "forget_rows": FORGET, "retain_rows": RETAIN, "holdout_rows": HOLDOUT, "collator": collate}
    exec(compile(code, "docs/unlearn.md", "exec"), names)
    assert checks(names["trainer"])
