"""Rows of examples/unlearn.py: what kind they are, which tokens are predicted, and what wrong ones are told."""

import json
from datetime import date
from pathlib import Path

import pytest
from quickstart_lib.data import load_rows
from shared_lib.encoding import PROMPT, Example
from shared_lib.errors import InputError
from shared_lib.models import Tokenizer, build_tokenizer
from transformers import LlamaConfig
from unlearn_lib.data import hold_out, read_data
from unlearn_lib.options import parse_options
from unlearn_lib.rows import parse_row
from unlearn_lib.sources import read_source
from unlearn_lib.tokens import Encoder, collate

from blur_optim.losses import IDK_ANSWERS

# After each turn a newline, which nobody predicts; a system prompt unless there is one; "tool" is refused.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}Be kind.<eos>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return build_tokenizer(load_rows(None, 4, 0)[:20])


@pytest.fixture(scope="module")
def chatty() -> Tokenizer:
    tokenizer = build_tokenizer(load_rows(None, 4, 0)[:20])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoded(tokenizer: Tokenizer, fields: object, **options: object) -> tuple[str, str]:
    """Prompt and answer as the model reads them."""
    encoder = Encoder(tokenizer, **{"max_length": 512, **options})
    example = encoder(parse_row(("f.jsonl:3", fields), "--forget"))
    return tokenizer.decode(example.prompt), tokenizer.decode(example.answer)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_each_kind_predicts_its_answer_alone(plain: Tokenizer, chatty: Tokenizer) -> None:
    question = {"question": "Who?", "answer": "Me."}
    chat = {"messages": [turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "Who?"), turn("assistant", "Me.")]}
    asked = "Be kind.<eos><user>Who?<eos>\n<assistant>"
    assert encoded(plain, {"text": "One two"}) == ("", "One two<eos>")
    assert encoded(plain, {"prompt": "One", "completion": " two"}) == ("One", " two<eos>")
    assert encoded(plain, question) == (PROMPT.format(question="Who?"), " Me.<eos>")
    assert encoded(chatty, question) == (asked, "Me.<eos>")
    assert encoded(chatty, question, plain_questions=True) == encoded(plain, question)
    before = "Be kind.<eos><user>Hi<eos>\n<assistant>Yo<eos>\n<user>Who?<eos>\n<assistant>"
    assert encoded(chatty, chat) == (before, "Me.<eos>")
    begun = [turn("system", "Be brief."), *chat["messages"][2:]]
    assert encoded(chatty, {"messages": begun})[0] == "<system>Be brief.<eos>\n<user>Who?<eos>\n<assistant>"


def test_a_token_that_begins_every_text_is_not_predicted(plain: Tokenizer) -> None:
    class Beginning:
        chat_template, bos_token_id, eos_token_id = None, 0, 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [0, *plain(text)["input_ids"]]}

    example = Encoder(Beginning(), 512)(parse_row(("f", {"text": "One two"}), "--forget"))
    assert example == Example([0], [*plain("One two")["input_ids"], 1])


def test_other_fields_are_left_alone() -> None:
    row = parse_row(("f", {"prompt": "set 3", "messages": None, "question": "Who?", "answer": "Me.", "id": 7}), "-")
    assert (row.kind, row.prompt, row.answer) == ("question", "Who?", "Me.")


def test_long_rows_are_cut_and_counted(plain: Tokenizer) -> None:
    encoder = Encoder(plain, 9)
    long = encoder(parse_row(("f", {"text": "a b c d e f g h i j k l"}), "--forget"))
    encoder(parse_row(("f", {"text": "a b"}), "--forget"))
    assert (len(long.answer), encoder.cut) == (9, 1)


