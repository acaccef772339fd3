"""The suites: every metric in its place, left out where its rows are missing, and resumable."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import Example, encode, encode_rows
from shared_lib.models import Tokenizer
from transformers import LlamaForCausalLM
from unlearning.metrics import measure
from unlearning.metrics.choices import Question, accuracy, text_choices
from unlearning.metrics.fluency import ngram_entropy, perplexity, repetition_rate
from unlearning.metrics.generation import answer_questions
from unlearning.metrics.likelihood import log_prob_and_probability, row_log_probs, token_scores
from unlearning.metrics.memorization import exact_memorization, extraction_strength, verbatim_memorization
from unlearning.metrics.parts import Parts, fingerprint
from unlearning.metrics.privacy import auc, membership_scores, privacy_leakage
from unlearning.metrics.rouge import rouge_l
from unlearning.metrics.suites import (
    MuseEvaluation,
    TofuEvaluation,
    TofuReference,
    choice_scores,
    muse_scores,
    tofu_scores,
)
from unlearning.metrics.tofu import (
    AnswerLogProbs,
    ChoiceRow,
    choice_probability,
    forget_quality,
    log_truth_ratio,
    model_utility,
    truth_balance,
    truth_told,
)
from unlearning_metrics_models import HOLDOUT, ROWS, make_llama, make_tokenizer, make_trained_llama

CHOICES = [ChoiceRow.from_row(row) for row in ROWS]
DATA = TofuEvaluation(ROWS[:2], ROWS[2:], CHOICES[:3], CHOICES[1:], HOLDOUT)
PASSAGES = [Example([], [10, 11, 12, 13, 14, 15, 16, 17]), Example([], [20, 30, 40, 50, 60, 70])]
UNSEEN = [Example([], [33, 34, 35, 36]), Example([], [41, 43, 45, 47, 49])]
BOOK = MuseEvaluation(PASSAGES, PASSAGES[1:], UNSEEN, ROWS[:3], ROWS[3:])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return make_llama(tokenizer)


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return make_trained_llama(tokenizer, [*encode_rows(tokenizer, ROWS), *PASSAGES])


def answers(model: LlamaForCausalLM, tokenizer: Tokenizer, question: str, texts: list[str]) -> AnswerLogProbs:
    true, *wrong = row_log_probs(model, [encode(tokenizer, question, text) for text in texts]).tolist()
    return AnswerLogProbs(true, wrong)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Padding changes float32 sums in their last bits; generated texts and ranks stay the same.
close = pytest.approx


def test_every_tofu_metric_is_what_it_says(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    own = tofu_scores(untrained, tokenizer, DATA, judge=untrained)
    retrained = TofuReference([-1.0, 0.5, 3.0], {"min_k": 0.25})
    scores = tofu_scores(untrained, tokenizer, DATA, retrained, judge=untrained).scores
    expected = {}
    for name, rows in (("forget", DATA.forget), ("retain", DATA.retain)):
        known = log_prob_and_probability(untrained, encode_rows(tokenizer, rows))
        said = answer_questions(untrained, tokenizer, rows)
        ratios = [
            log_truth_ratio(answers(untrained, tokenizer, r.question, [r.paraphrased_answer, *r.perturbed_answers]))
            for r in rows
        ]
        # Without the end of the text, which is no part of what is memorised.
        cut = [Example(e.prompt, e.answer[:-1]) for e in encode_rows(tokenizer, rows)]
        correct = [s.correct for s in token_scores(untrained, cut)]
        prefix = "" if name == "forget" else "retain_"
        expected |= {
            f"{name}_log_prob": known["log_prob"],
            f"{name}_probability": known["probability"],
            f"{name}_rouge_l": mean(rouge_l([r.answer for r in rows], said, "recall", stem=True)),
            f"{name}_truth_ratio": truth_balance(ratios) if name == "forget" else truth_told(ratios),
            f"{name}_fluency_entropy": mean([ngram_entropy(text) for text in said]),
            f"{name}_repetition": mean([repetition_rate(text) for text in said]),
            f"{name}_fluency_perplexity": perplexity(untrained, tokenizer, said),
            f"{prefix}exact_memorization": mean([exact_memorization(c) for c in correct]),
            f"{prefix}extraction_strength": mean([extraction_strength(c) for c in correct]),
        }
        if name == "forget":
            assert own.reference.log_truth_ratios == close(ratios, rel=1e-4)
            expected["forget_quality"] = forget_quality(ratios, retrained.log_truth_ratios)
    for name, rows in (("real_authors", DATA.real_authors), ("world_facts", DATA.world_facts)):
        asked = [answers(untrained, tokenizer, r.question, [r.answer, *r.wrong_answers]) for r in rows]
        said = answer_questions(untrained, tokenizer, rows)
        expected |= {
            f"{name}_probability": mean([choice_probability(a) for a in asked]),
            f"{name}_truth_ratio": truth_told([log_truth_ratio(a) for a in asked]),
            f"{name}_rouge_l": mean(rouge_l([r.answer for r in rows], said, "recall", stem=True)),
        }
    members, others = (
        [
            membership_scores(token_scores(untrained, [Example(e.prompt, e.answer[:-1])], vocabulary=True)[0], r.answer)
            for e, r in zip(encode_rows(tokenizer, rows), rows, strict=True)
        ]
        for rows in (DATA.forget, DATA.holdout)
    )
    for attack in ("loss", "min_k", "min_k_plus", "zlib"):
        expected[f"mia_{attack}_auc"] = auc([m[attack] for m in members], [o[attack] for o in others])
    expected["privleak"] = privacy_leakage(expected["mia_min_k_auc"], 0.25)
    terms = [
        f"{p}_{m}" for p in ("retain", "real_authors", "world_facts") for m in ("probability", "rouge_l", "truth_ratio")
    ]
    expected["model_utility"] = model_utility([expected[term] for term in terms])
    assert own.utility_over == tuple(terms)
    assert scores == close(expected, rel=1e-3)
    assert own.scores == {name: value for name, value in scores.items() if name not in ("forget_quality", "privleak")}


def test_a_model_that_memorised_scores_one(trained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    scores = tofu_scores(trained, tokenizer, DATA).scores
    for name in ("forget_rouge_l", "retain_rouge_l", "exact_memorization", "extraction_strength", "mia_loss_auc"):
        assert scores[name] == 1
    assert scores["forget_probability"] > 0.98
    assert scores["real_authors_probability"] > 0.9
    assert scores["forget_repetition"] == 0


def test_a_model_is_as_good_as_itself(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    data = replace(DATA, holdout=[*HOLDOUT, *ROWS[:2]])  # some like the rows to forget: an AUC of 1 has no leakage
    first = tofu_scores(untrained, tokenizer, data)
    cached = TofuReference.from_json(json.loads(json.dumps(first.reference.to_json())))
    assert cached == first.reference
    scores = tofu_scores(untrained, tokenizer, data, cached).scores
    assert scores["forget_quality"] == 1
    assert scores["privleak"] == 0


def test_the_order_of_the_rows_does_not_matter(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    turned = TofuEvaluation(*(list(rows)[::-1] for rows in vars(DATA).values()))
    assert tofu_scores(untrained, tokenizer, turned).scores == close(
        tofu_scores(untrained, tokenizer, DATA).scores, rel=1e-3
    )


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (TofuEvaluation(), set()),
        (TofuEvaluation(holdout=HOLDOUT), set()),
        (
            TofuEvaluation(forget=HOLDOUT),  # neither paraphrases nor wrong answers
            {"forget_log_prob", "forget_probability", "extraction_strength", "exact_memorization"},
        ),
        (
            TofuEvaluation(world_facts=CHOICES),
            {"world_facts_probability", "world_facts_truth_ratio", "partial_utility"},
        ),
    ],
)
def test_metrics_without_rows_are_left_out(
    untrained: LlamaForCausalLM, tokenizer: Tokenizer, data: TofuEvaluation, names: set[str]
) -> None:
    result = tofu_scores(untrained, tokenizer, data, TofuReference([1.0], {"min_k": 0.5}), limit_generated=0)
    assert set(result.scores) == names
    assert set(result.utility_over) == {n for n in names if n.startswith("world_facts")}


def test_answers_are_generated_for_a_few_rows(
    untrained: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(measure, "answer_questions", lambda m, t, rows, **_: asked.append(rows) or ["x"] * len(rows))
    tofu_scores(untrained, tokenizer, TofuEvaluation(forget=ROWS, world_facts=CHOICES), limit_generated=2)
    assert [[row.question for row in rows] for rows in asked] == [[ROWS[0].question, ROWS[2].question]] * 2


def test_a_diverged_model_has_none(tokenizer: Tokenizer) -> None:
    model = make_llama(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    scores = tofu_scores(model, tokenizer, DATA, TofuReference([1.0], {"min_k": 0.5}), limit_generated=0).scores
    nothing = {name for name, value in scores.items() if value is None}
    assert {"forget_log_prob", "forget_quality", "partial_utility", "mia_loss_auc", "privleak"} <= nothing
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("suite", ["tofu", "muse"])
def test_an_interrupted_suite_goes_on(
    untrained: LlamaForCausalLM, tokenizer: Tokenizer, tmp_path: Path, suite: str
) -> None:
    def score(progress=None):
        parts = tmp_path / "job" / "parts.json"
        if suite == "tofu":
            return tofu_scores(untrained, tokenizer, DATA, parts=parts, progress=progress)
        return muse_scores(untrained, tokenizer, BOOK, prefix=2, parts=parts, progress=progress)

    seen: list[str] = []

    def interrupt(part: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if part not in seen:
            seen.append(part)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupt)
    again: list[str] = []
    result = score(lambda part, done, total: again.append(part))
    assert not set(again) & set(seen[:3])
    assert seen[3] in again
    assert (
        result.scores
        == (
            tofu_scores(untrained, tokenizer, DATA)
            if suite == "tofu"
            else muse_scores(untrained, tokenizer, BOOK, prefix=2)
        ).scores
    )
    final: list[str] = []
    assert score(lambda part, done, total: final.append(part)) == result
    assert final == []
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["parts.json"]


def test_parts_of_another_model_or_of_other_rows_are_not_taken(
    untrained: LlamaForCausalLM, trained: LlamaForCausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "parts.json"
    tofu_scores(untrained, tokenizer, DATA, parts=path)
    assert tofu_scores(trained, tokenizer, DATA, parts=path) == tofu_scores(trained, tokenizer, DATA)
    fewer = TofuEvaluation(forget=ROWS[:1])
    assert tofu_scores(trained, tokenizer, fewer, parts=path) == tofu_scores(trained, tokenizer, fewer)


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "a", "par', b"{}", b"[]", b"\xff"])
def test_a_broken_file_of_parts_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "parts.json"
    path.write_bytes(content)
    assert Parts(path, "a").get("x", lambda: [1.5]) == [1.5]
    assert Parts(path, "a").get("x", lambda: [2.5]) == [1.5]
    assert Parts(path, "b").get("x", lambda: [2.5]) == [2.5]


def test_the_fingerprint_tells_weights_apart(tokenizer: Tokenizer) -> None:
    model = make_llama(tokenizer)
    before = fingerprint(model, "a")
    assert fingerprint(make_llama(tokenizer), "a") == before != fingerprint(model, "b")
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert fingerprint(model, "a") != before
    assert fingerprint(model.bfloat16(), "a") != before


def test_every_muse_metric_is_what_it_says(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    scores, aucs = muse_scores(untrained, tokenizer, BOOK, {"min_k": 0.75}, prefix=2, room=3, judge=untrained)
    expected = {}
    for name, passages in (("forget", BOOK.forget), ("retain", BOOK.retain), ("holdout", BOOK.holdout)):
        known = log_prob_and_probability(untrained, passages)
        expected |= {f"{name}_log_prob": known["log_prob"], f"{name}_probability": known["probability"]}
        if name != "holdout":
            prefix = "" if name == "forget" else "retain_"
            correct = [s.correct for s in token_scores(untrained, passages)]
            questions = BOOK.forget_questions if name == "forget" else BOOK.retain_questions
            said = answer_questions(untrained, tokenizer, questions)
            expected |= {
                f"{prefix}exact_memorization": mean([exact_memorization(c) for c in correct]),
                f"{prefix}extraction_strength": mean([extraction_strength(c) for c in correct]),
                f"{name}_verbmem": mean(verbatim_memorization(untrained, tokenizer, passages, 2, room=3)),
                f"{name}_knowmem": mean(rouge_l([q.answer for q in questions], said, "f1", stem=False)),
                f"{name}_fluency_entropy": mean([ngram_entropy(text) for text in said]),
                f"{name}_repetition": mean([repetition_rate(text) for text in said]),
                f"{name}_fluency_perplexity": perplexity(untrained, tokenizer, said),
            }
    members, others = (
        [
            membership_scores(s, tokenizer.decode(p.answer))
            for s, p in zip(token_scores(untrained, passages, vocabulary=True), passages, strict=True)
        ]
        for passages in (BOOK.forget, BOOK.holdout)
    )
    for attack in ("loss", "min_k", "min_k_plus", "zlib"):
        expected[f"mia_{attack}_auc"] = auc([m[attack] for m in members], [o[attack] for o in others])
        assert aucs[attack] == expected[f"mia_{attack}_auc"]
    expected["privleak"] = privacy_leakage(expected["mia_min_k_auc"], 0.75)
    assert scores == close(expected, rel=1e-3)


def test_a_model_that_memorised_the_book(trained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    scores = muse_scores(trained, tokenizer, BOOK, {"min_k": 0.5}, prefix=2).scores
    for name in ("forget_verbmem", "retain_verbmem", "forget_knowmem", "exact_memorization", "mia_min_k_auc"):
        assert scores[name] == 1
    assert scores["privleak"] == -100


def test_muse_without_rows(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    assert muse_scores(untrained, tokenizer, MuseEvaluation(), prefix=2) == ({}, {})
    scores, aucs = muse_scores(untrained, tokenizer, MuseEvaluation(holdout=UNSEEN), {"min_k": 0.5}, prefix=2)
    assert set(scores) == {"holdout_log_prob", "holdout_probability"}
    assert aucs == {}


def test_choice_scores(trained: LlamaForCausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    easy = [Question(row.question, (*row.perturbed_answers, row.answer), 2) for row in ROWS]
    hard = [Question(q.question, q.choices, 0) for q in easy]
    asked = {"forget": easy, "retain": [*easy, *hard], "none": []}
    scores = choice_scores(trained, tokenizer, asked, letters=False, parts=tmp_path / "parts.json")
    assert scores == {
        "forget_text_accuracy": 1,
        "forget_chance": close(1 / 3),
        "retain_text_accuracy": 1 / 2,
        "retain_chance": close(1 / 3),
    }
    assert accuracy(text_choices(trained, tokenizer, easy), easy) == 1
    lettered = choice_scores(trained, tokenizer, {"forget": easy}, subjects={"forget": "Ada"})
    assert set(lettered) == {"forget_text_accuracy", "forget_letter_accuracy", "forget_chance"}
