"""`toca report`: the page says what the trace says, in Chromium too."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import toca_kernels as toca
from models import sample, tiny_dit
from pipelines import PIPELINES
from test_trace import assert_equal
from toca_kernels.apps import report
from toca_kernels.apps.reporting import charts, images
from toca_kernels.apps.reporting.page import page
from toca_kernels.apps.sampling import Request
from toca_kernels.apps.storing.whole import save_text
from toca_kernels.trace import Trace

CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)
STEPS = 8
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; ∞"


class Tiny:
    """A sampler around a tiny DiT, whose latents are its pictures."""

    num_steps = STEPS

    def __init__(self, model):
        self.target = model

    def timesteps(self, steps):
        return None

    def sample(self, requests, *, seed, steps):
        latents = sample(self.target, steps, labels=[one.condition for one in requests])
        return (latents / 4 + 0.5).clamp(0, 1)


class OfPipeline:
    """A sampler around a stock pipeline that returns latents, with pictures made up."""

    num_steps = STEPS

    def __init__(self, name, shape):
        self.tiny, self.shape = PIPELINES[name], shape
        self.target = self.tiny()

    def timesteps(self, steps):
        return None

    def sample(self, requests, *, seed, steps):
        latents = self.tiny.call(self.target, steps)
        ramp = torch.linspace(0, 1, self.shape[-1]).expand(len(requests), *self.shape)
        return (ramp + 0.05 * latents.mean()).clamp(0, 1)


def recorded(sampler, config=CONFIG, count=2, caption=None):
    requests = [Request(at, caption or at) for at in range(count)]
    return report.record(sampler, requests, config, seed=0, steps=STEPS)


@functools.cache
def tiny_trace() -> Trace:
    return recorded(Tiny(tiny_dit()))


@functools.cache
def video_trace() -> Trace:
    config = toca.ToCaConfig(interval=3, fresh_ratio=0.3, selector="random")
    return recorded(OfPipeline("wan22", (9, 3, 16, 16)), config, 1, "waves")


@functools.cache
def flux_trace() -> Trace:
    config = toca.ToCaConfig(interval=3, fresh_ratio=0.3, selector="random")
    return recorded(OfPipeline("flux", (3, 32, 32)), config, 1, "a lighthouse")


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes, text within)."""

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.found.append(element)
        if tag not in ("img", "input", "meta", "br", "line", "rect", "path", "circle"):
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        for element in self._open:
            element[2] += text

    def all(self, tag, **attributes):
        return [
            (given, " ".join(text.split()))
            for name, given, text in self.found
            if name == tag and all(given.get(key) == value for key, value in attributes.items())
        ]

    def text(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return found[1]


def scene(text):
    return json.loads(Elements(text).text("script", id="trace"))


def decoded(uri):
    """The pixels of one of our PNGs, whose rows are all unfiltered."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, pixels = 8, b""
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        if kind == b"IHDR":
            W, H, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
        if kind == b"IDAT":
            pixels += zlib.decompress(body)
        at += 12 + length
    rows = np.frombuffer(pixels, np.uint8).reshape(H, -1)
    assert (rows[:, 0] == 0).all()
    channels = {0: 1, 2: 3, 6: 4}[colour]
    return rows[:, 1:].reshape(H, W, channels).squeeze()


# --- recording -----------------------------------------------------------------------------------


def test_a_record_holds_the_runs_that_were_asked_for():
    model = tiny_dit()
    sampler, requests = Tiny(model), [Request(0, 0), Request(1, 1)]
    untouched = sampler.sample(requests, seed=0, steps=STEPS)
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        session.record_selections = True
        result = sampler.sample(requests, seed=0, steps=STEPS)
        chosen = session.selections
    before = dict(vars(model))
    trace = recorded(sampler)
    assert vars(model) == before
    np.testing.assert_array_equal(trace.untouched, untouched.numpy())
    np.testing.assert_array_equal(trace.result, result.numpy())
    for step, mask in enumerate(chosen):
        ours = trace.parts[0].fresh("mlp")[step]
        assert ours.all() if mask is None else np.array_equal(ours, mask.numpy())
    assert trace.seconds.shape == trace.untouched_seconds.shape == (STEPS,)
    assert (trace.seconds > 0).all()
    assert (trace.untouched_seconds > 0).all()
    assert trace.captions == ("class 0", "class 1")
    assert trace.versions["torch"] == torch.__version__


def test_a_record_keeps_what_each_step_started_from():
    seen = {}

    class Looking(Tiny):
        def sample(self, requests, *, seed, steps):
            labels = [one.condition for one in requests]
            latents = sample(self.target, steps, labels=labels, each_step=seen.__setitem__)
            return (latents / 2 + 0.5).clamp(0, 1)

    trace = recorded(Looking(tiny_dit()))
    assert sorted(trace.samples) == list(range(STEPS - 1))
    for step, kept in trace.samples.items():
        expected = (seen[step + 1] / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        np.testing.assert_array_equal(kept, expected.numpy())


def test_latents_are_kept_as_pictures_of_their_own_size():
    kept = video_trace().samples
    assert sorted(kept) == list(range(STEPS - 1))
    assert {one.shape for one in kept.values()} == {(1, 3, 3, 8, 8)}  # (B, F, C, H, W)
    assert all(90 < one.mean() < 165 and one.std() > 10 for one in kept.values())


def test_cuda_graphs_need_a_gpu():
    requests = [Request(0, 0)]
    with pytest.raises(ValueError, match="cuda_graph: expected a model on a CUDA device"):
        report.record(Tiny(tiny_dit()), requests, CONFIG, seed=0, steps=STEPS, cuda_graph=True)


def test_times_are_medians_of_runs_in_turns(monkeypatch):
    order = []

    class Counting(Tiny):
        def sample(self, requests, *, seed, steps):
            order.append("_toca_session" in vars(self.target))
            return super().sample(requests, seed=seed, steps=steps)

    rows = iter([3.0, 5.0, 4.0, 30.0, 50.0, 40.0])
    monkeypatch.setattr(report, "_per_step", lambda *_: np.full(STEPS, next(rows)))
    requests = [Request(0, 0)]
    sampler = Counting(tiny_dit())
    trace = report.record(sampler, requests, CONFIG, seed=0, steps=STEPS, rounds=3)
    assert order == [False, *[False, True] * 3, True]  # warm-up, rounds, recording
    assert set(trace.seconds) == {4.0}
    assert set(trace.untouched_seconds) == {40.0}
    assert trace.versions["timed rounds"] == "3"


def test_times_of_two_models_are_put_one_behind_the_other():
    trace = video_trace()
    assert (trace.seconds > 0).all()
    assert (trace.untouched_seconds > 0).all()
    first, second = trace.parts[0].plan.num_steps, trace.parts[2].plan.num_steps
    watches = [argparse.Namespace(seconds=[1.0, 2.0] * first), argparse.Namespace(seconds=[5.0])]
    expected = [3.0] * first + [5.0 / second] * second
    assert report._per_step(trace, watches).tolist() == pytest.approx(expected)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_says_what_the_trace_says():
    trace = dataclasses.replace(
        tiny_trace(),
        seconds=np.linspace(0.01, 0.08, STEPS),
        untouched_seconds=np.full(STEPS, 0.09),
    )
    found = Elements(page(trace, "a title"))
    assert found.text("h1") == "a title"
    tiles = dict(
        zip(
            [text for _, text in found.all("dt")],
            [text for _, text in found.all("b")],
            strict=False,
        )
    )
    assert tiles["speed-up"] == f"{0.72 / 0.36:.2f}×"
    assert tiles["FLOPs ratio"] == f"{trace.flops_ratio:.2f}×"
    assert tiles["efficiency"] == f"{2 / trace.flops_ratio:.0%}"
    plan = trace.parts[0].plan
    assert tiles["tokens recomputed"] == f"{plan.k['mlp'].sum() / (STEPS * 3 * 64):.1%}"
    titles = [text for _, text in found.all("title")]
    for step, full in enumerate(trace.full_steps):
        kind = "full" if full else "cached"
        assert f"step {step}, {kind}: {1e3 * trace.seconds[step]:.2f} ms" in titles
        assert f"step {step}, {kind}: {trace.flops[step] / 1e6:.4g} MFLOPs" in titles
        achieved, ideal = 0.09 / trace.seconds[step], trace.ideal_step_speedups[step]
        assert f"step {step}: {achieved:.2f}× achieved, {ideal:.2f}× ideal" in titles
    table = trace.parts[0].age_histogram("mlp")
    for step, ages in enumerate(table):
        share = 100 * ages[0] / ages.sum()
        assert f"step {step}, computed in the step: {share:.1f} % of the tokens" in titles
    rows = [text for _, text in found.all("tr")]
    k = plan.k["mlp"][~plan.full["mlp"]]
    assert any(
        row.startswith(f"mlp364 (8 × 8)43{k.min()} to {k.max()}{k.mean():.1f}") for row in rows
    )
    assert f"cached features{trace.memory['cache_bytes'] / 2**20:.2f} MiB" in rows
    settings = json.loads(found.text("pre"))
    assert toca.ToCaConfig.from_dict(settings) == CONFIG


BAR = re.compile(r'<rect [^>]*height="([\d.]+)"><title>step (\d+), \w+: ([\d.]+) (ms|\w+FLOPs)')


def test_bars_are_as_high_as_their_numbers():
    trace = dataclasses.replace(tiny_trace(), seconds=np.linspace(0.01, 0.08, STEPS))
    bars = BAR.findall(page(trace, ""))
    assert [int(step) for _, step, _, _ in bars] == 2 * list(range(STEPS))
    for unit, values in (("ms", 1e3 * trace.seconds), ("MFLOPs", trace.flops / 1e6)):
        heights = np.array([float(height) for height, _, _, of in bars if of == unit])
        assert heights / heights.max() == pytest.approx(values / values.max(), abs=2e-3)


def test_dots_of_a_logarithmic_chart_are_where_their_numbers_are():
    svg = charts.dots(
        [1, 10, 100], ["full"] * 3, lines=[], unit="", label="", title=lambda step: ""
    )
    high = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert high[0] - high[1] == pytest.approx(high[1] - high[2], abs=0.02)
    assert high[0] > high[1]


def test_the_script_is_given_the_selections_bit_for_bit():
    trace = tiny_trace()
    (part,) = scene(page(trace, ""))["parts"]
    (module,) = part["modules"]
    assert (module["module"], module["tokens"], module["grid"]) == ("mlp", 64, [8, 8])
    assert module["layers"] == [0, 1, 2]
    rows = [(row["sample"], row["half"]) for row in module["rows"]]
    assert rows == [(0, 1), (1, 1), (0, 2), (1, 2)]
    fresh = trace.parts[0].fresh("mlp")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(module["bits"]), np.uint8))
    np.testing.assert_array_equal(bits.reshape(fresh.shape), fresh)
    counts = np.frombuffer(base64.b64decode(module["counts"]), np.uint8)
    np.testing.assert_array_equal(counts.reshape(STEPS, 4, 64), fresh.sum(axis=1))
    assert module["full"] == trace.parts[0].plan.full["mlp"].tolist()


def test_pictures_are_those_of_the_trace():
    trace = tiny_trace()
    text = page(trace, "")
    found = Elements(text)
    for column, samples in (("untouched", trace.untouched), ("ToCa", trace.result)):
        for at in range(2):
            ((given, _),) = found.all("img", **{"data-column": column, "data-sample": str(at)})
            expected = (255 * samples[at][:3]).round().astype(np.uint8)
            np.testing.assert_array_equal(decoded(given["src"]), expected.transpose(1, 2, 0))
    scale = images.difference_scale(trace.result, trace.untouched)
    largest = np.abs(trace.result - trace.untouched).max()
    assert 0.5 < largest * scale <= 1 or scale == 1
    ((given, _),) = found.all("img", **{"data-column": f"difference × {scale}", "data-sample": "1"})
    off = np.abs(trace.result - trace.untouched)[1][:3] * scale
    expected = (255 * off).round().astype(np.int64).transpose(1, 2, 0)
    assert np.abs(decoded(given["src"]) - expected).max() <= 1
    step3 = scene(text)["samples"]["3"][1][0]
    np.testing.assert_array_equal(decoded(step3), trace.samples[3][1][:3].transpose(1, 2, 0))


def test_large_pictures_are_made_smaller_and_keep_their_proportions():
    picture = np.linspace(0, 1, 600 * 1200, dtype=np.float32).reshape(1, 600, 1200)
    pixels = decoded(images.picture(picture))
    assert pixels.shape == (256, 512)
    assert abs(pixels.mean() - 127.5) < 1


def test_the_page_needs_nothing_else():
    for trace in (tiny_trace(), video_trace(), flux_trace()):
        text = page(trace, "title")
        for attributes in (given for _, given, _ in Elements(text).found):
            for name in ("src", "href", "srcset", "action", "data"):
                assert attributes.get(name, "data:").startswith("data:")
        outside = re.sub(r"data:image/png;base64,[\w+/=]*", "", text)
        assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttp|import\(", outside)


def test_what_the_user_wrote_is_text():
    trace = dataclasses.replace(
        tiny_trace(), captions=(HOSTILE, HOSTILE), model=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    plain = Elements(page(tiny_trace(), "title"))
    text = page(trace, HOSTILE)
    found = Elements(text)
    for tag in ("script", "img"):
        assert len(found.all(tag)) == len(plain.all(tag))
    assert not any("onerror" in given for _, given, _ in found.found)
    assert found.text("h1") == " ".join(HOSTILE.split())
    assert scene(text)["captions"] == [HOSTILE] * 2
    assert html.escape(HOSTILE) in text


def test_a_video_has_frames():
    trace = video_trace()
    text = page(trace, "")
    assert len(Elements(text).all("img", **{"data-column": "ToCa"})) == 9
    parts = scene(text)["parts"]
    assert [part["name"] for part in parts] == [
        "transformer, guidance branch 1",
        "transformer, guidance branch 2",
        "transformer_2, guidance branch 1",
        "transformer_2, guidance branch 2",
    ]
    assert {tuple(one["grid"]) for part in parts for one in part["modules"]} == {(3, 4, 4)}
    assert parts[2]["first"] == parts[0]["steps"]
    assert {len(frames) for kept in scene(text)["samples"].values() for frames in kept} == {3}


def test_a_grid_that_nobody_told_is_that_of_the_picture_and_texts_have_none():
    (part,) = scene(page(flux_trace(), ""))["parts"]
    grids = {one["module"]: one["grid"] for one in part["modules"]}
    assert grids == {"img_mlp": [8, 8], "txt_mlp": None, "single_mlp": None}
    wide = images.token_masks(flux_trace().parts[0], "img_mlp", (16, 64), 1)
    assert wide["grid"] == [4, 16]
    odd = images.token_masks(flux_trace().parts[0], "img_mlp", (48, 64), 1)
    assert odd["grid"] is None
    unknown = images.token_masks(flux_trace().parts[0], "img_mlp", None, None)
    assert unknown["grid"] is None


@pytest.mark.parametrize("ratio", [0.0, None])
def test_pages_of_runs_that_recompute_no_tokens(ratio):
    """FORA's k = 0; and a run in which every step is full."""
    config = toca.ToCaConfig(**({"interval": 1} if ratio is None else {"fresh_ratio": ratio}))
    trace = recorded(Tiny(tiny_dit()), config)
    text = page(trace, "")
    (module,) = scene(text)["parts"][0]["modules"]
    assert module["module"] == "mlp"
    counts = np.frombuffer(base64.b64decode(module["counts"]), np.uint8).reshape(STEPS, 4 * 64)
    assert (counts == 3 * trace.full_steps[:, None]).all()
    if ratio is None:
        assert trace.flops_ratio == 1
        assert np.array_equal(trace.result, trace.untouched)
        assert ">equal<" in text


def test_a_trace_without_samples_or_times_has_a_page():
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session, session.trace() as recorder:
        sample(model, STEPS)
    text = page(recorder.trace, "own loop")
    found = Elements(text)
    assert found.all("section", id="samples") == []
    assert found.all("img", **{"data-column": "ToCa"}) == []
    assert "estimated from this run's full steps" in html.unescape(text)
    (module,) = scene(text)["parts"][0]["modules"]
    assert [row["sample"] for row in module["rows"]] == [0, 1, 2, 3]


def test_samples_that_are_not_finite_are_said_to_be():
    trace = tiny_trace()
    broken = trace.result.copy()
    broken[0, 0, 3] = np.nan
    found = Elements(page(dataclasses.replace(trace, result=broken), ""))
    notes = [text for _, text in found.all("b")]
    assert notes.count("not finite") == 2  # of the sample, and of the mean
    ((given, _),) = found.all("img", **{"data-column": "ToCa", "data-sample": "0"})
    assert (decoded(given["src"])[3, :, 0] == 0).all()


def test_masks_of_long_videos_leave_layers_out(monkeypatch):
    part = tiny_trace().parts[0]
    monkeypatch.setattr(images, "_LAYER_BYTES", STEPS * 4 * 64 * 2 // 8)
    masks = images.token_masks(part, "mlp", (16, 16), 2)
    assert (masks["layers"], masks["all"]) == ([0, 2], 3)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(masks["bits"]), np.uint8))
    np.testing.assert_array_equal(bits.reshape(STEPS, 2, 4, 64), part.fresh("mlp")[:, [0, 2]])


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (10.0, [0, 2, 4, 6, 8, 10]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
        (7.0, [0, 2, 4, 6, 8]),
        (0.0, [0, 1]),
    ],
)
def test_ticks_are_round_and_reach_the_top(top, expected):
    assert charts.nice_ticks(top) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "top", "expected"),
    [
        (0.9, 8.5, [0.5, 1, 2, 5, 10]),
        (1.0, 1.0, [1, 2]),
        (0.5, 900, [0.1, 1, 10, 100, 1000]),
    ],
)
def test_ticks_of_ratios(low, top, expected):
    assert charts.log_ticks(low, top) == expected


