"""The harness: its arithmetic, its honesty about wrong implementations, its command line, and every suite once."""

import json
import math

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import harness, peers, suites
from benchmarks.harness import Case, Impl, InputSet, Row, Settings, autograd_reference, interleave, run_case

SETTINGS = Settings("cpu", turns=3, seconds=0.1)
CEILINGS = {"copy_gbps": 10.0, "gemm_fp32_tflops": 0.5}


def square(x):
    return x * x


def square_case(**changes) -> Case:
    """x² of 1000 rows; the sets are told apart by their seed."""

    def make(seed):
        g = torch.Generator().manual_seed(seed)
        return InputSet({"x": torch.randn(1000, 8, generator=g)}, (torch.randn(1000, 8, generator=g),))

    fields = {"op": "square", "name": "square 1000x8", "make": make, "ours": square,
              "reference": autograd_reference(square, ("x",)), "tolerance": 1e-5, "ceiling": "copy_gbps",
              "bytes": {"fwd": 2e6, "bwd": 3e6, "fwdbwd": 5e6}, "grads": ("x",)}
    return Case(**(fields | changes))


def rows_of(impls, **changes) -> dict[tuple[str, str], Row]:
    return {(r.impl, r.mode): r for r in run_case("test", square_case(**changes), impls, SETTINGS, CEILINGS)}


class TestTurns:
    def test_every_turn_has_everyone_and_starts_one_further(self):
        order = list(interleave(["a", "b", "c"], 4))
        assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]

    def test_implementations_alternate_and_input_sets_rotate(self):
        log = []

        def logged(name):
            def run(x):
                log.append((name, x.data_ptr()))
                return square(x)

            return Impl(run)

        rows_of({"a": logged("a"), "b": logged("b")}, modes=("fwd",), grads=(), sets=4,
                reference=lambda data: ([square(data.inputs["x"])], None))
        timed = log[-3 * 2 * 4:]  # turns x implementations x sets
        assert [name for name, _ in timed] == [n for n in interleave(["a", "b"], 3) for _ in range(4)]
        for batch in range(0, len(timed), 4):
            assert len({x for _, x in timed[batch : batch + 4]}) == 4


