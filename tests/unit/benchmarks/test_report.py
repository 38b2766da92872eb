"""Tables and plots come from JSON alone, between README's markers."""

import json

import pytest
import report
import tables

ABOUT = {
    "device": "Some GPU",
    "device_type": "cuda",
    "driver": "1.2",
    "cuda": "13.0",
    "threads": 4,
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "onnxruntime": None, "openvino": None},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "date": "2026-11-22T12:00:00+00:00",
}
README = """# Title

<!-- benchmark:model -->
old
<!-- /benchmark -->

between

<!-- benchmark:stages -->
<!-- /benchmark -->
"""


def spread(value):
    return {"median": value, "low": value, "high": value, "count": 3}


def row(variant, batch, seconds=None, ratio=None, status="timed", **more):
    base = {"model": "base", "variant": variant, "precision": "tf32", "batch": batch}
    base |= {"status": status, **more}
    if seconds is not None:
        base |= {"seconds": spread(seconds), "ratio": spread(ratio), "deviation": 1.4e-6}
    return base


@pytest.fixture
def results(tmp_path):
    content = {
        "kind": "model",
        "environment": ABOUT,
        "rows": [
            row("reference", 1, 0.0421, 1.0),
            row("reference", 64, 0.5, 1.0),
            row("accelerated", 1, 0.00085, 49.5),
            row("accelerated", 64, status="differs", reason="", deviation=0.5),
            row("openvino", 1, status="unavailable", reason="not here"),
        ],
        "stages": [
            {
                "model": "base",
                "variant": "reference",
                "batch": 1,
                "stages": {"GRU": spread(3.0), "rest": spread(1.0)},
            }
        ],
        "training": [row("reference", 64, 1.5, 1.0, peak_bytes=3 * 2**30)],
    }
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "gpu.json").write_text(json.dumps(content))
    (folder / "summary.json").write_text(json.dumps({"kind": "suite"}))
    (tmp_path / "README.md").write_text(README)
    return folder


def call(folder, *more):
    return report.main(
        ["--results", str(folder), "--pages", str(folder.parent / "README.md"), *more]
    )


def test_sections_are_written_between_their_markers(results):
    assert call(results, "--no-plots") == 0
    text = (results.parent / "README.md").read_text()
    assert "old" not in text
    assert text.startswith("# Title\n\n<!-- benchmark:model -->\n| network")
    assert "\n<!-- /benchmark -->\n\nbetween\n" in text
    assert "| base, reference, tf32 | 42.1 ms (1.00x) | 500 ms (1.00x) | 1e-06 |" in text
    assert "| base, accelerated, tf32 | 850 µs (49.5x) | differs | 5e-01 |" in text
    assert "openvino" not in text
    assert "| GRU | 75% |" in text
    assert "| in all | 4.00 s |" in text
    assert "Some GPU; driver 1.2, CUDA 13.0; PyTorch 2.11.0; Triton 3.6.0; 2026-11-22" in text
    assert "commit 012345678." in text


def test_check_says_whether_readme_is_current(results, capsys):
    assert call(results, "--check") == 1
    assert "is not what" in capsys.readouterr().out
    call(results, "--no-plots")
    assert call(results, "--check") == 0
    (results / "gpu.json").unlink()
    assert call(results, "--check") == 1


def test_training_and_golden_tables(results):
    read = report.read(results)
    assert set(read) == {"gpu"}
    assert "| base, reference, tf32, batch 64 | 1.50 s (1.00x) | 3.00 GiB |" in report.section(
        "training", read
    )
    assert report.section("golden", read) == "Not measured yet."
    read["golden"] = {"kind": "golden", "columns": ["what", "off"], "rows": [["sr", "3.9e-6"]]}
    assert report.section("golden", read) == "| what | off |\n| --- | ---: |\n| sr | 3.9e-6 |"


def test_operations_of_pytest_benchmark():
    def entry(way, batch, median, **extra):
        name = f"bench_bigru[torch.bfloat16-vertical-{batch}-forward-{way}]"
        return {
            "name": name,
            "params": {"implementation": way, "N": batch, "direction": "forward"},
            "stats": {"median": median},
            "extra_info": {"device": "Some GPU", **extra},
        }

    content = {
        "machine_info": {},
        "commit_info": {"id": "0123456789abcdef0123456789abcdef01234567"},
        "datetime": "2026-11-22T12:00:00",
        "benchmarks": [
            entry("reference", 64, 4e-4),
            entry("reference", 1, 1.0),
            entry("compiled", 64, 2e-4),
            entry("fused", 64, 1e-4, floors=2.5),
            {"name": "bench_bigru_cudnn[64]", "params": {"N": 64}, "stats": {"median": 1.0}},
        ],
    }
    text = report.section("ops", {"ops": content})
    expected = (
        "| bigru bfloat16 vertical forward, batch 64 "
        "| 400 µs | 200 µs | 100 µs | 4.00x | 2.00x | 2.50 |"
    )
    assert expected in text
    assert text.count("\n| ") == 2
    assert "Some GPU; 2026-11-22, commit 012345678." in text


def test_an_unknown_marker_is_named(results):
    with pytest.raises(ValueError, match="no table 'speed'"):
        report.rewritten("<!-- benchmark:speed -->\n<!-- /benchmark -->", {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.9996, "1000 ms"), (0.09996, "100 ms"), (0.0099, "9.90 ms"),
     (9.87e-7, "0.99 µs")],
)  # fmt: skip
def test_durations_have_three_figures(seconds, text):
    assert tables.duration(seconds) == text


def test_plot_is_the_same_for_the_same_json(results):
    pytest.importorskip("matplotlib")
    call(results)
    first = (results / "gpu.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    call(results)
    assert (results / "gpu.png").read_bytes() == first


def test_the_pages_are_what_the_results_make_them(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_numbers_of_a_tree_with_changes_are_refused(results, capsys):
    content = json.loads((results / "gpu.json").read_text())
    content["environment"]["commit"] += "+"
    (results / "gpu.json").write_text(json.dumps(content))
    before = (results.parent / "README.md").read_text()
    assert call(results, "--no-plots") == 1
    assert "gpu was measured on a tree with uncommitted changes" in capsys.readouterr().out
    assert (results.parent / "README.md").read_text() == before


def test_an_evaluation_becomes_a_table_of_readings_and_gains(results):
    def value(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    row = {"tesseract accuracy": value(0.5), "prior accuracy": value(0.2), "PSNR": value(22.0)}
    content = {
        "results": {"hard": {"bicubic": row, "SR": row | {"PSNR": value(23.25)}}},
        "gain_over_bicubic": {"hard": row | {"PSNR": value(1.25)}},
    }
    (results / "small.json").write_text(json.dumps(content))
    readme = results.parent / "README.md"
    readme.write_text("<!-- benchmark:evaluation -->\n<!-- /benchmark -->\n")
    call(results, "--no-plots")
    text = readme.read_text()
    assert "| crops, image | tesseract accuracy | prior accuracy | PSNR |" in text
    read = "50.0 % (40.0 to 60.0) | 20.0 % (10.0 to 30.0)"
    assert f"| hard, SR | {read} | 23.25 (23.15 to 23.35) |" in text
    gain = "+50.0 (+40.0 to +60.0) | +20.0 (+10.0 to +30.0)"
    assert f"| hard, gain over bicubic | {gain} | +1.25 (+1.15 to +1.35) |" in text
