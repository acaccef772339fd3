"""Let a language model forget one file of text and keep another, without writing code.

    python examples/unlearn.py --model NAME --forget forget.jsonl --retain retain.jsonl

What matters is `unlearn`; each concept behind it has a small file in unlearn_lib: sources, rows, tokens, data, models,
training, evaluation, run_folder, report, card.
"""

if __name__ == "__main__":  # Before the slow imports: Ctrl-C, --help, wrong options and missing files are met at once.
    import sys

    from shared_lib.errors import leave_quietly_while_importing
    from unlearn_lib import processes
    from unlearn_lib.options import parse_options
    from unlearn_lib.sources import check_files

    leave_quietly_while_importing()
    if processes.rank() == 0:
        early = processes.run(lambda: check_files(parse_options()))
        if early:
            sys.exit(early)
        leave_quietly_while_importing()

import argparse
import json
import sys
from datetime import date
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console
from shared_lib.console import make_console, make_progress
from shared_lib.errors import InputError
from shared_lib.models import Tokenizer, quiet_transformers
from unlearn_lib import processes
from unlearn_lib.card import make_card
from unlearn_lib.data import Data, read_data
from unlearn_lib.evaluation import Scores, score_sets
from unlearn_lib.models import add_adapter, finish, load_config, load_model, load_tokenizer, write
from unlearn_lib.options import as_settings, parse_options
from unlearn_lib.report import command, make_results, make_table, tell_stop
from unlearn_lib.run_folder import RunFolder, first_day, write_json
from unlearn_lib.sources import check_files
from unlearn_lib.tokens import Encoder
from unlearn_lib.training import (
    BLURTrainingArguments,
    Logbook,
    count_steps,
    explaining,
    make_arguments,
    make_trainer,
    stop_checkpointing,
    train,
)