def test_style_and_script_are_in_the_package():
    """Files that are not Python must be named there."""
    packaged = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (said,) = re.findall(r'^"toca_kernels\.apps\.reporting" = \[(.*)\]', packaged, re.M)
    beside = {path.suffix for path in Path(charts.__file__).parent.iterdir() if path.is_file()}
    assert beside == {".py", ".css", ".js"}
    assert {"*.css", "*.js"} <= set(re.findall(r'"(.*?)"', said))


# --- the command ---------------------------------------------------------------------------------


def command(*arguments):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(one) for one in arguments]))


SAMPLER = """
import torch
from models import sample, tiny_dit

class Tiny:
    num_steps = 8
    target = tiny_dit()
    def timesteps(self, steps):
        return None
    def sample(self, requests, *, seed, steps):
        return sample(self.target, steps, labels=[one.condition for one in requests]).clamp(0, 1)

def sampler(*, device, dtype):
    torch.manual_seed(0)
    return Tiny()
"""


def test_the_command_samples_saves_and_draws(tmp_path, capsys):
    target, out, kept = tmp_path / "own.py", tmp_path / "new" / "page.html", tmp_path / "run.npz"
    target.write_text(SAMPLER)
    arguments = [target, "--preset", "dit-ddim50", "--classes", "3,5", "--count", "3"]
    arguments += ["--device", "cpu", "--steps", "9", "--trace", kept, "--out", out]
    assert command(*arguments) == 0
    trace = Trace.load(kept)
    assert trace.captions == ("class 3", "class 5", "class 3")
    assert trace.config == toca.ToCaConfig.preset("dit-ddim50")
    assert trace.num_steps == 9
    said = f"9 steps, FLOPs ratio {trace.flops_ratio:.2f}, speed-up {trace.speedup:.2f}"
    assert said in capsys.readouterr().out
    text = out.read_text()
    assert f"{tmp_path.name}/own.py" in text
    again = tmp_path / "again.html"
    assert command(kept, "--out", again, "--title", f"{tmp_path.name}/own.py") == 0
    assert again.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == [
        "again.html",
        "own.py",
        "run.npz",
    ]


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    kept, out = tmp_path / "run.npz", tmp_path / "page.html"
    tiny_trace().save(kept)
    for arguments, match in [
        ([kept, "--steps", "3"], "steps: expected to be left out where .*run.npz is a saved trace"),
        ([kept, "--preset", "flux-50"], "preset: expected to be left out"),
        (["x.py"], "preset: expected --config or one of dit-ddim50"),
        (["x.py", "--preset", "none"], "preset: expected one of"),
        (["x.py", "--preset", "flux-50", "--count", "0"], "count: expected at least 1, got 0"),
        (["x.py", "--preset", "flux-50", "--call", "[1]"], "call: expected a JSON object"),
        (["x.py", "--preset", "flux-50", "--classes", "a"], "classes: expected"),
    ]:
        with pytest.raises(ValueError, match=match):
            command(*arguments, "--out", out)
    with pytest.raises(OSError, match=r"x\.py"):
        command("x.py", "--preset", "flux-50", "--out", out)
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"expected a trace that Trace\.save wrote"):
        command(kept, "--out", out)
    assert not out.exists()


