"""Let a causal language model forget what some corpora are about: BLUR-RMU, as in the experiments on WMDP.

    python examples/wmdp_rmu.py --model NAME --forget bio.jsonl --forget cyber.jsonl --retain wiki.txt

What matters is `train`; each concept behind it has a small file in wmdp_rmu_lib: corpora, layers, perplexity,
questions, harness (lm-eval), report. docs/wmdp_rmu.md has the commands of the paper's setting.
"""

if __name__ == "__main__":  # Before the slow imports: --help and wrong options are met at once.
    import sys

    from shared_lib.errors import leave_quietly_while_importing, run
    from wmdp_rmu_lib.options import check_sources, parse_options

    leave_quietly_while_importing()
    _options = parse_options()
    if code := run(lambda: check_sources(_options)):
        sys.exit(code)
    leave_quietly_while_importing()

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from shared_lib.console import make_console, make_progress
from shared_lib.errors import InputError, run
from shared_lib.models import (
    Model,
    Tokenizer,
    check_device,
    check_vocabulary,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from torch import Tensor, nn
from wmdp_rmu_lib.corpora import Batch, Corpus, alternating, endless_batches, read_corpus
from wmdp_rmu_lib.harness import Harness
from wmdp_rmu_lib.layers import FROZEN, activations, check_layers, choose_trained, decoder_layers, median_norm
from wmdp_rmu_lib.options import check_sources, parse_options
from wmdp_rmu_lib.perplexity import batches_of, perplexity
from wmdp_rmu_lib.questions import Question, accuracy, check_fit, read_questions
from wmdp_rmu_lib.report import Measures, as_line, export, print_table, write_results

from blur_optim import BLUR
from blur_optim.losses import rmu_forget_loss, rmu_retain_loss, steering_vector

Record = dict[str, Any]


def make_optimizer(params: Iterable[nn.Parameter], options: argparse.Namespace) -> BLUR:
    """BLUR takes the place of AdamW, and its retain weight that of RMU's alpha."""
    return BLUR(
        params,
        torch.optim.AdamW,
        rule=options.rule,
        scope=options.scope,
        metric=options.metric,
        damping=options.damping,
        gamma=options.gamma,
        retain_weight=options.retain_weight,
        lr=options.lr,
        weight_decay=options.weight_decay,
    )


def make_steering_vectors(model: Model, options: argparse.Namespace) -> list[Tensor]:
    """Draw one for each forget corpus."""
    generator = torch.Generator().manual_seed(options.seed)
    width = model.config.hidden_size
    return [steering_vector(width, norm, generator, model.device) for norm in options.steering]


def train(
    model: Model,
    trained: dict[str, nn.Parameter],
    forget: Sequence[Corpus],
    retain: Corpus,
    options: argparse.Namespace,
    report: Callable[[Record], None],
) -> None:
    """Take the steps; the forget corpora take turns. Report each step's losses and statistics."""
    optimizer = make_optimizer(trained.values(), options)
    frozen = FROZEN[options.frozen](model, trained, options.layer)
    vectors = make_steering_vectors(model, options)
    stream = partial(endless_batches, size=options.batch, device=model.device)
    forget_batches = alternating([stream(corpus.train, seed=options.seed + i) for i, corpus in enumerate(forget)])
    retain_batches = stream(retain.train, seed=options.seed + len(forget))
    for number in range(1, options.steps + 1):
        (turn, f_batch), r_batch = next(forget_batches), next(retain_batches)
        losses = take_step(model, optimizer, options.layer, vectors[turn], f_batch, r_batch, frozen(r_batch))
        values = dict(zip(("forget_loss", "retain_loss"), losses, strict=True))
        report({"step": number, "corpus": forget[turn].name, **values, **optimizer.statistics.to_dict()})


def take_step(
    model: Model,
    optimizer: BLUR,
    layer: int,
    vector: Tensor,
    f_batch: Batch,
    r_batch: Batch,
    frozen: Tensor,
) -> tuple[float, float]:
    """Take one step of RMU. Return the two losses, neither of them weighted."""

    def forget_loss() -> Tensor:
        return rmu_forget_loss(activations(model, layer, f_batch), vector, f_batch["attention_mask"])

    def retain_loss() -> Tensor:
        return rmu_retain_loss(activations(model, layer, r_batch), frozen, r_batch["attention_mask"])

    forget, retain = optimizer.step(forget_loss, retain_loss)
    return forget.item(), retain.item()


def make_measure(
    model: Model,
    tokenizer: Tokenizer,
    corpora: dict[str, Corpus],
    questions: dict[str, list[Question]],
    options: argparse.Namespace,
) -> Callable[[], Measures]:
    """Return what is called before and after."""
    for source, all_ in questions.items():
        check_fit(model, tokenizer, source, all_, options.scoring, options.topic)
    harness = Harness.from_options(options)

    def measure() -> Measures:
        result = {}
        for title, corpus in corpora.items():
            result[f"{title}: perplexity"] = perplexity(model, corpus.held_out, options.eval_batch)
            batches = list(batches_of(corpus.held_out, options.eval_batch, model.device))
            result[f"{title}: activation norm"] = median_norm(model, options.layer, batches)
        for source, all_ in questions.items():
            score = accuracy(model, tokenizer, all_, options.scoring, options.topic, options.eval_batch)
            result[f"{source}: accuracy"] = score
        return result | (harness.evaluate(model, tokenizer) if harness else {})

    return measure


T = TypeVar("T")


def loaded(load: Callable[[], T], options: argparse.Namespace) -> T:
    """Call ``load``, and tell what it raises as a matter of --model.

    Raises:
        InputError: it can't be loaded.
    """
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--model: {options.model} could not be loaded: {reason[0]}") from error


def read_corpora(tokenizer: Tokenizer, options: argparse.Namespace) -> tuple[list[Corpus], Corpus]:
    """Return what is to be forgotten and what is to be retained."""
    read = partial(
        read_corpus,
        tokenizer=tokenizer,
        held_out=options.held_out,
        batch=options.batch,
        min_chars=options.min_chars,
        passage_chars=options.passage_chars,
    )
    pairs = zip(options.forget, options.length, strict=True)
    forget = [read("--forget", source, length=length) for source, length in pairs]
    return forget, read("--retain", options.retain, length=options.retain_length)


def check_tokens(model: Model, tokenizer: Tokenizer, corpora: Iterable[Corpus]) -> None:
    """See that the model knows every token of the corpora."""
    for corpus in corpora:
        ids = (token for passages in (corpus.train, corpus.held_out) for ids in passages for token in ids)
        check_vocabulary(f"--model: {corpus.name}", ids, tokenizer, model.config)


def check_lengths(model: Model, options: argparse.Namespace) -> None:
    """See that the model can read passages of the lengths asked for."""
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    for option, length in (("--length", max(options.length)), ("--retain-length", options.retain_length)):
        if length > limit:
            raise InputError(f"{option} must be at most {limit}, as many tokens as the model can read, got {length}.")


def tell_model(console: Console, model: Model, trained: dict[str, nn.Parameter], options: argparse.Namespace) -> None:
    """Say what is trained."""
    whole, part = (sum(p.numel() for p in params) / 1e6 for params in (model.parameters(), trained.values()))
    console.print(
        f"{options.model}: {whole:.1f}M parameters, {part:.3g}M of them trained: {', '.join(trained)}", soft_wrap=True
    )


def tell_norms(console: Console, norms: Sequence[float], options: argparse.Namespace) -> None:
    """Say how large the activations are beside the steering vectors."""
    found, wanted = (", ".join(f"{norm:.3g}" for norm in values) for values in (norms, options.steering))
    console.print(
        f"activations to forget: median norm {found} in layer {options.layer}; steered to a norm of {wanted}",
        soft_wrap=True,
    )


def unlearn(
    model: Model,
    trained: dict[str, nn.Parameter],
    forget: Sequence[Corpus],
    retain: Corpus,
    options: argparse.Namespace,
    console: Console,
) -> list[Record]:
    """Train behind a progress bar. Return every step's record."""
    records: list[Record] = []
    with make_progress(console) as progress:
        bar = progress.add_task("unlearning", total=options.steps, note="")

        def report(record: Record) -> None:
            records.append(record)
            note = f"forget {record['forget_loss']:.3g}  retain {record['retain_loss']:.3g}"
            progress.update(bar, completed=record["step"], note=note)
            if record["step"] % options.log_every == 0 or record["step"] in (1, options.steps):
                console.print(as_line(record), soft_wrap=True)

        train(model, trained, forget, retain, options, report)
    return records


def main() -> None:
    """Load, measure, forget, measure, save."""
    options = parse_options()
    check_sources(options)
    quiet_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = make_console()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    tokenizer = loaded(partial(load_tokenizer, options.model, options.gguf_file), options)
    forget, retain = read_corpora(tokenizer, options)
    questions = {source: read_questions("--questions", source) for source in options.questions}
    dtype = getattr(torch, options.dtype)
    model = loaded(partial(load_model, options.model, device, options.gguf_file, dtype), options).eval()
    check_layers("--layer", [options.layer], len(decoder_layers(model)))
    check_lengths(model, options)
    check_tokens(model, tokenizer, [*forget, retain])
    trained = choose_trained(model, options.layers, options.param_pattern)
    titles = [f"forget {corpus.name}" for corpus in forget]
    corpora = dict(zip([*titles, f"retain {retain.name}"], [*forget, retain], strict=True))
    measure = make_measure(model, tokenizer, corpora, questions, options)
    tell_model(console, model, trained, options)
    with console.status("measuring"):
        before = measure()
    tell_norms(console, [before[f"{title}: activation norm"] for title in titles], options)
    options.out.mkdir(parents=True, exist_ok=True)
    records = unlearn(model, trained, forget, retain, options, console)
    with console.status("measuring"):
        after = measure()
    print_table(console, before, after)
    content = {"settings": vars(options), "trained": list(trained), "before": before, "after": after, "steps": records}
    write_results(options.out / "results.json", content)
    if not options.no_model:
        export(model, tokenizer, options.out / "model")
    console.print(f"\nWritten to {options.out}: results.json{'' if options.no_model else ', model/'}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run(main))
