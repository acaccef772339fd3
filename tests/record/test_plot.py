"""What the pictures show, row by row and line by line, and what wrong input leads to."""

import json
import math
import subprocess
import sys

import pytest

from blur_optim.record import plot as plots
from blur_optim.record import plot_alignment
from blur_optim.record.plot_rows import MOST_ROWS, rows_of

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

PARTS = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def llama(layers):
    names = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in PARTS]
    # The order of a Trainer's groups: what decays comes first.
    return ["model.norm.weight", *names, "lm_head.weight", "model.embed_tokens.weight"]


def write(path, steps=5, parameters=("a", "b"), **changes):
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"metadata": {"format": 1, "rule": "blur", "gamma": [0.5], "retain_weight": [1.0], "parameters": parameters}}
    ]
    for step in range(1, steps + 1):
        line = {"step": step, "forget_loss": 2.0 / step, "retain_loss": 1.0, "cosine": 0.1 - 0.1 * step}
        line |= {"forget_norm": 3.0, "retain_norm": 2.0, "update_norm": 2.5}
        line |= {"forget_coefficient": [0.4, 0.6], "retain_coefficient": 1.0}
        norms = [1.0] * len(parameters)
        line["alignment"] = {"cosine": [-0.5] * len(parameters), "forget_norm": norms, "retain_norm": norms}
        lines.append({**line, **changes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def in_metric(path):
    """A run with ``metric="retain"``."""
    write(path, metric_cosine=-0.7, metric_forget_norm=30.0, metric_retain_norm=20.0, effective_share=0.25)
    metadata, *steps = [json.loads(line) for line in path.read_text().splitlines()]
    metadata["metadata"] |= {"metric": "retain", "damping": 0.01}
    for step in steps:
        step["alignment"] |= {"metric_cosine": [-0.9, 0.9]}
        step["alignment"] |= {f"metric_{side}_norm": [3.0, 1.0] for side in ("forget", "retain")}
    path.write_text("".join(json.dumps(line) + "\n" for line in [metadata, *steps]))
    return path


def lines_of(axis):
    """Label and values of what is drawn, without the axes' own lines."""
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines if not line.get_label().startswith("_")}


def figure_of_steps(*files):
    return plots._draw_steps(plots._figure_class(), plots._read(files))


class TestRows:
    def test_every_parameter_has_a_row_in_a_small_model(self):
        rows = rows_of(llama(2))
        assert [row.label for row in rows[:10]] == [
            "embed_tokens", "q", "k", "v", "o", "gate", "up", "down", "input_layernorm", "post_attention_layernorm",
        ]  # fmt: skip
        assert [row.layer for row in rows] == [None, *[0] * 9, *[1] * 9, None, None]
        assert [row.label for row in rows[-2:]] == ["norm", "lm_head"]

    @pytest.mark.parametrize(
        ("layers", "labels"),
        [
            (11, ["q", "k"]),
            (16, ["q", "k", "v", "o", "mlp", "norm"]),
            (32, ["attention", "mlp", "norm"]),
            (80, ["all"]),
        ],
    )
    def test_parameters_are_joined_the_more_layers_there_are(self, layers, labels):
        names = llama(layers)
        rows = rows_of(names)
        assert [row.label for row in rows if row.layer == 3][: len(labels)] == labels
        assert len(rows) <= MOST_ROWS
        assert sorted(index for row in rows for index in row.members) == list(range(len(names)))

    def test_members_are_those_of_the_row(self):
        names = llama(80)
        for row in rows_of(names):
            assert all((f"layers.{row.layer}." in names[i]) == (row.layer is not None) for i in row.members)

    @pytest.mark.parametrize(
        ("name", "layer", "label"),
        [
            ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", 3, "q lora_A"),
            ("model.layers.3.self_attn.q_proj.bias", 3, "q bias"),
            ("transformer.h.11.attn.c_attn.weight", 11, "c_attn"),
            ("transformer.wte.weight", None, "wte"),
            ("0.weight", None, "0"),
            ("group0.3", None, "group0.3"),
        ],
    )
    def test_names(self, name, layer, label):
        assert rows_of([name]) == [(layer, label, [0])]


class TestSteps:
    def test_the_lines_are_the_numbers_of_the_file(self, tmp_path):
        axes = figure_of_steps(write(tmp_path / "run.jsonl")).axes
        assert lines_of(axes[0])["forget"] == pytest.approx([2.0 / step for step in range(1, 6)])
        assert list(axes[1].lines[0].get_ydata()) == pytest.approx([0.1 - 0.1 * step for step in range(1, 6)])
        assert [values[0] for values in lines_of(axes[2]).values()] == [3.0, 2.0, 2.5]
        assert lines_of(axes[3])["a (forget)"] == [0.5] * 5  # The mean over the rows.

    def test_every_panel_says_what_it_shows(self, tmp_path):
        figure = figure_of_steps(write(tmp_path / "run.jsonl"))
        assert all(axis.get_title() and axis.get_ylabel() for axis in figure.axes)
        assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["step", "step"]
        assert "rule blur, γ = 0.5, α = 1" in figure.get_suptitle()

    def test_null_is_a_gap(self, tmp_path):
        figure = figure_of_steps(write(tmp_path / "run.jsonl", forget_loss=None, forget_norm=None))
        assert all(math.isnan(value) for value in lines_of(figure.axes[0])["forget"])
        assert figure.axes[2].get_yscale() == "log"

    def test_a_panel_without_numbers_says_so(self, tmp_path):
        file = write(tmp_path / "run.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines[1:]:
            del line["forget_loss"], line["retain_loss"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert figure_of_steps(file).axes[0].texts[0].get_text() == "not recorded"

    def test_several_runs_are_told_apart_by_their_folders(self, tmp_path):
        files = [write(tmp_path / name / "run.jsonl") for name in "ab"]
        labels = lines_of(figure_of_steps(*files).axes[0])
        assert list(labels) == ["a-run", "b-run", "forget", "retain"]

    def test_without_a_metric_there_are_no_panels_for_one(self, tmp_path):
        figure = figure_of_steps(write(tmp_path / "run.jsonl"))
        assert len(figure.axes) == 4
        assert "metric" not in figure.get_suptitle()
        assert list(lines_of(figure.axes[1])) == []  # One line alone needs no name.

    def test_both_kinds_of_cosine_and_norm_of_a_run_in_the_metric(self, tmp_path):
        figure = figure_of_steps(in_metric(tmp_path / "run.jsonl"))
        assert "metric retain" in figure.get_suptitle()
        cosines, norms, norms_in_metric, share = (figure.axes[i] for i in (1, 2, 4, 5))
        assert lines_of(cosines)["cosine"] == pytest.approx([0.1 - 0.1 * step for step in range(1, 6)])
        assert lines_of(cosines)["in the metric of the retain loss"] == [-0.7] * 5
        assert [values[0] for values in lines_of(norms).values()] == [3.0, 2.0, 2.5]
        assert [values[0] for values in lines_of(norms_in_metric).values()] == [30.0, 20.0]
        assert list(share.lines[0].get_ydata()) == [0.25] * 5
        assert norms_in_metric.get_yscale() == share.get_yscale() == "log"
        assert all(axis.get_title() and axis.get_ylabel() for axis in figure.axes)
        assert [axis.get_xlabel() for axis in figure.axes[4:]] == ["step", "step"]

    def test_a_run_without_a_metric_beside_one_in_it(self, tmp_path):
        files = [write(tmp_path / "plain.jsonl"), in_metric(tmp_path / "retain.jsonl")]
        figure = figure_of_steps(*files)
        assert len(figure.axes) == 6
        assert [list(line.get_ydata()) for line in figure.axes[5].lines if len(line.get_ydata())] == [[0.25] * 5]


class TestAlignment:
    def figure(self, file, prefix=""):
        (run,) = plots._read([file]).values()
        return plot_alignment.draw_alignment(plots._figure_class(), "run", run, prefix)

    def test_the_metric_has_a_picture_of_its_own(self, tmp_path):
        file = in_metric(tmp_path / "run.jsonl")
        written = [path.name for path in plots.plot([file])]
        assert written == ["run-steps.png", "run-alignment.png", "run-alignment-in-metric.png"]
        plain, metric = self.figure(file), self.figure(file, "metric_")
        assert plain.axes[0].images[0].get_clim() == (-0.5, 0.5)
        assert metric.axes[0].images[0].get_clim() == pytest.approx((-0.9, 0.9))
        assert "in the metric of the retain loss" in metric.axes[0].get_title()
        assert "metric" not in plain.axes[0].get_title()
        # Its shares are those of the norms in the metric: 3^2 and 1 of 10.
        widths = [round(bar.get_width(), 6) for bar in metric.axes[1].patches]
        assert widths == [0.9, 0.1, 0.9, 0.1]
        assert [round(bar.get_width(), 6) for bar in plain.axes[1].patches] == [0.5] * 4

    def test_colours_are_centred_at_zero(self, tmp_path):
        (image,) = self.figure(write(tmp_path / "run.jsonl")).axes[0].images
        assert image.get_clim() == (-0.5, 0.5)
        assert image.get_array().shape == (2, 5)

    def test_a_joined_row_is_the_cosine_over_its_parameters(self, tmp_path):
        names = llama(80)
        members = next(row.members for row in rows_of(names) if row.layer == 5)
        cosines, forget, retain = ([0.0] * len(names) for _ in range(3))
        for place, index in enumerate(members, start=1):
            forget[index], retain[index], cosines[index] = float(place), 2.0 * place, (-1.0) ** place / place
        dots = sum(c * f * r for c, f, r in zip(cosines, forget, retain, strict=True))
        expected = dots / math.sqrt(sum(f * f for f in forget) * sum(r * r for r in retain))
        alignment = {"cosine": cosines, "forget_norm": forget, "retain_norm": retain}
        (image,) = self.figure(write(tmp_path / "run.jsonl", 1, names, alignment=alignment)).axes[0].images
        assert float(image.get_array()[1 + 5, 0]) == pytest.approx(expected)

    def test_a_parameter_without_gradient_has_no_colour(self, tmp_path):
        alignment = {"cosine": [None, 0.3], "forget_norm": [None, 1.0], "retain_norm": [None, 1.0]}
        (image,) = self.figure(write(tmp_path / "run.jsonl", 3, alignment=alignment)).axes[0].images
        assert image.get_array()[:, 0].mask.tolist() == [True, False]

    def test_shares_add_up_to_the_whole(self, tmp_path):
        figure = self.figure(write(tmp_path / "run.jsonl", 3, llama(2)))
        assert sum(bar.get_width() for bar in figure.axes[1].patches) == pytest.approx(2.0)  # of each gradient: 1


class TestCommand:
    def test_writes_what_it_says(self, tmp_path, capsys):
        file = write(tmp_path / "run.jsonl")
        plots.main([str(file), "--output", str(tmp_path / "pictures"), "--format", "png,svg"])
        written = capsys.readouterr().out.split()
        assert [name.rpartition("/")[2] for name in written] == [
            "run-steps.png", "run-steps.svg", "run-alignment.png", "run-alignment.svg",
        ]  # fmt: skip
        assert (tmp_path / "pictures" / "run-steps.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "pictures" / "run-alignment.svg").read_text()

    def test_beside_the_file_and_without_alignment(self, tmp_path):
        file = write(tmp_path / "run.jsonl", alignment={})
        assert plots.plot([file]) == [tmp_path / "run-steps.png"]

    def test_as_a_module(self, tmp_path):
        command = [sys.executable, "-m", "blur_optim.record.plot", str(tmp_path / "none.jsonl")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert "none.jsonl" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"metadata": {}}\n', "at least one step"),
            ('{"metadata": {}}\n{"step": 1,\n{}\n', r"line 2: must be JSON"),
            ('{"text": "a"}\n', r"line 1: must be the metadata"),
        ],
        ids=["no step", "broken", "another file"],
    )
    def test_wrong_input_names_file_and_line(self, tmp_path, content, message):
        file = tmp_path / "run.jsonl"
        file.write_text(content)
        with pytest.raises(SystemExit, match=rf"blur_optim\.record\.plot: .*run\.jsonl.*{message}"):
            plots.main([str(file)])

    def test_an_unknown_format(self, tmp_path):
        with pytest.raises(SystemExit, match=r"`formats` must be among .*, got 'gif'"):
            plots.main([str(write(tmp_path / "run.jsonl")), "--format", "gif"])

    def test_without_matplotlib_the_error_names_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install 'blur_optim\[plot\]'"):
            plots.plot([write(tmp_path / "run.jsonl")])