def test_a_trace_survives_the_report(tmp_path):
    trace = video_trace()
    trace.save(tmp_path / "video.npz")
    assert_equal(Trace.load(tmp_path / "video.npz"), trace)


# --- in a browser --------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Browser:
    """Headless Chromium with a profile of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _run(self, *arguments: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--virtual-time-budget=5000", "--enable-logging=stderr", "--log-level=0"]
        done = subprocess.run(
            [BROWSER, *options, f"--user-data-dir={self.folder}/profile", *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert [line for line in complaints if "willReadFrequently" not in line] == []
        return done.stdout

    def elements(self, path: Path, fragment: str = "") -> Elements:
        """The page's, after its script ran."""
        return Elements(self._run("--dump-dom", f"{path.as_uri()}{fragment}"))

    def screenshot(self, path: Path, fragment: str, shot: Path, size: tuple[int, int]) -> None:
        window = f"--window-size={size[0]},{size[1]}"
        self._run(f"--screenshot={shot}", window, f"{path.as_uri()}{fragment}")


@pytest.fixture
def browser(tmp_path):
    if not BROWSER:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return Browser(tmp_path)


def written(tmp_path, trace):
    path = tmp_path / "page.html"
    save_text(path, page(trace, "a title"))
    return path


@pytest.mark.slow
def test_the_browser_shows_the_step_that_is_asked_for(tmp_path, browser):
    trace = tiny_trace()
    path = written(tmp_path, trace)
    fresh = trace.parts[0].fresh("mlp")
    found = browser.elements(path, "#step=4&layer=2&row=3")
    count = int(fresh[4, 2, 3].sum())
    expected = f"Step 4 (0 to 7), cached: {count} of 64 tokens of mlp recomputed "
    assert found.text("output", id="state") == expected + f"({100 * count / 64:.1f} %), layer 2."
    ages = trace.parts[0].ages("mlp")[4, 2, 3]
    said = f"Ages after step 4: {ages.mean():.2f} steps on average, {ages.max()} at most."
    assert found.text("output", id="age-state") == said
    cached = ~trace.full_steps
    times = fresh[cached, 2, 3].sum(axis=0)
    said = f"in {cached.sum()} cached steps: {times.min()} to {times.max()} times, "
    assert f"{said}{times.mean():.1f} on average." in found.text("output", id="heat-state")
    thumbs = found.all("button", **{"data-step": "4"})
    assert thumbs[0][0]["aria-current"] == "step"
    shares = [text for given, text in found.all("button") if "data-step" in given]
    assert shares == [
        f"{step}: full" if full else f"{step}: {100 * fresh[step, 2, 3].mean():.1f} %"
        for step, full in enumerate(trace.full_steps)
    ]


