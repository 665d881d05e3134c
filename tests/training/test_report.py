import re

import pytest

from training import report
from training.log import read_metrics
from training.pretrain import train


def test_chart_draws_points_and_baselines():
    svg = report.chart({"a": [(0, 4.0), (10, 2.0)], "b": [(5, 3.0)]}, x="step", y="loss", baselines={"floor": 1.0})
    lines = re.findall(r'points="([^"]*)"', svg)
    first = [tuple(map(float, p.split(","))) for p in lines[0].split()]
    assert len(lines) == 2 and first[0][0] < first[1][0] and first[0][1] < first[1][1], "less is lower on the page"
    dashed = float(re.search(r'y1="([\d.]+)" y2="[\d.]+" stroke="#98a2b3"', svg)[1])
    assert dashed > first[1][1] and "floor: 1" in svg


def test_chart_leaves_out_what_is_not_finite():
    assert "nan" not in report.chart({"a": [(0, 1.0), (1, float("nan")), (2, 2.0)]}, x="x", y="y")
    with pytest.raises(ValueError, match="no finite points"):
        report.chart({"a": [(0, float("inf"))]}, x="x", y="y")


def test_smooth_is_a_running_mean():
    assert report.smooth([(1, 2.0), (2, 4.0), (3, 9.0), (4, 2.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5), (4, 5.5)]


def test_every_run_leaves_a_report(make_config):
    config = make_config()
    train(config, eval_fn=lambda model: {"language=de": 1.25}, quiet=True)
    text = (config.out / report.FILE).read_text()
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "All metrics", "Config", "Environment"} <= {*re.findall("<h2>(.*?)</h2>", text)}
    assert "<h2>language=de</h2>" not in text, "it does not change"
    for name, kind in (("loss", "train"), ("loss", "eval"), ("language=de", "groups"), ("tokens_per_s", "speed")):
        first, end = re.search(f"<td>{name}</td><td>{kind}</td><td class=n>(.*?)</td><td class=n>(.*?)</td>", text).groups()
        own = [r[name] for r in read_metrics(config.out) if r["kind"] == kind]
        assert [first, end] == [f"{own[0]:.6g}", f"{own[-1]:.6g}"], (name, kind)
    assert "<td>seq_len</td><td>16</td>" in text and "<td>torch</td>" in text and not re.search(r"<script|(src|href)\s*=", text)
    (config.out / report.FILE).unlink()
    train(config, quiet=True)  # finished before
    assert (config.out / report.FILE).exists()


def test_page_is_escaped_and_whole(tmp_path):
    html = report.page("a <b>", "lead & more", [("h", report.table(("k", "n"), [("<x>", "1,000"), ("y", "2")]))])
    assert "<x>" not in html and "&lt;x&gt;" in html and '<td class=n>1,000</td>' in html and "lead &amp; more" in html
    report.write(tmp_path / "r.html", html)
    assert (tmp_path / "r.html").read_text() == html and len(list(tmp_path.iterdir())) == 1
