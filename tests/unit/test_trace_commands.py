"""``moray trace replay`` and ``moray trace plot``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moray.deploy.cli import app
from moray.deploy.trace_report import parse_budget
from moray.runtime.errors import ConfigError
from moray.runtime.trace.format import TraceHeader, read_trace
from moray.runtime.trace.simulate import simulate

TRACES = sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.msgpack"))


@pytest.fixture
def traces(tmp_path: Path) -> list[Path]:
    """The first 140 tokens or so of each; they end within a record."""
    short = [tmp_path / path.name for path in TRACES]
    for path, whole in zip(short, TRACES, strict=True):
        path.write_bytes(whole.read_bytes()[:20_000])
    return short


def moray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_replay_prints_every_policy_at_the_usual_budgets(traces: list[Path]) -> None:
    result = moray("trace", "replay", *traces)
    assert result.exit_code == 0
    table = re.findall(r"^(?:.*slots\))? +(\S+) +([\d.]+) % .*[\d.]+-[\d.]+ *$", result.stdout, re.MULTILINE)
    assert [name for name, _ in table] == ["lfu", "layer-lru", "lru", "belady"] * 4
    read = [read_trace(path) for path in traces]
    budgets = [12, 19, 28, 38]
    rates = [simulate(read, name, budgets[i // 4], 2e9).hit_rate for i, (name, _) in enumerate(table)]
    assert [rate for _, rate in table] == [f"{100 * rate:.1f}" for rate in rates]
    assert "everything resident" in result.stdout and "recall of prefetch by layers ahead 1: 7" in result.stdout


def test_replay_as_json_gives_what_was_asked_for() -> None:
    result = moray("trace", "replay", TRACES[0], "--budget", "12 slots", "--budget", "10MiB", "--policy", "lru",
                   "--policy", "belady", "--bandwidth", "1GB", "--json")  # fmt: skip
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    trace = read_trace(TRACES[0])
    (described,) = document["traces"]
    assert described["layer_calls"] == len(trace.layers_C) and described["recorded_hit_rate"] == 1.0
    assert described["experts"] == [8] * 6 and set(described["recall_by_distance"]) == {"1", "2", "3"}
    found = [(o["budget"], o["num_slots"], o["policy"]) for o in document["outcomes"]]
    slots = (10 << 20) // trace.header.shard_bytes[0]
    assert found == [(b, n, p) for b, n in (("12 slots", 12), ("10MiB", slots)) for p in ("lru", "belady")]
    for outcome in document["outcomes"]:
        expected = simulate([trace], outcome["policy"], outcome["num_slots"], 1e9)
        assert outcome["hit_rate"] == expected.hit_rate and outcome["serial_s"] == pytest.approx(expected.serial_s)


def test_a_torn_trace_is_replayed_and_said(tmp_path: Path) -> None:
    torn = tmp_path / "torn.trace"
    torn.write_bytes(TRACES[0].read_bytes()[:-2])
    result = moray("trace", "replay", torn, "--budget", "50%", "--json")
    assert result.exit_code == 0
    assert "bytes are of a record that was not written whole; left out" in result.stderr
    assert json.loads(result.stdout)["traces"][0]["layer_calls"] == len(read_trace(TRACES[0]).layers_C) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.trace"], "cannot read none.trace: No such file or directory"),
        ([__file__], "is not a trace; record one with `moray trace record`"),
        ([TRACES[0], "--budget", "1%"], "--budget 1% holds no expert; one takes 676.0 KiB, all 48 take 31.7 MiB"),
        ([TRACES[0], "--budget", "many"], "--budget is 'many', expected"),
        ([TRACES[0], "--policy", "fifo"], "--policy is 'fifo', expected one of lfu, layer-lru, lru, belady"),
        ([TRACES[0], "--bandwidth", "0"], "--bandwidth is '0', which is no memory at all"),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], message: str) -> None:
    result = moray("trace", "replay", *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_budgets_in_slots() -> None:
    header = TraceHeader("", "", (8, 8, 4), (4096, 8192, 4096))
    texts = ["25%", "12.5 %", "250%", "1 slot", "7slots", "100 slots", "20480", "1MiB"]
    assert [parse_budget(text, header) for text in texts] == [5, 2, 20, 1, 7, 20, 2, 20]
    for text in ("0%", "0 slots", "8191", "4%", "-3 slots", "%", ""):
        with pytest.raises(ConfigError, match="--budget"):
            parse_budget(text, header)


def test_plot_draws_every_curve(traces: list[Path], tmp_path: Path) -> None:
    from matplotlib.image import imread

    output = tmp_path / "a.png"
    result = moray("trace", "plot", *traces, "-o", output)
    assert result.exit_code == 0 and result.stdout == f"wrote {output}\n"
    pixels = imread(output)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1200
    left, right = np.split(pixels, [pixels.shape[1] // 2], axis=1)
    # The colors of lfu, layer-lru and lru on the left, of the three traces on the right; Belady's grey.
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)):
        for half in (left, right):
            assert (np.abs(half - np.array(color) / 255) < 0.01).all(axis=-1).sum() > 100
    assert (np.abs(left - 0x55 / 255) < 0.01).all(axis=-1).sum() > 100


def test_plot_says_what_it_lacks(traces: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = moray("trace", "plot", TRACES[0], "-o", tmp_path / "none" / "a.png")
    assert result.exit_code == 2 and "no such directory; choose another file with -o" in result.stderr
    result = moray("trace", "plot", traces[0], "-o", tmp_path)
    assert result.exit_code == 2 and "Is a directory; choose another file with -o" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = moray("trace", "plot", TRACES[0], "-o", tmp_path / "a.png")
    assert result.exit_code == 2 and "pip install 'moray-moe[plot]'" in result.stderr
