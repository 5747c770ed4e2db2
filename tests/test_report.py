import json

import pytest

from llm_jax.report import Report, plot_losses, read_metrics

TRAINING = [{"step": s, "loss": 5.0 - s, "tokens_per_second": 9.0, "wall_seconds": s * 1.5} for s in range(1, 7)]
FINISHED = [*TRAINING, {"step": 6, "val_loss": 1.0}, {"step": 6, "val_loss_full": 1.0, "bits_per_byte_full": 2.0}]


def write(workdir, lines, end=""):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_a_new_run_starts_an_empty_file_and_each_line_is_there_at_once(tmp_path):
    with Report(tmp_path, first_step=0, num_steps=4) as report:
        assert report.seconds_before == 0
        for step in (1, 2):
            report.log(step, {"loss": 3.0 / step})
            assert (tmp_path / "metrics.jsonl").read_text().count("\n") == step  # a kill would leave this
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


def test_continuing_cuts_later_lines_and_counts_the_time_so_far(tmp_path):
    write(tmp_path, FINISHED)
    with Report(tmp_path, first_step=4, num_steps=6) as report:
        assert report.seconds_before == 6.0
        assert read_metrics(tmp_path) == TRAINING[:4]
        report.log(5, {"loss": 0.0})
    assert read_metrics(tmp_path) == [*TRAINING[:4], {"step": 5, "loss": 0.0}]


def test_continuing_a_finished_run_takes_back_its_last_line_only(tmp_path):
    write(tmp_path, FINISHED)
    with Report(tmp_path, first_step=6, num_steps=8):
        assert read_metrics(tmp_path) == FINISHED[:-1]


@pytest.mark.parametrize("end", ['{"step": 7, "lo', "{", '{"step": 7}', "\0\0\0"])
def test_a_half_written_line_is_no_line(tmp_path, end):
    write(tmp_path, TRAINING, end)
    whole = [{"step": 7}] if end.endswith("}") else []
    assert read_metrics(tmp_path) == TRAINING + whole
    with Report(tmp_path, first_step=6, num_steps=8) as report:
        report.log(7, {"loss": 1.0})
    assert read_metrics(tmp_path) == [*TRAINING, {"step": 7, "loss": 1.0}]


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_progress_goes_to_standard_error(tmp_path, capsys):
    with Report(tmp_path, first_step=0, num_steps=10) as report:
        report.progress(5, [{"loss": 1.23456, "tokens_per_second": 45678.9}])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("step 5/10 | loss 1.2346 | 45,679 tokens/s | 0:0")


@pytest.mark.parametrize("lines", [[], TRAINING[:1], FINISHED], ids=["none", "one", "finished"])
def test_the_plot_is_a_png_however_much_there_is_to_plot(tmp_path, lines):
    write(tmp_path, lines)
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
