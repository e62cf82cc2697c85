"""The columns of metrics.csv are said once: what an entry says shows in tables, plots, the bar and the documents."""

from pathlib import Path

import pytest
from support import ROOT

from models.training import metrics, report
from models.training.metrics import METRICS, Curve, Metric, Number, bar_texts, metric_of
from models.training.report import Results
from scripts import arms

ROWS = [{"step": 1.0, "train/new": 3.0}, {"step": 2.0, "train/new": 5.0}]


def run(rows=ROWS):
    return Results(Path("run"), {"status": "finished", "tokens_per_step": 10}, rows)


@pytest.fixture
def new(monkeypatch):
    """A column that nothing but its entry knows."""
    numbers = (Number("new", "best", "{:.1f} u", compared=True), Number("new, last", "last", "{:.2f}"))
    metric = Metric("something new", numbers, Curve("memory", {"linestyle": "--"}), bar="{:.0f} new")
    monkeypatch.setitem(METRICS, "train/new", metric)


@pytest.mark.usefixtures("new")
def test_a_metric_is_one_entry_wherever_it_shows(monkeypatch, tmp_path):
    table = report.table([run()], title="runs")
    assert {column.header: list(column.cells) for column in table.columns if column.header.startswith("new")} == {
        "new": ["3.0 u"], "new, last": ["5.00"],
    }  # fmt: skip
    header, _, row = report.markdown([run()]).splitlines()
    assert header.endswith("| new | new, last |") and row.endswith("| 3.0 u | 5.00 |")
    (arm,) = arms.arms_of([run()])
    assert "new" in metrics.headings(compared=True) and arm.cell("new") == "3.0 u"
    assert bar_texts({"train/new": 7, "train/bpc": 1.5, "unknown": 1}) == ["1.500 bpc", "7 new"]
    drawn = lines_of(monkeypatch, lambda: report.plot([run()], tmp_path / "plot.png"))
    assert [line for line in drawn if list(line.get_xdata())][0].get_linestyle() == "--"
    assert "| `train/new` | something new |" in metrics.markdown()


def lines_of(monkeypatch, draw):
    """Every line that is in a plot."""
    from matplotlib.figure import Figure

    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        draw()
    return [line for figure in figures for axes in figure.axes for line in axes.lines]


def test_a_plot_leaves_the_backend_of_a_notebook_alone(tmp_path):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    try:
        matplotlib.use("svg")
        report.plot([run()], tmp_path / "plot.png")
        assert matplotlib.get_backend(auto_select=False) == "svg" and (tmp_path / "plot.png").stat().st_size
    finally:
        matplotlib.use(before or "agg")


def test_columns_that_share_a_heading_give_their_largest():
    rows = [{"step": 1.0, "memory/rss_gib": 2.0}, {"step": 2.0, "memory/peak_allocated_gib": 3.0}]
    assert run(rows).number("peak GiB") == 3.0
    assert run([{"step": 1.0}]).number("peak GiB") is None


def test_a_test_counts_until_training_goes_on():
    tested = {"step": 4.0, "test/bpc": 2.0}
    assert run([tested]).number("test bpc") == 2.0
    assert run([tested, {"step": 5.0, "train/bpc": 3.0}]).number("test bpc") is None


def test_every_entry_names_what_there_is():
    for name, metric in METRICS.items():
        assert metric.meaning, name
        assert all(callable(getattr(Results, number.of, None)) for number in metric.numbers), name
        assert metric.curve is None or metric.curve.panel in metrics.PANELS, name
    for heading in metrics.headings():  # one form each, whatever the column
        assert len({number.form for _, number in metrics.numbers_under(heading)}) == 1, heading


def test_a_column_of_a_layer_is_that_of_all_layers():
    assert metric_of("scale/layer11/mean") is METRICS["scale/layerN/mean"]
    assert metric_of("logit/layer0/max") is METRICS["logit/layerN/max"]
    assert metric_of("scale/layers/mean") is None


def test_the_documents_have_every_column():
    assert metrics.markdown() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