class TestNumbers:
    def test_percentiles_interpolate(self):
        values = [5.0, 1.0, 4.0, 2.0, 3.0]
        assert [harness.percentile(values, q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
        assert harness.percentile([7.0], 0.8) == 7.0

    def test_bandwidth_against_the_copy(self):
        row = Row("s", "c", "ours", "fwd")
        harness.fill(row, square_case(), [1.0, 2.0, 3.0], CEILINGS)
        assert (row.ms, row.ms_p20, row.ms_p80, row.turns) == pytest.approx((2.0, 1.4, 2.6, 3))
        assert row.tbps == pytest.approx(2e6 / 2e-3 / 1e12)
        assert row.pct_of_ceiling == pytest.approx(100 * 1.0 / 10.0)  # 1 GB/s of 10
        assert row.tflops is None and row.tokens_per_s is None

    def test_flops_against_the_matrix_product(self):
        row = Row("s", "c", "ours", "fwd")
        case = square_case(ceiling="gemm_fp32_tflops", flops={"fwd": 1e9}, bytes={}, tokens=4)
        harness.fill(row, case, [4.0], CEILINGS)
        assert row.tflops == pytest.approx(0.25) and row.pct_of_ceiling == pytest.approx(50)
        assert row.tbps is None and row.tokens_per_s == pytest.approx(1000)

    def test_no_percentage_without_its_ceiling(self):
        row = Row("s", "c", "ours", "fwd")
        harness.fill(row, square_case(), [1.0], {"gemm_fp32_tflops": 1.0})
        assert row.pct_of_ceiling is None and row.tbps is not None

    def test_a_call_of_many_steps_is_reported_per_step(self):
        def slow(x):
            torch.mm(torch.ones(300, 300), torch.ones(300, 300))
            return square(x)

        times = [rows_of({"ours": Impl(slow)}, modes=("fwd",), steps=steps)["ours", "fwd"].ms for steps in (1, 1000)]
        assert times[1] < times[0] / 50

    @pytest.mark.parametrize("value,text", [(0.0123456, "0.0123"), (1.0, "1.00"), (99.99, "100.0"), (1234.5, "1234"),
                                            (0.0, "0"), (None, "")])
    def test_three_digits(self, value, text):
        assert cli.number(value) == text

    def test_bytes_and_flops_models(self):
        by_name = {c.name: c for s in ("pointwise", "qk_norm_rope", "attention") for c in suites.module(s).cases("cpu", False)}
        b = 2048 * 1024 * 2
        assert by_name["rms_norm 2048x1024 bf16"].bytes == {"fwd": 2 * b, "bwd": 3 * b, "fwdbwd": 5 * b}
        assert by_name["rms_norm+residual 2048x1024 bf16"].bytes["fwdbwd"] == 8 * b
        assert by_name["swiglu 2048x3072 fp32"].bytes["fwdbwd"] == 8 * 2048 * 3072 * 4
        heads = 2 * 512 * 24 * 128 * 2
        assert by_name["qk_norm_rope b2T512h16/8 bf16"].bytes["fwd"] == 2 * heads + 2 * 512 * 64 * 4
        half = 4 * 128 * 16 * 1024**2 / 2
        assert by_name["attention b1T1024h16/8 fp32"].flops == {"fwd": half, "bwd": 2.5 * half, "fwdbwd": 3.5 * half}


class TestHonesty:
    def test_right_ones_are_timed_in_every_mode(self):
        rows = rows_of({"ours": Impl(square)})
        assert set(rows) == {("ours", m) for m in ("fwd", "bwd", "fwdbwd")}
        assert all(r.error is None and r.ms > 0 and r.rel_error < 1e-6 and r.peak_mb is None for r in rows.values())

    def test_a_wrong_output_is_reported_and_not_timed(self):
        rows = rows_of({"ours": Impl(square), "off": Impl(lambda x: x * x * 1.001)})
        for mode in ("fwd", "bwd", "fwdbwd"):
            assert rows["ours", mode].ms is not None
            assert rows["off", mode].ms is None and rows["off", mode].pct_of_ceiling is None
            assert rows["off", mode].error.startswith("wrong outputs: relative error 0.001")

    def test_one_lost_row_in_a_hundred_thousand_is_seen(self):
        want = torch.randn(100_000, 8)
        got = want.clone()
        got[-1] = 0
        assert (got - want).norm() / want.norm() < 0.01 < harness.relative_error(got, want)

    def test_a_wrong_gradient_spares_the_forward(self):
        rows = rows_of({"off": Impl(lambda x: (x * x.detach()) * 1.0)})
        assert rows["off", "fwd"].error is None and rows["off", "fwd"].ms is not None
        assert rows["off", "bwd"].error.startswith("wrong gradients") and rows["off", "fwdbwd"].ms is None

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_never_passes(self, value):
        got = torch.ones(4, 4)
        got[2, 1] = value
        assert harness.relative_error(got, torch.ones(4, 4)) == math.inf
        assert harness.relative_error(torch.ones(4), torch.ones(4, 1)) == math.inf

    def test_one_that_raises_keeps_its_words_and_stops_nobody(self):
        def broken(x):
            raise RuntimeError("no kernel image\n for this device")

        rows = rows_of({"bad": Impl(broken), "nan": Impl(lambda x: x * math.nan), "gone": ImportError("no libfoo.so"),
                        "ours": Impl(square)})
        assert rows["bad", "bwd"].error == "RuntimeError: no kernel image for this device"
        assert rows["gone", "fwd"].error == "ImportError: no libfoo.so"
        assert rows["nan", "fwd"].error == "wrong outputs: relative error inf, limit 1e-05"
        assert rows["ours", "fwdbwd"].ms is not None and len(rows) == 12
        json.dumps([r.to_dict() for r in rows.values()], allow_nan=False)

    def test_wrong_number_of_outputs(self):
        assert "2 outputs; expected 1" in rows_of({"off": Impl(lambda x: (x * x, x))})["off", "fwd"].error

    def test_one_that_writes_over_its_inputs_gets_copies(self):
        case = square_case(modes=("fwd",))
        before = case.make(0).inputs["x"]
        data = case.make(0)
        made = square_case(make=lambda seed: data, modes=("fwd",), grads=(), sets=1,
                           reference=lambda d: ([square(d.inputs["x"])], None))
        run_case("test", made, {"in place": Impl(lambda x: x.mul_(x), mutates=True)}, SETTINGS, CEILINGS)
        assert torch.equal(data.inputs["x"], before)

    def test_attention_reference_matches_autograd(self):
        from benchmarks.suites.attention import case, reference
        from qwen3_kernels.ops.attention import attention_ref

        for lengths, packed in (([48, 48], False), ([16, 48, 5], True)):
            data = case("cpu", lengths, 4, 2, 32, torch.float32, packed).make(0)
            want = autograd_reference(attention_ref, ("q", "k", "v"))(data)
            got = reference(data, lengths, block=20)
            for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


    def test_references_of_the_losses_in_parts_match_autograd(self, monkeypatch):
        """With a number of tokens that the parts do not divide, and different counts of labels in them."""
        from benchmarks.suites import loss
        from qwen3_kernels.ops.linear_cross_entropy import linear_cross_entropy_ref
        from qwen3_kernels.ops.linear_kl import linear_kl_ref

        monkeypatch.setattr(loss, "REFERENCE_TOKENS", 20)
        for case, ref in ((loss.case("cpu", 50, 8, 30, torch.float32), linear_cross_entropy_ref),
                          (loss.kl_case("cpu", 50, 8, 12, 30, torch.float32), linear_kl_ref)):
            data = case.make(0)
            got, want = case.reference(data), autograd_reference(ref, case.grads)(data)
            for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_the_reference_of_a_long_loss_never_holds_all_logits(self):
        from benchmarks.suites import loss
        from training.memory import allocated

        case = [c for c in loss.cases("cpu", True) if c.peers == ("liger",)][-1]
        data = case.make(0)
        assert allocated(lambda: case.reference(data))[1] < 8 * loss.REFERENCE_TOKENS * 520 * 4


class TestCommandLine:
    @pytest.mark.parametrize("argv,names", [
        (["nosuch"], suites.SUITES), (["pointwise", "--peers", "torch,nosuch"], peers.PEERS),
        (["pointwise", "--peers", ""], peers.PEERS), (["pointwise", "--threads", "0"], ["--threads"]),
        (["pointwise", "--device", "tpu"], ["cpu", "cuda"]), (["pointwise", "--fast"], ["--fast"]), ([], ["SUITE"]),
        (["pointwise", "--match", "("], ["--match", "no regular expression"]),
    ])
    def test_refuses_what_it_does_not_know(self, argv, names, capsys):
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        assert e.value.code == 2
        message = " ".join(capsys.readouterr().err.split())
        assert all(name in message for name in names)

    def test_match_names_the_cases(self, tmp_path, capsys):
        argv = ["pointwise", "attention", "--device", "cpu", "--quick", "--peers", "none", "--json", str(tmp_path / "r.json"), "--match"]
        assert cli.main([*argv, "packed|swiglu"]) == 0
        cases = {row["case"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
        assert len(cases) == 2 and all("packed" in case or "swiglu" in case for case in cases)
        assert cli.main([*argv, "nosuch"]) == 2
        assert "found in no case of pointwise, attention" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_refuses_a_gpu_that_is_not_there(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["pointwise", "--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err

    def test_peers_are_chosen(self):
        assert peers.select("all") == list(peers.PEERS) and peers.select("none") == []
        assert peers.select("torch, fa4,torch") == ["torch", "fa4"]

    def test_absent_peers_are_listed(self, monkeypatch):
        monkeypatch.setitem(peers.PEERS, "gone", peers.Peer("x", "no_such_module.sub", "no-such"))
        state = peers.status(["gone", "fa4", "torch"], "cpu")
        assert state == {"gone": "absent: not installed", "fa4": "absent: runs on CUDA only",
                         "torch": torch.__version__}
        assert "gone" not in peers.impls(square_case(op="rms_norm"), ["gone"], "cpu")

    def test_a_case_can_name_its_peers(self):
        found = [set(peers.impls(square_case(op="rms_norm", peers=only), ["torch", "compile"], "cpu"))
                 for only in (None, ("compile",), ())]
        assert found == [{"torch", "compile"}, {"compile"}, set()]

    def test_a_peer_whose_import_fails_becomes_a_row(self, monkeypatch):
        def factory(context):
            raise ImportError("built for another torch")

        monkeypatch.setitem(peers._FACTORIES, ("torch", "square"), factory)
        found = peers.impls(square_case(), ["torch"], "cpu")
        assert rows_of(found)["torch", "fwd"].error == "ImportError: built for another torch"


@pytest.mark.parametrize("suite", [s for s in suites.SUITES if s != "train_step"])  # that one is for CUDA
def test_every_suite_runs_on_the_cpu(suite, tmp_path, capsys):
    """The whole command on tiny shapes: nothing wrong in ours or torch's, and the JSON as documented."""
    file = tmp_path / "out" / "rows.json"
    status = cli.main([suite, "--device", "cpu", "--quick", "--threads", "1", "--json", str(file),
                       "--peers", "torch,sdpa-flash,transformers"])
    report = json.loads(file.read_text())
    errors = [(r["case"], r["impl"], r["error"]) for r in report["rows"] if "error" in r]
    assert status == 0 and not errors
    assert {"gpu", "versions", "commit", "rows", "ceilings", "date"} <= report.keys()
    assert report["gpu"] and {"python", "torch", "transformers", "qwen3_kernels"} <= report["versions"].keys()
    assert all(v > 0 for v in report["ceilings"].values())
    for row in report["rows"]:
        assert {"suite", "case", "impl", "mode", "ms", "tflops", "tbps", "pct_of_ceiling", "peak_mb"} <= row.keys()
        assert row["suite"] == suite and row["mode"] in harness.MODES
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["ms"] > 0
        assert (row["tflops"] or row["tbps"]) > 0 and row["pct_of_ceiling"] > 0 and row["peak_mb"] is None
    impls = {r["impl"] for r in report["rows"]}
    assert {"ours", "transformers" if suite == "generate" else "torch"} <= impls
    table = capsys.readouterr().out
    assert "% ceiling" in table and all(r["case"] in table for r in report["rows"])


def test_torch_compile_is_a_peer_on_the_cpu():
    case = next(iter(suites.module("pointwise").cases("cpu", True)))
    rows = run_case("pointwise", case, peers.impls(case, ["compile"], "cpu"), SETTINGS, CEILINGS, quick=True)
    assert [(r.impl, r.error, r.ms is not None) for r in rows] == [("compile", None, True)] * 3


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    rows = [Row("s", f"case {c}", i, m, pct_of_ceiling=50.0)
            for c in "ab" for i in ("ours", "torch") for m in ("fwd", "bwd")]
    plot.save(tmp_path / "p.png", [*rows, Row("s", "case a", "bad", "fwd", error="x")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_suite_is_a_row_and_a_status(monkeypatch, capsys):
    def cases(device, quick):
        raise RuntimeError("no room")
        yield

    monkeypatch.setattr(suites.module("pointwise"), "cases", cases)
    assert cli.main(["pointwise", "--device", "cpu", "--quick", "--peers", "none"]) == 1
    assert "RuntimeError: no room" in capsys.readouterr().out