# Reads the middle of every cell of the overlay, moves the slider, reads again, and plays.
PROBE = """<pre id="probe"></pre><script>
addEventListener("load", () => {
  const get = (id) => document.getElementById(id), canvas = get("overlay"), seen = [];
  const read = () => {
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const W = canvas.width, cell = W / 8, cells = [];
    const { data } = context.getImageData(0, 0, W, W);
    for (let y = 0; y < 8; y++) {
      for (let x = 0; x < 8; x++) {
        const at = 4 * ((y + 0.5) * cell * W + (x + 0.5) * cell);
        cells.push([data[at], data[at + 1], data[at + 2]]);
      }
    }
    const said = get("state").textContent, thumb = document.querySelector("[aria-current]");
    const text = [said, location.hash, get("play").textContent, thumb.dataset.step];
    seen.push({ cells, text });
    get("probe").textContent = JSON.stringify(seen);
  };
  read();
  get("step").value = 5;
  get("step").dispatchEvent(new Event("input"));
  read();
  get("play").click();
  setTimeout(read, 700);
  setTimeout(() => { get("play").click(); read(); }, 1000);
});
</script></body>"""


@pytest.mark.slow
def test_the_overlay_follows_the_slider_and_plays(tmp_path, browser):
    trace = tiny_trace()
    fresh = trace.parts[0].fresh("mlp")[:, 2, 3]
    path = tmp_path / "page.html"
    path.write_text(page(trace, "").replace("</body>", PROBE), encoding="utf-8")
    found = browser.elements(path, "#step=4&layer=2&row=3&beneath=none")
    seen = json.loads(found.text("pre", id="probe"))
    ground, orange = np.array([48, 52, 59]), np.array([232, 119, 24])
    steps = []
    for one in seen:
        steps.append(int(re.match(r"Step (\d+)", one["text"][0])[1]))
        assert one["text"][3] == str(steps[-1])
        if trace.full_steps[steps[-1]]:
            continue
        expected = np.where(fresh[steps[-1]][:, None], 0.2 * ground + 0.8 * orange, ground)
        assert np.abs(np.array(one["cells"]) - expected).max() <= 2
    assert steps[:2] == [4, 5]
    assert steps[2] in (6, 7)  # 0.7 s at 0.3 s a step
    assert steps[3] in (0, steps[2] + 1)
    assert [one["text"][2] for one in seen] == ["Play", "Play", "Pause", "Play"]
    assert "step=5&" in seen[1]["text"][1]
    assert f"step={steps[3]}&" in seen[3]["text"][1]


