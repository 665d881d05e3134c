"""Markdown tables of benchmark reports: what they show, which report wins, and what --update leaves alone."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.harness import Row

ROOT = Path(__file__).resolve().parents[2]


def row(impl="ours", ms=2.0, mode="fwd", case="norm 8x8 bf16", suite="pointwise", **rest) -> Row:
    return Row(suite, case, impl, mode, ms, pct_of_ceiling=ms and 90.0, peak_mb=ms and 1.5, **rest)


def report(*rows: Row, **changes) -> dict:
    return {
        "gpu": "Some GPU", "device": "cuda", "date": "2026-11-25T10:00:00+00:00", "commit": "a" * 40, "quick": False,
        "versions": {"python": "3.12", "torch": "2.11.0+cu130"},
        "ceilings": {"copy_gbps": 3000.0, "gemm_bf16_tflops": 800.0},
        "peers": {"torch": "2.11.0", "compile": "2.11.0", "quack": "0.3"}, "rows": [r.to_dict() for r in rows],
    } | changes


@pytest.fixture
def write(tmp_path):
    def run(name: str, content) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return run


def shown(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if ":--" not in line]


class TestTable:
    def test_ours_beside_the_fastest_peer(self):
        rows = [row("quack", 3.0), row("ours:cuda", 0.5), row(ms=2.0), row("torch", 8.0), row("quack", 1.0, "bwd"),
                row(ms=4.0, mode="bwd")]
        head, fwd, bwd = shown(tables.table(rows))
        assert head == list(tables.HEAD)
        assert fwd == ["norm 8x8 bf16", "fwd", "2.00", "3.00", "quack", "1.50", "90.0", "1.50", "1.50"]
        assert bwd == ["", "bwd", "4.00", "1.00", "quack", "0.25", "90.0", "1.50", "1.50"]

    def test_without_a_peer_and_without_ours(self):
        alone, failed = shown(tables.table([row(), row(ms=None, case="b", error="no"), row("quack", case="b")]))[1:]
        assert alone[2:6] == ["2.00", "", "none", ""]
        assert failed[:6] == ["b", "fwd", "failed", "2.00", "quack", ""]

    def test_no_memory_columns_on_a_cpu(self):
        cpu = dataclasses.replace(row(), peak_mb=None)
        assert [len(line) for line in shown(tables.table([cpu]))] == [7, 7]

    def test_failures_share_a_line_by_reason(self):
        why = "wrong outputs | *inf*"
        rows = [row("quack", None, error=why), row("quack", None, "bwd", error=why)]
        rows.append(row("liger", None, error="no memory"))
        assert tables.failures(rows).splitlines()[2:] == [
            r"- quack, norm 8x8 bf16, fwd and bwd: wrong outputs \| \*inf\*", "- liger, norm 8x8 bf16, fwd: no memory",
        ]

    def test_heading_names_the_place_and_the_peers_of_this_suite(self, write):
        path = write("a.json", report(row(), row("quack"), row("compile")))
        (read,) = tables.read([path])
        assert tables.heading(read, read["rows"]) == (
            "Some GPU, 2026-11-25, torch 2.11.0+cu130, commit aaaaaaaaaa. Ceilings: copy 3.00 TB/s, matrix product "
            "bf16 800 TFLOP/s. Against quack 0.3, compile."
        )

    def test_modes_are_chosen(self, write):
        suites = tables.by_suite(tables.read([write("a.json", report(row(), row(mode="bwd")))]))
        assert len(shown(tables.render(["pointwise"], suites, ["bwd"]))) == 2
        assert tables.render(["pointwise"], suites, ["step"]) == ""

    def test_suites_share_a_table_unless_measured_apart(self, write):
        both = write("a.json", report(row(), row(suite="b", case="other"), row(suite="c")))
        suites = tables.by_suite(tables.read([both]))
        assert [line[0] for line in shown(tables.render(["pointwise", "b"], suites))[1:]] == ["norm 8x8 bf16", "other"]
        suites = tables.by_suite(tables.read([both, write("b.json", report(row(suite="b"), date="2026-11-27"))]))
        text = tables.render(["pointwise", "b"], suites)
        assert "other" not in text and text.count("Some GPU") == 2 and len(shown(text)) == 4


class TestReports:
    def test_the_newest_of_a_gpu_wins_and_gpus_stand_apart(self, write):
        files = [
            write("new.json", report(row(ms=1.0), date="2026-11-26")),
            write("old.json", report(row(ms=9.0), row(suite="b"))),
            write("other.json", report(row(ms=5.0), gpu="Other GPU")),
        ]
        suites = tables.by_suite(tables.read(files))
        assert {gpu: r["rows"][0].ms for gpu, r in suites["pointwise"].items()} == {"Some GPU": 1.0, "Other GPU": 5.0}
        assert list(suites["b"]) == ["Some GPU"]  # the older report is the newest one that has the suite
        text = tables.render(["pointwise"], suites)
        assert "Some GPU, 2026-11-26" in text and "Other GPU, 2026-11-25" in text

    def test_parity_records_are_passed_over(self, write):
        path = write("parity.json", {"rows": [{"model": "0.6B", "check": "logits", "value": 1e-6}]})
        assert tables.read([path]) == []

    @pytest.mark.parametrize("content, message", [
        ("{", "is not a report"), ({"no": "rows"}, "is not a report"), ([], "is not a report"),
        ({"rows": [{"suite": "s"}]}, "is not a report"), ({"rows": []}, "lacks ceilings, commit"),
        (report(row(), quick=True), "--quick"),
    ])
    def test_other_files_are_refused_by_name(self, write, content, message):
        with pytest.raises(ValueError, match=message) as e:
            tables.read([write("bad.json", content)])
        assert "bad.json" in str(e.value)


class TestUpdate:
    TEXT = (
        "# Title\n<!-- benchmarks: pointwise fwd -->\nold\n<!-- end -->\n"
        "between\n<!-- benchmarks: loss -->\nkept\n<!-- end -->\n"
    )

    def test_only_what_is_between_the_markers(self, write, capsys):
        results, page = write("a.json", report(row(), row(mode="bwd"))), write("page.md", self.TEXT)
        assert tables.main([str(results), "--update", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("# Title\n<!-- benchmarks: pointwise fwd -->\nSome GPU")
        assert text.endswith("|\n<!-- end -->\nbetween\n<!-- benchmarks: loss -->\nkept\n<!-- end -->\n")
        assert "old" not in text and "bwd" not in text
        assert "no rows of loss" in capsys.readouterr().err
        assert tables.main([str(results), "--update", str(page)]) == 0
        assert page.read_text() == text

    def test_empty_between_the_markers(self, write):
        suites = tables.by_suite(tables.read([write("a.json", report(row()))]))
        text, absent = tables.update("<!-- benchmarks: pointwise -->\n<!-- end -->", suites)
        assert len(shown(text)) == 2 and not absent

    @pytest.mark.parametrize("text, message", [
        ("nothing", "no marker"),
        ("<!-- benchmarks: pointwise -->\n", "1 markers .* 0 closed"),
        ("<!-- benchmarks: pointwise -->\n<!-- benchmarks: loss -->\n<!-- end -->", "2 markers .* 1 closed"),
    ])
    def test_broken_markers(self, write, capsys, text, message):
        page = write("page.md", text)
        with pytest.raises(ValueError, match=message):
            tables.update(text, {"pointwise": {}, "loss": {}})
        assert tables.main([str(write("a.json", report(row()))), "--update", str(page)]) == 1
        assert page.read_text() == text and "error: " in capsys.readouterr().err

    def test_printed_without_update(self, write, capsys):
        assert tables.main([str(write("a.json", report(row())))]) == 0
        assert capsys.readouterr().out.startswith("### pointwise\n\nSome GPU")

    def test_a_missing_file_is_one_line(self, tmp_path, capsys):
        assert tables.main([str(tmp_path / "none.json")]) == 1
        assert "none.json" in capsys.readouterr().err


def test_the_readme_shows_the_committed_results():
    files = sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    text = (ROOT / "README.md").read_text()
    if files:
        assert tables.update(text, tables.by_suite(tables.read(files)))[0] == text, (
            "stale: python -m benchmarks.tables benchmarks/results/*/*.json --update README.md"
        )
