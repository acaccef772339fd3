"""The recorder's file: what is in it, what it costs, and that a crash or a resumed run does not spoil it."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch
from helpers import Problem, assert_params_close, backends, calling_backward, step_by_closures, step_by_phases
from host_reads import CountHostReads
from torch import nn

from blur_optim import BLUR
from blur_optim.record import Recorder, read_record
from blur_optim.step.plan import Rows


def problem(named=True, **options):
    p = Problem()
    params = p.model.named_parameters() if named else p.model.parameters()
    return p, BLUR(params, torch.optim.SGD, **{"lr": 0.1, **options})


def run(recorder, opt, p, steps, **values):
    for _ in range(steps):
        losses = step_by_closures(opt, p)
        recorder.record(forget_loss=losses[0], retain_loss=losses[1], **values)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "run.jsonl"


class TestFile:
    def test_metadata_come_first(self, path):
        p, opt = problem(gamma=0.5, rule="barrier")
        with Recorder(path, opt, metadata={"seed": 3}) as recorder:
            run(recorder, opt, p, 1)
        metadata = json.loads(path.read_text().splitlines()[0])["metadata"]
        assert metadata["rule"] == "barrier"
        assert metadata["gamma"] == [0.5]
        assert metadata["scope"] == "global"
        assert metadata["base"] == "SGD"
        assert metadata["versions"]["torch"] == torch.__version__
        assert metadata["rows"] == ["group 0"]
        assert metadata["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert metadata["seed"] == 3

    def test_the_versions_name_the_build_of_torch_and_a_package_that_is_only_on_the_path(self, path, monkeypatch):
        def not_installed(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", not_installed)
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        p, opt = problem()
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        metadata = json.loads(path.read_text().splitlines()[0])["metadata"]
        assert metadata["versions"] == {"blur_optim": "not installed", "torch": "2.11.0+cu130"}

    def test_a_line_has_statistics_losses_weights_and_what_the_user_adds(self, path):
        p, opt = problem(gamma=0.5)
        with Recorder(path, opt) as recorder:
            losses = step_by_closures(opt, p)
            recorder.record(forget_loss=losses[0], retain_loss=float(losses[1]), batch=[1, 2], note="warm-up")
        (step,) = read_record(path).steps
        for name, value in opt.statistics.to_dict().items():
            assert step[name] == value
        assert step["forget_loss"] == float(losses[0])
        assert step["retain_loss"] == float(losses[1])
        assert (step["step"], step["gamma"], step["lr"], step["batch"], step["note"]) == (
            1,
            0.5,
            0.1,
            [1, 2],
            "warm-up",
        )
        assert "alignment" not in step

    def test_a_line_of_a_step_in_the_metric_has_both_kinds_of_norm_and_cosine(self, path):
        p = Problem()
        opt = BLUR(p.model.named_parameters(), torch.optim.AdamW, lr=0.1, metric="retain", damping=0.02)
        with Recorder(path, opt, alignment=True) as recorder:
            run(recorder, opt, p, 1)
        record = read_record(path)
        assert (record.metadata["metric"], record.metadata["damping"]) == ("retain", 0.02)
        (step,), found = record.steps, opt.statistics.to_dict()
        for name in ("cosine", "forget_norm", "retain_norm"):
            assert step[name] == found[name]
            assert step[f"metric_{name}"] == found[f"metric_{name}"] != found[name]
        assert 0 < step["effective_share"] == found["effective_share"] < 1
        # What is within the parameters adds up to the whole, in the metric as without it.
        for prefix in ("", "metric_"):
            parts = step["alignment"]
            for side in ("forget_norm", "retain_norm"):
                total = sum(norm**2 for norm in parts[prefix + side]) ** 0.5
                assert total == pytest.approx(step[prefix + side], rel=1e-6)
            triples = zip(*(parts[prefix + n] for n in ("cosine", "forget_norm", "retain_norm")), strict=True)
            dot = sum(c * f * r for c, f, r in triples)
            norms = step[f"{prefix}forget_norm"] * step[f"{prefix}retain_norm"]
            assert dot / norms == pytest.approx(step[f"{prefix}cosine"], rel=1e-5)

    def test_without_a_metric_no_line_speaks_of_one(self, path):
        p, opt = problem()
        with Recorder(path, opt, alignment=True) as recorder:
            run(recorder, opt, p, 1)
        record = read_record(path)
        assert (record.metadata["metric"], record.metadata["damping"]) == ("euclidean", None)
        assert not any("metric" in name for name in (*record.steps[0], *record.steps[0]["alignment"]))

    def test_every(self, path):
        p, opt = problem()
        with Recorder(path, opt, every=3) as recorder:
            run(recorder, opt, p, 8)
        assert [step["step"] for step in read_record(path).steps] == [1, 3, 6]

    def test_what_is_not_finite_is_null(self, path):
        p, opt = problem()
        with Recorder(path, opt) as recorder:
            opt.step(calling_backward(p.forget_loss), lambda: p.retain_loss() * float("inf"))
            recorder.record(forget_loss=torch.tensor(float("nan")), list=[1.0, float("-inf")])

        def refuse(constant):
            pytest.fail(f"{constant} is not JSON")

        step = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()][1]
        assert step["forget_loss"] is None
        assert step["forget_coefficient"] is None
        assert step["list"] == [1.0, None]
        assert step["skipped"] == 1

    def test_rows_of_each_scope(self, path):
        p, opt = problem(scope="parameter")
        p.model[0].bias.requires_grad_(False)
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        record = read_record(path)
        assert record.metadata["rows"] == record.metadata["parameters"]
        a = opt.statistics.forget_coefficient.tolist()
        recorded = record.steps[0]["forget_coefficient"]
        assert recorded.pop(1) is None
        assert recorded == pytest.approx(a, rel=1e-6)

    def test_names_from_the_model_without_those_of_wrappers(self, path):
        p, opt = problem(named=False)
        wrapped = nn.Module()
        wrapped.module = nn.Module()
        wrapped.module._orig_mod = p.model
        with Recorder(path, opt, model=wrapped) as recorder:
            run(recorder, opt, p, 1)
        assert read_record(path).metadata["parameters"][0] == "0.weight"

    def test_names_without_any(self, path):
        p, opt = problem(named=False)
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        assert read_record(path).metadata["parameters"][3] == "group0.3"

    def test_a_group_added_later_is_in_new_metadata(self, path):
        p, opt = problem(named=False)
        extra = nn.Parameter(torch.ones((), dtype=torch.float64))
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
            opt.add_param_group({"params": [extra], "lr": 0.5})
            run(recorder, opt, p, 1)
        record = read_record(path)
        assert record.metadata["rows"] == ["group 0", "group 1"]
        assert record.steps[1]["lr"] == [0.1, 0.5]


class TestCost:
    def fused(self, path, lr=0.1, **options):
        p = Problem(torch.float32)
        opt = BLUR(p.model.named_parameters(), torch.optim.AdamW, lr=lr, fused=True)
        step_by_closures(opt, p)
        return p, opt, Recorder(path, opt, **options)

    def test_one_copy_where_recorded_and_none_elsewhere(self, path):
        p, opt, recorder = self.fused(path, lr=torch.tensor(0.1), every=3, alignment=True)
        counts = []
        with recorder:
            for _ in range(5):
                losses = opt.step(p.forget_loss, p.retain_loss)
                with CountHostReads() as reads:
                    recorder.record(forget_loss=losses[0], retain_loss=losses[1])
                counts.append(reads.count)
        assert counts[1] == counts[3] == counts[4] == 0
        assert max(counts) <= 1
        assert len(read_record(path).steps) == 2

    def test_taking_the_dots_of_each_parameter_reads_nothing(self, path):
        p, opt, recorder = self.fused(path, alignment=True)
        with recorder, CountHostReads() as reads:
            opt.step(p.forget_loss, p.retain_loss)
        assert opt.statistics.parameter_dots is not None
        assert reads.count == 0


class TestAlignment:
    @pytest.mark.parametrize("scope", ["global", "group", "parameter"])
    @backends
    def test_the_cosine_within_each_parameter(self, path, scope, backend):
        p, opt = problem(scope=scope, backend=backend)
        f, r = (torch.autograd.grad(loss(), p.params) for loss in (p.forget_loss, p.retain_loss))
        with Recorder(path, opt, alignment=True) as recorder:
            run(recorder, opt, p, 1)
        alignment = read_record(path).steps[0]["alignment"]
        cosines = [torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in zip(f, r, strict=True)]
        assert alignment["cosine"] == pytest.approx([float(c) for c in cosines], abs=1e-6)
        assert alignment["forget_norm"] == pytest.approx([float(x.norm()) for x in f], rel=1e-6)
        assert alignment["retain_norm"] == pytest.approx([float(x.norm()) for x in r], rel=1e-6)

    @pytest.mark.parametrize("parts", [1, 3])
    def test_when_the_retain_closure_is_evaluated_twice(self, parts):
        taken = []
        for stash in ("reference", "recompute"):
            p, opt = problem(stash=stash)
            opt.record_alignment = True
            step_by_closures(opt, p, parts)
            taken.append(opt.statistics)
        for name in ("retain_forget", "forget_norm_sq", "retain_norm_sq"):
            expected, actual = (getattr(s.parameter_dots, name) for s in taken)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        assert float(taken[1].update_norm) == pytest.approx(float(taken[0].update_norm), rel=1e-9)

    @pytest.mark.parametrize("scope", ["global", "group", "parameter"])
    @backends
    def test_the_update_is_the_same_to_rounding(self, scope, backend):
        finals = []
        for alignment in (False, True):
            p, opt = problem(named=False, scope=scope, backend=backend, max_grad_norm=0.5)
            opt.record_alignment = alignment
            for step in (step_by_closures, step_by_phases, step_by_closures):
                step(opt, p)
            finals.append(p.params)
            assert opt.statistics.dots.forget_norm_sq.shape == ((4,) if scope == "parameter" else (1,))
        assert_params_close(finals[1], finals[0], rtol=1e-13, atol=1e-15)

    def test_with_scope_parameter_to_the_bit(self):
        snapshots = []
        for alignment in (False, True):
            p, opt = problem(named=False, scope="parameter")
            opt.record_alignment = alignment
            step_by_closures(opt, p)
            snapshots.append([p.detach() for p in p.params])
        assert all(torch.equal(a, b) for a, b in zip(*snapshots, strict=True))

    def test_the_sums_have_the_same_bits_on_any_number_of_threads(self):
        """As many parameters as torch would share out over threads when it sums their dots."""
        groups = [i // 30000 for i in range(60000)]
        rows = Rows([torch.empty(0)] * 60000, groups, groups, [1.0, 1.0], [1.0, 1.0])
        table = torch.randn(60000, 3, dtype=torch.float64)
        sums = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(rows.sums(table))
        assert torch.equal(sums[0], sums[1])
        assert torch.equal(sums[0], sums[2])
        torch.testing.assert_close(sums[0], table.view(2, 30000, 3).sum(1))

    def test_null_where_a_parameter_has_no_gradient(self, path):
        p, opt = problem()
        p.model[0].bias.requires_grad_(False)
        with Recorder(path, opt, alignment=True) as recorder:
            run(recorder, opt, p, 1)
        cosines = read_record(path).steps[0]["alignment"]["cosine"]
        assert [c is None for c in cosines] == [False, True, False, False]

    def test_is_taken_on_recorded_steps_only(self, path):
        p, opt = problem()
        taken = []
        with Recorder(path, opt, every=2, alignment=True) as recorder:
            for _ in range(4):
                step_by_closures(opt, p)
                taken.append(opt.statistics.parameter_dots is not None)
                recorder.record()
        assert taken == [True, True, False, True]
        assert not opt.record_alignment


class TestGoingOn:
    def test_step_numbers_go_on(self, path):
        p, opt = problem()
        for _ in range(2):
            with Recorder(path, opt) as recorder:
                run(recorder, opt, p, 2)
        assert [step["step"] for step in read_record(path).steps] == [1, 2, 3, 4]

    def test_from_an_older_checkpoint_the_later_steps_are_replaced(self, path):
        p, opt = problem()
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 4, attempt=1)
        with Recorder(path, opt, step=2) as recorder:
            run(recorder, opt, p, 1, attempt=2)
        assert [(s["step"], s["attempt"]) for s in read_record(path).steps] == [(1, 1), (2, 1), (3, 2)]

    @pytest.mark.parametrize("cut", [1, 2, 40])
    def test_a_torn_last_line_is_not_read_and_not_glued_to(self, path, cut):
        p, opt = problem()
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 3)
        path.write_bytes(path.read_bytes()[:-cut])
        assert [s["step"] for s in read_record(path).steps] == ([1, 2, 3] if cut == 1 else [1, 2])
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        assert [s["step"] for s in read_record(path).steps] == [1, 2, 3]

    @pytest.mark.parametrize("size", [0, 5, 60])
    def test_torn_within_the_first_line(self, path, size):
        p, opt = problem()
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        path.write_bytes(path.read_bytes()[:size])
        with Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1)
        assert [s["step"] for s in read_record(path).steps] == [1]

    def test_what_is_recorded_survives_a_killed_process(self, path):
        code = (
            "import os, sys, torch; from torch import nn; from blur_optim import BLUR; "
            "from blur_optim.record import Recorder\n"
            "w = nn.Parameter(torch.ones(3)); opt = BLUR([w], torch.optim.SGD, lr=0.1)\n"
            "recorder = Recorder(sys.argv[1], opt)\n"
            "for _ in range(2): recorder.record(loss=opt.step(lambda: w.sum(), lambda: w.square().sum())[0])\n"
            "os._exit(1)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 1
        assert len(read_record(path).steps) == 2


class TestErrors:
    def test_a_file_of_another_kind_is_left_alone(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"text": "a"}\n{"text": ')
        with pytest.raises(ValueError, match=r"`path` must be a new file or one of a Recorder, got .*data\.jsonl"):
            Recorder(file, problem()[1])
        assert file.read_text() == '{"text": "a"}\n{"text": '

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "empty"),
            ('{"step": 1}\n', r"line 1: must be the metadata"),
            ('{"metadata": {}}\n{"step": \n{"step": 2}\n', r"line 2: must be JSON"),
            ('{"metadata": {}}\n{"step": 1}\n[1]\n', r"line 3: must be a JSON object"),
            ('{"metadata": {}}\n{"step": "x"}\n', r"line 2: `step` must be an integer"),
        ],
        ids=["empty", "no metadata", "broken", "no object", "no step"],
    )
    def test_reading_names_file_and_line(self, tmp_path, content, message):
        file = tmp_path / "run.jsonl"
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"run\.jsonl.*{message}"):
            read_record(file)

    def test_before_a_step(self, path):
        with pytest.raises(RuntimeError, match="must follow a step"), Recorder(path, problem()[1]) as recorder:
            recorder.record()

    def test_a_name_of_the_recorder(self, path):
        p, opt = problem()
        with pytest.raises(ValueError, match=r"must not use .*\['cosine'\]"), Recorder(path, opt) as recorder:
            run(recorder, opt, p, 1, cosine=0.0)

    def test_arguments(self, path):
        opt = problem()[1]
        with pytest.raises(TypeError, match="`opt` must be a BLUR, got SGD"):
            Recorder(path, opt.base)
        with pytest.raises(ValueError, match="`every` must be >= 1"):
            Recorder(path, opt, every=0)
        with pytest.raises(ValueError, match="`path` must be given"):
            Recorder(None, opt)


class TestTensorBoard:
    def test_scalars(self, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        p, opt = problem()
        with Recorder(None, opt, alignment=True, tensorboard=tmp_path) as recorder:
            run(recorder, opt, p, 2)
        events = EventAccumulator(str(tmp_path)).Reload()
        cosine = events.Scalars("blur/cosine")
        assert [event.step for event in cosine] == [1, 2]
        assert cosine[1].value == pytest.approx(float(opt.statistics.cosine), rel=1e-6)
        assert "alignment_cosine/2.weight" in events.Tags()["scalars"]
        assert {"blur/forget_loss", "blur/lr"} <= set(events.Tags()["scalars"])

    def test_without_tensorboard_the_error_names_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match=r"pip install 'blur_optim\[tensorboard\]'"):
            Recorder(None, problem()[1], tensorboard=tmp_path)