@pytest.mark.slow
@pytest.mark.parametrize("make", [video_trace, flux_trace], ids=["video", "text"])
def test_the_browser_shows_videos_and_texts(tmp_path, browser, make):
    trace = make()
    path = written(tmp_path, trace)
    if make is video_trace:
        part, fragment, module = 2, "#step=6&part=2&frame=2", "mlp"
    else:
        part, fragment, module = 0, "#step=4&module=txt_mlp", "txt_mlp"
    found = browser.elements(path, fragment)
    step = int(re.search(r"step=(\d)", fragment)[1])
    chosen = trace.parts[part]
    mean = chosen.fresh(module)[step - chosen.first, :, 0].sum(axis=1).mean()
    said = found.text("output", id="state")
    assert f"{round(mean, 1):g} of {chosen.plan.num_tokens[module]} tokens of {module}" in said
    if make is video_trace:
        shown = [
            given["data-frame"]
            for given, _ in found.all("img", **{"data-column": "ToCa"})
            if "hidden" not in given
        ]
        charts = [given for given, _ in found.all("figure", **{"class": "ages"})]
        assert len(charts) == 8
        ((at, name),) = [
            (one["data-part"], one["data-module"]) for one in charts if "hidden" not in one
        ]
        assert (at, name) == ("2", "mlp")
        assert shown == ["8"]  # the last of nine frames, at the last of the grid's three
        assert "hidden" not in found.all("label", id="frame-label")[0][0]