def unlearn(
    options: argparse.Namespace,
    args: BLURTrainingArguments,
    tokenizer: Tokenizer,
    data: Data,
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Score, unlearn, score again, save. Every process calls this; the first one writes.

    Raises:
        TrainingError, InputError: memory did not suffice, or the run can't go on from what is in its folder.
    """
    speaks = args.process_index == 0
    model = load_model(options, args.device)
    before = score_before(model, options, tokenizer, data, folder, args)
    if options.lora:
        model = add_adapter(model, options)
    with make_progress(console) as progress, explaining(options):
        trainer = make_trainer(model, args, data, Logbook(folder.log, progress, speaks), options)
        checkpoint = folder.checkpoint()
        if checkpoint:
            console.print(f"Going on from {checkpoint}", soft_wrap=True)
        train(trainer, checkpoint)
    if options.gradient_checkpointing:
        stop_checkpointing(model)
    model = finish(model, options)
    console.print("Scoring the model after")
    after = score_sets(model, tokenizer, data.sets, options)
    results = make_results(folder.facts, before, after, trainer.state.log_history)
    if speaks:
        write(model, tokenizer, folder.model, make_card(results, data.hub_names))
        write_json(folder.results, results)  # Last: it says that the run is finished.
    return results


def score_before(
    model: Any,
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    data: Data,
    folder: RunFolder,
    args: BLURTrainingArguments,
) -> dict[str, Scores]:
    """Return the scores of the model as it was: computed at the first start, read at the next."""
    if folder.before.is_file():
        stored = json.loads(folder.before.read_text(encoding="utf-8"))
        before = {name: Scores(**scores) for name, scores in stored.items()}
    else:
        before = score_sets(model, tokenizer, data.sets, options)
    args.distributed_state.wait_for_everyone()
    if args.process_index == 0:
        write_json(folder.before, {name: scores._asdict() for name, scores in before.items()})
    return before


def prepare(options: argparse.Namespace, args: BLURTrainingArguments, folder: RunFolder) -> bool:
    """Claim the folder; tell whether there is anything left to do.

    Raises:
        InputError: it holds another run, or not all processes have read the same.
    """
    folder.check(options.overwrite)
    if any(facts["data"] != folder.facts["data"] for facts in gather_object([folder.facts])):
        raise InputError("--forget, --retain and --eval must hold the same rows for all processes, and do not.")
    is_finished = folder.is_finished and not options.overwrite
    args.distributed_state.wait_for_everyone()
    if args.process_index == 0 and not (is_finished or options.dry_run):
        folder.claim(options.overwrite)
    args.distributed_state.wait_for_everyone()
    return not is_finished


def tell_data(console: Console, data: Data) -> None:
    """Say what was read."""
    for option, fact in data.facts.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in fact["kinds"].items())
        cut = f"; {fact['cut']} cut by --max-length" if fact["cut"] else ""
        held_out = f"; {fact['held_out']} held out" if fact.get("held_out") else ""
        console.print(
            f"{option}: {fact['source']}: {fact['rows']} rows ({kinds}), the longest {fact['longest']} tokens"
            f"{cut}{held_out}",
            soft_wrap=True,
            markup=False,
        )


def tell_plan(console: Console, tokenizer: Tokenizer, data: Data, options: argparse.Namespace) -> None:
    """Say what would be done, with the first row to forget as the model reads it."""
    first = data.sets["forget"][0]
    console.print("The first row to forget, up to its answer, and the answer:")
    for ids in first:
        console.print(repr(tokenizer.decode(ids)), soft_wrap=True, markup=False)
    for name, value in as_settings(options).items():
        console.print(f"  {name}: {value}", soft_wrap=True, markup=False)
    console.print(f"{count_steps(options, len(data.forget), processes.count())} steps would be taken.")
    console.print("Dry run: no weights were loaded, nothing was written.")


def tell_metric(console: Console, options: argparse.Namespace) -> None:
    """Say what the metric of the retain loss needs that was not given."""
    if options.stop_at is None:
        console.print(
            "--metric retain does not stop by itself: --stop-at FILE ends the run where the rows to forget are as "
            "improbable as rows never seen.",
            soft_wrap=True,
        )
    if options.lora and not options.lora_embeddings:
        console.print(
            "--metric retain gains little with adapters alone (docs/results/unlearning/reading.md): --lora-embeddings "
            "trains the token embeddings beside them.",
            soft_wrap=True,
        )


def main() -> None:
    """Read everything, unlearn, tell."""
    options = parse_options()
    check_files(options)
    quiet_transformers()
    console = make_console()
    console.quiet = processes.rank() > 0
    config, tokenizer = load_config(options), load_tokenizer(options)
    day = date.today() if options.overwrite else first_day(options.out)
    data = read_data(options, Encoder(tokenizer, options.max_length, options.plain_questions, config, day))
    facts = {"settings": as_settings(options), "data": data.facts, "processes": processes.count(), "day": str(day)}
    folder = RunFolder(options.out, facts)
    args = make_arguments(options, folder.training)
    tell_data(console, data)
    if options.metric == "retain":
        tell_metric(console, options)
    something_to_do = prepare(options, args, folder)
    if options.dry_run:
        tell_plan(console, tokenizer, data, options)
        return
    if not something_to_do:
        console.print(f"This run is finished: {folder.model}. --overwrite begins it anew.", soft_wrap=True)
        console.print(make_table(json.loads(folder.results.read_text(encoding="utf-8"))))
        return
    try:
        results = unlearn(options, args, tokenizer, data, folder, console)
    except InputError:
        if processes.rank() == 0:
            folder.release()
        raise
    except KeyboardInterrupt:
        at = folder.checkpoint()
        where = f"goes on from {at.name}" if at else "begins anew, for there is no checkpoint yet"
        console.print(f"The same command {where}: {command()}", soft_wrap=True, markup=False)
        raise
    if processes.rank() == 0 and not options.keep_checkpoints:
        folder.drop_checkpoints()
    console.print(make_table(results))
    if results["stop"] is not None:
        console.print(tell_stop(results), soft_wrap=True)
    console.print(f"Model: {folder.model}, numbers: {folder.results}, log: {folder.log}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(processes.run(main))