def test_padding_and_prompts_have_no_label(plain: Tokenizer) -> None:
    batch = collate([Example([5, 6], [7, 1]), Example([], [8, 1])])
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [8, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_dpo_compares_with_what_to_say_instead(plain: Tokenizer) -> None:
    encoder = Encoder(plain, 512)
    question = parse_row(("f", {"question": "Who?", "answer": "Me."}), "--forget")
    told = parse_row(("f", {"prompt": "Who?", "completion": " Me.", "instead": " Nobody."}), "--forget")
    for position, (row, instead) in enumerate([(question, f" {IDK_ANSWERS[0]}"), (told, " Nobody.")]):
        pair = encoder.pair(row, position)
        assert plain.decode(pair["chosen"].answer) == f"{instead}<eos>"
        assert plain.decode(pair["rejected"].answer) == " Me.<eos>"
        assert pair["chosen"].prompt == pair["rejected"].prompt
    assert encoder.pair(question, 1)["chosen"] != encoder.pair(question, 0)["chosen"]


DPO = {
    "text": ({"text": "One two"}, r'f:1: --method dpo needs a prompt, .* got a "text"'),
    "no instead": ({"prompt": "a", "completion": "b"}, r'f:1: with --method dpo, .* the field "instead"'),
}


@pytest.mark.parametrize(("fields", "message"), DPO.values(), ids=DPO.keys())
def test_dpo_refuses_rows_without_another_answer(fields: object, message: str, plain: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        Encoder(plain, 512).pair(parse_row(("f:1", fields), "--forget"), 0)


CHAT = [turn("user", "Who?"), turn("assistant", "Me.")]
WRONG = {
    "no object": ([1], r"must be one JSON object, got \[1\]"),
    "no field": ({"a": 1}, r'must have the field "text", or "prompt" and "completion", or .*, got \["a"\]'),
    "two kinds": ({"text": "a", "messages": CHAT}, r'of one kind, got the fields of 2: "text", or "messages". Leave'),
    "half a pair": ({"prompt": "a"}, r'field "completion" must be a non-empty string, got no such field'),
    "half a question": ({"answer": "a"}, r'field "question" must be a non-empty string, got no such field'),
    "a number": ({"text": 7}, r'field "text" must be a non-empty string, got 7'),
    "empty": ({"question": "a", "answer": " "}, r'field "answer" must be a non-empty string, got " "'),
    "instead": ({"question": "a", "answer": "b", "instead": 3}, r'field "instead" must be a non-empty string, got 3'),
    "no list": ({"messages": "hi"}, r'field "messages" must be a list of two messages or more, got "hi"'),
    "one message": ({"messages": CHAT[1:]}, r'field "messages" must be a list of two messages or more'),
    "no message": ({"messages": [1, CHAT[1]]}, r'messages\[0\] must be an object with "role" and "content", got 1'),
    "role": ({"messages": [turn("me", "a"), CHAT[1]]}, r'messages\[0\]: field "role" must be one of .*, got "me"'),
    "no content": ({"messages": [{"role": "user"}, CHAT[1]]}, r'messages\[0\]: field "content" must be .* no such'),
    "unanswered": ({"messages": CHAT[:1] * 2}, r"the last message must be the assistant's, .*, got the role \"user\""),
    "refused": ({"messages": [turn("tool", "a"), CHAT[1]]}, r"the chat template of --model refuses .*: no tools"),
    "too long": ({"question": "a b " * 99, "answer": "c"}, r"within --max-length, 64 tokens, got \d+ tokens of prompt"),
    "one token": ({"prompt": "a " * 99, "completion": "c"}, r"a token to predict must lie within --max-length"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_row_is_named(fields: object, message: str, chatty: Tokenizer) -> None:
    with pytest.raises(InputError, match=rf"^--forget: f.jsonl:3: .*{message}"):
        encoded(chatty, fields, max_length=64)


def test_messages_need_a_template(plain: Tokenizer, chatty: Tokenizer) -> None:
    with pytest.raises(InputError, match=r'f.jsonl:3: "messages" need a tokenizer with a chat template'):
        encoded(plain, {"messages": CHAT})
    chatty.chat_template, kept = "{{ messages | length }}", chatty.chat_template
    try:
        with pytest.raises(InputError, match=r"f.jsonl:3: the chat template of --model must begin an answered chat"):
            encoded(chatty, {"messages": CHAT})
    finally:
        chatty.chat_template = kept


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{')
    with pytest.raises(InputError, match=r"^--retain: .*x.jsonl:2: the line must be one JSON object. Expecting"):
        read_source("--retain", str(path))
    path.write_text("\n")
    with pytest.raises(InputError, match=r"^--retain: .*x.jsonl must hold at least one row, got none"):
        read_source("--retain", str(path))


# datasets leaves a file open where it reads a folder.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_data_set_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": f"in {split}"}))
    first, second = read_source("--forget", "owner/name"), read_source("--forget", "owner/name::test")
    assert first.records == [("owner/name, row 1", {"text": "in train"})]
    assert second.records == [("owner/name::test, row 1", {"text": "in test"})]
    assert first.is_hub
    assert first.sha256 != second.sha256
    with pytest.raises(InputError, match=r"^--forget: owner/name::dev is no file here, and loading .* failed"):
        read_source("--forget", "owner/name::dev")


def test_config_and_split_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"text": "x"}])
    read_source("--forget", "locuslab/TOFU:forget01")
    read_source("--forget", "locuslab/TOFU:forget01:test")
    assert asked == [
        (("locuslab/TOFU", "forget01"), {"split": "train"}),
        (("locuslab/TOFU", "forget01"), {"split": "test"}),
    ]


def test_what_is_held_out_is_not_trained_on() -> None:
    examples = [Example([i], [i]) for i in range(20)]
    kept, held_out = hold_out(examples, 0.25, seed=0)
    assert len(held_out) == 5
    assert sorted(kept + held_out) == examples
    assert kept == sorted(kept)
    assert hold_out(examples, 0.25, seed=1)[1] != held_out
    assert hold_out(examples, 0, seed=0) == (examples, [])
    with pytest.raises(InputError, match=r"--eval-fraction: .* must be left to train on, got 1 rows in all"):
        hold_out(examples[:1], 0.1, seed=0)


def test_a_row_is_either_forgotten_or_kept(tmp_path: Path, plain: Tokenizer) -> None:
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    forget.write_text('{"text": "one two"}\n{"text": "three four"}')
    retain.write_text('{"text": "three four"}\n{"text": "five six"}')
    options = parse_options(["--model", "x", "--forget", str(forget), "--retain", str(retain)])
    with pytest.raises(InputError, match=r"--forget: .*forget.jsonl:2: a row must not be in --retain too, .* 1 of 2"):
        read_data(options, Encoder(plain, 64))


def test_tokens_that_the_model_does_not_know_are_named(plain: Tokenizer) -> None:
    config = LlamaConfig(vocab_size=len(plain) - 1)
    last = plain.decode([len(plain) - 1])
    encoder = Encoder(plain, 512, config=config)
    with pytest.raises(
        InputError, match=rf"--forget: f.jsonl:3: .* 0 to {len(plain) - 2}, got {len(plain) - 1} .*resize"
    ):
        encoder(parse_row(("f.jsonl:3", {"text": last}), "--forget"))
    encoder(parse_row(("f.jsonl:3", {"text": "a"}), "--forget"))


DATED = "Today is {{ strftime_now('%d %b %Y, %H h') }}.<eos>" + TEMPLATE


def test_the_date_in_a_template_is_the_runs(plain: Tokenizer, chatty: Tokenizer) -> None:
    tokenizer = build_tokenizer(load_rows(None, 4, 0)[:20])
    tokenizer.chat_template = DATED
    question = {"question": "Who?", "answer": "Me."}
    asked, _ = encoded(tokenizer, question, day=date(2026, 2, 3))
    assert asked.startswith("Today is 03 Feb 2026, 00 h.<eos>")
    assert "Today" not in encoded(chatty, question, day=date(2026, 2, 3))[0]