@pytest.mark.slow
def test_the_browser_survives_addresses_and_texts_that_are_wrong(tmp_path, browser):
    trace = dataclasses.replace(tiny_trace(), captions=(HOSTILE, HOSTILE))
    path = written(tmp_path, trace)
    for fragment in ("#step=99&part=7&module=none&row=-4&layer=50&beneath=x", "#step=abc&frame="):
        found = browser.elements(path, fragment)
        step = 7 if "99" in fragment else 0
        assert found.text("output", id="state").startswith(f"Step {step} (0 to 7)")
        assert len(found.all("script")) == 2


DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "sampler.py"


@pytest.mark.slow
def test_the_screenshot_that_docs_show(tmp_path, browser):
    """docs/report.png is this of 50 steps and classes 0-5, at #step=34&row=3."""
    pytest.importorskip("diffusers", reason="the digits model is one of diffusers")
    pytest.importorskip("sklearn", reason="the digits' code imports scikit-learn")
    out, shot = tmp_path / "digits.html", tmp_path / "report.png"
    arguments = ["--preset", "dit-ddim50", "--device", "cpu", "--out", out]
    command(DIGITS, *arguments, "--classes", "0-1", "--steps", "12")
    browser.screenshot(out, "#step=9", shot, (1280, 2580))
    header = shot.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) == (1280, 2580)
    assert shot.stat().st_size > 100_000  # an empty page has 15 kB
