"""`toca eval`: what is drawn, what is done again, what is written."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from test_metrics import clip_folder
from toca_kernels.apps import eval as evaluation
from toca_kernels.apps.evaluation import settings
from toca_kernels.apps.evaluation.features import Extractor, Features
from toca_kernels.apps.evaluation.generation import Job
from toca_kernels.apps.evaluation.pareto import draw_pareto, front
from toca_kernels.apps.evaluation.perceptual import _layers
from toca_kernels.apps.evaluation.quality import COLUMNS, Found, Judges, rows
from toca_kernels.apps.evaluation.references import Reference
from toca_kernels.apps.evaluation.rounds import Rounds, Times
from toca_kernels.apps.evaluation.settings import Setting, parse_settings, read_settings
from toca_kernels.apps.sampling import Request
from toca_kernels.apps.storing import arrays, whole
from toca_kernels.apps.storing.pictures import save_samples
from toca_kernels.config import ToCaConfig

pytest.importorskip("torchmetrics", reason="it computes SSIM")
pytest.importorskip("matplotlib", reason="it draws the pictures")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
STEPS = 6

# A tiny untrained model in place of the digits' one, with their loop; it notes what it draws.
SAMPLER = """
import sys
sys.path.insert(0, {digits!r})
import torch
from diffusers import DiTTransformer2DModel
from digits import MODEL_CONFIG, sample, scheduler
from toca_kernels.apps.sampling import noise

class Tiny:
    num_steps = {steps}

    def __init__(self, width):
        torch.manual_seed(0)
        tiny = dict(num_layers=2, num_attention_heads=2, attention_head_dim=width, patch_size=4)
        self.target = DiTTransformer2DModel(**(MODEL_CONFIG | tiny)).eval().requires_grad_(False)
        for weight in self.target.parameters():
            if weight.ndim > 1:
                weight.copy_(0.15 * torch.randn(weight.shape))

    def timesteps(self, steps):
        ddim = scheduler()
        ddim.set_timesteps(steps)
        return ddim.timesteps.tolist()

    def sample(self, requests, *, seed, steps):
        with open({log!r}, "a") as file:
            file.write(f"{{seed}} {{steps}} {{len(requests)}} {{torch.get_num_threads()}}\\n")
        x = noise(seed, [one.index for one in requests], (1, 32, 32))
        shown = [one.condition for one in requests]
        labels = torch.tensor([len(one) % 10 if isinstance(one, str) else one for one in shown])
        drawn = sample(self.target, labels, num_steps=steps, noise=x, progress=False)
        return (drawn / 2 + 0.5).clamp(0, 1) {change}

def sampler(*, device, dtype, width=8):
    return Tiny(width)
"""
SETTINGS = [
    {"name": "half the steps", "policy": "fewer steps", "config": None, "steps": STEPS // 2},
    {"name": "N=3", "policy": "ToCa", "config": "dit-ddim50"},
    {"name": "N=2", "policy": "ToCa", "config": {"preset": "dit-ddim50", "interval": 2}},
    {"name": "full", "policy": "full", "config": {"interval": 1, "selector": "random"}},
]
NAMES = ["untouched", *(one["name"] for one in SETTINGS)]


class Folder:
    """A sampler, its settings and the results, and runs of `toca eval` on them."""

    def __init__(self, path):
        self.path = path
        self.target, self.out, self.log = path / "tiny.py", path / "out", path / "drawn.txt"
        self.write()
        self.settings(SETTINGS)

    def write(self, change=""):
        text = SAMPLER.format(digits=str(DIGITS), steps=STEPS, log=str(self.log), change=change)
        self.target.write_text(text)

    def settings(self, entries):
        (self.path / "settings.json").write_text(json.dumps(entries))

    def run(self, *argv, samples=5, seeds=2, timing=0):
        """What was drawn in this run: (seed, steps, samples, threads) of each call."""
        self.log.write_text("")
        parser = argparse.ArgumentParser()
        evaluation.add_arguments(parser)
        given = [str(self.target), "--settings", str(self.path / "settings.json")]
        given += ["--out", str(self.out), "--device", "cpu", "--time-rounds", str(timing)]
        given += ["--samples", str(samples), "--seeds", str(seeds), *argv]
        if "--prompts" not in argv:
            given += ["--classes", "0-9"]
        assert evaluation.run(parser.parse_args(given)) == 0
        return [tuple(map(int, line.split())) for line in self.log.read_text().splitlines()]

    def rows(self):
        with open(self.out / "results.csv", newline="") as file:
            return {row["name"]: row for row in csv.DictReader(file)}

    def stored(self):
        return {path.name: path.read_bytes() for path in (self.out / "samples").iterdir()}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("diffusers", reason="the digits' loop is that of diffusers")
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything: judged, timed and exported."""
    pytest.importorskip("diffusers", reason="the digits' loop is that of diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        made = Folder(tmp_path_factory.mktemp("finished"))
        made.drawn = made.run("--features", str(DIGITS / "quality.py"), "--export", timing=2)
    return made


# --- a run ---------------------------------------------------------------------------------------


def test_every_setting_draws_the_same(finished):
    quality = finished.drawn[: 2 * len(NAMES)]
    timing = finished.drawn[2 * len(NAMES) :]
    each = [(seed, STEPS // 2 if name == "half the steps" else STEPS, 5)
            for seed in (0, 1) for name in NAMES]  # fmt: skip
    assert [call[:3] for call in quality] == each
    # One round that does not count and two that do, each in another order.
    assert len(timing) == 3 * len(NAMES)
    assert {call[2] for call in timing} == {4}
    turns = [[call[1] for call in timing[at : at + len(NAMES)]] for at in range(0, 15, 5)]
    assert turns[1].index(STEPS // 2) != turns[2].index(STEPS // 2)


def test_csv(finished):
    text = (finished.out / "results.csv").read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    found = finished.rows()
    assert list(found) == NAMES
    base, half, three, two, full = found.values()
    assert (base["psnr"], base["ssim"], base["rel_l2"]) == ("inf", "1.0", "0.0")
    assert full["psnr"] == "inf"  # full steps are the model's own
    assert 10 < float(three["psnr"]) < float(two["psnr"]) < 80
    assert float(half["psnr"]) < float(two["psnr"])
    assert float(three["rel_l2"]) > float(two["rel_l2"]) > 0
    assert float(three["psnr_std"]) > 0
    for row in found.values():
        assert (row["seeds"], row["samples"], row["nan_scores"]) == ("2", "10", "0")
        assert (row["lpips"], row["clip"]) == ("", "")
        for name in ("fid", "sfid", "precision", "recall", "is"):
            assert math.isfinite(float(row[name]))
            assert math.isfinite(float(row[f"{name}_std"]))
            assert math.isfinite(float(row[f"{name}_all"]))
        assert 0 <= float(row["accuracy"]) <= 1
        assert float(row["seconds"]) > 0
        assert row["rounds"] == "2"
        assert float(row["speedup_slowest"]) <= float(row["speedup"])
        assert float(row["speedup"]) <= float(row["speedup_fastest"])
    assert full["fid"] == base["fid"]
    assert (base["speedup"], base["flops_ratio"], base["efficiency"]) == ("1.0", "1.0", "")
    assert float(half["flops_ratio"]) == 2
    assert float(half["tflops"]) == pytest.approx(float(base["tflops"]) / 2)
    assert float(full["flops_ratio"]) == pytest.approx(1)
    assert min(float(three["flops_ratio"]), float(two["flops_ratio"])) > 1.3
    ratio = float(base["tflops"]) / float(three["tflops"])
    assert float(three["flops_ratio"]) == pytest.approx(ratio)


def test_json(finished):
    found = json.loads((finished.out / "results.json").read_text())
    assert found["rows"][0]["psnr"] is None  # JSON has no infinity
    assert [row["name"] for row in found["rows"]] == NAMES
    assert found["settings"][2]["config"]["interval"] == 3
    assert found["settings"][1] == SETTINGS[0]
    assert found["features"] == found["reference"] == "quality.py"
    assert found["seeds"] == [0, 2]
    assert found["machine"]["torch"] == torch.__version__


def test_pictures(finished):
    for name in ("pareto_psnr.png", "pareto_fid.png", "side_by_side.png"):
        content = (finished.out / name).read_bytes()
        assert content[:4] == b"\x89PNG"
        assert len(content) > 10_000


def test_export_is_what_evaluators_read(finished):
    files = sorted((finished.out / "export").iterdir())
    assert [path.name for path in files] == [
        "00-untouched.npz", "01-half-the-steps.npz", "02-N=3.npz", "03-N=2.npz", "04-full.npz",
    ]  # fmt: skip
    arrays = [np.load(path)["arr_0"] for path in files]
    assert {(one.shape, one.dtype.name) for one in arrays} == {((10, 32, 32, 3), "uint8")}
    assert np.array_equal(arrays[0], arrays[4])
    assert not np.array_equal(arrays[0], arrays[2])
    assert np.array_equal(arrays[0][..., 0], arrays[0][..., 2])
    assert arrays[0].std() > 10


# --- what is done again --------------------------------------------------------------------------


def test_a_second_run_draws_nothing(folder):
    assert len(folder.run(timing=1)) == (2 + 2) * len(NAMES)
    before, rows = folder.stored(), folder.rows()
    assert folder.run(timing=1) == []
    assert folder.stored() == before
    assert folder.rows() == rows


def test_a_run_that_was_broken_off_goes_on(folder, monkeypatch):
    own = arrays.save

    def failing(path, mark, arrays):
        if len(folder.stored()) == 3:
            raise KeyboardInterrupt
        own(path, mark, arrays)

    (folder.out / "samples").mkdir(parents=True)
    monkeypatch.setattr(arrays, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        folder.run()
    monkeypatch.setattr(arrays, "save", own)
    before = folder.stored()
    assert len(before) == 3
    assert len(folder.run()) == 2 * len(NAMES) - 3
    assert before.items() <= folder.stored().items()


def test_a_changed_setting_is_done_again_and_others_are_kept(folder):
    folder.run(timing=1)
    before = folder.rows()
    changed = [dict(one) for one in SETTINGS]
    changed[2] |= {"config": {"preset": "dit-ddim50", "interval": 4}}
    changed[3] |= {"name": "always full"}  # a name is no change
    folder.settings(changed)
    drawn = folder.run(timing=1)
    # Two seeds; a round that does not count and one that does, of it and of the untouched model.
    assert len(drawn) == 2 + 4
    after = folder.rows()
    assert after["N=2"]["psnr"] != before["N=2"]["psnr"]
    assert after["N=3"] == before["N=3"]
    assert after["always full"]["psnr"] == "inf"
    folder.settings(SETTINGS)
    assert folder.run(timing=1) == []


@pytest.mark.parametrize("damage", ["cut short", "nothing", "another's", "a bit"])
def test_a_spoilt_file_is_made_again(folder, damage):
    folder.run(seeds=1)
    before, rows = folder.stored(), folder.rows()
    names = sorted(before)
    path = folder.out / "samples" / names[0]
    content = bytearray(before[names[0]])
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    new = {"cut short": content[:1000], "nothing": b"", "another's": before[names[1]]}
    path.write_bytes(new.get(damage, content))
    assert len(folder.run(seeds=1)) == 1
    assert folder.rows() == rows
    again = {name: np.load(folder.out / "samples" / name)["images"] for name in names}
    assert len({one.tobytes() for one in again.values()}) == len(names) - 1  # "full" is untouched


def test_spoilt_measurements_are_made_again(folder):
    folder.run(timing=1)
    rows = folder.rows()
    for path in (folder.out / "measured").iterdir():
        path.write_bytes(b"spoilt")
    (folder.out / "times.json").write_text('{"about": 3}')
    assert len(folder.run(timing=1)) == 2 * len(NAMES)
    for name, row in folder.rows().items():
        same = [column for column in COLUMNS if "speed" not in column and column != "seconds"]
        assert {at: row[at] for at in same if at != "efficiency"} == {
            at: rows[name][at] for at in same if at != "efficiency"
        }


def test_other_samples_are_drawn_for_other_code_weights_and_arguments(folder):
    first = len(folder.run(seeds=1))
    assert first == len(NAMES)
    assert len(folder.run("--arguments", '{"width": 16}', seeds=1)) == first
    assert len(folder.run("--seed", "5", seeds=1)) == first
    assert len(folder.run(samples=6, seeds=1)) == first
    # Half the steps are the same as before.
    assert {call[1] for call in folder.run("--steps", "4", seeds=1)} == {4}
    assert len(folder.run("--batch", "2", seeds=1)) == 3 * first
    folder.write(change="* 0.5")
    assert len(folder.run(seeds=1)) == first
    folder.write()
    assert folder.run(seeds=1) == []


def test_more_rounds_are_added(folder):
    folder.settings(SETTINGS[1:2])
    folder.run(seeds=1, timing=1)
    assert len(folder.run(seeds=1, timing=3)) == 2 * 3  # one that does not count, two more
    assert {row["rounds"] for row in folder.rows().values()} == {"3"}


@pytest.mark.slow
def test_workers_draw_the_same(folder):
    folder.run("--threads", "1")
    before = folder.stored()
    shutil.rmtree(folder.out / "samples")
    drawn = folder.run("--workers", "2", "--threads", "1")
    assert len(drawn) == 2 * len(NAMES)
    assert {call[3] for call in drawn} == {1}
    assert folder.stored() == before


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_told(folder):
    folder.write(change="/ 0")
    with pytest.raises(ValueError, match="expected pictures of finite numbers"):
        folder.run("--workers", "2", "--threads", "1")
    folder.write(change="[:, 0]")
    with pytest.raises(ValueError, match=r"got a shape of \(5, 32, 32\)"):
        folder.run(seeds=1)
    assert not list(folder.out.rglob("*.npz"))


# --- what samples are looked at with -------------------------------------------------------------


def test_a_network_beside_the_sampler_is_found(folder):
    (folder.path / "quality.py").write_text(
        "import torch\n"
        "features = lambda: lambda images: images.flatten(1)[:, ::200]\n"
        "reference = lambda: torch.rand(9, 1, 32, 32)\n"
    )
    folder.run(seeds=1)
    assert {float(row["fid"]) > 0 for row in folder.rows().values()} == {True}
    assert {row["is"] for row in folder.rows().values()} == {""}  # there are no logits


def test_a_reference_from_a_file(folder):
    path = folder.path / "reference.npz"
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    quality = str(DIGITS / "quality.py")
    folder.run("--features", quality, "--reference", str(path), seeds=1)
    row = folder.rows()["N=3"]
    assert float(row["fid"]) > 0
    assert float(row["is"]) >= 1
    assert (row["sfid"], row["precision"], row["fid_std"]) == ("", "", "")
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="are they of the same network"):
        folder.run("--features", quality, "--reference", str(path), seeds=1)


def test_without_a_network(folder):
    folder.run(seeds=1)
    row = folder.rows()["N=3"]
    assert float(row["psnr"]) > 0
    assert (row["fid"], row["is"], row["accuracy"], row["speedup"]) == ("", "", "", "")
    assert not (folder.out / "pareto_fid.png").exists()
    assert (folder.out / "pareto_psnr.png").exists()  # over FLOPs alone


def test_prompts_are_judged_by_clip_and_lpips(folder):
    pytest.importorskip("transformers", reason="it loads CLIP")
    clip = folder.path / "clip"
    clip.mkdir()
    clip_folder(clip)
    backbone = folder.path / "alexnet.pth"
    layers = torch.nn.Sequential(*_layers("alex"))
    torch.save({f"features.{name}": one for name, one in layers.state_dict().items()}, backbone)
    (folder.path / "prompts.txt").write_text("a cat\na dog on a mat\n")
    files = ["--prompts", str(folder.path / "prompts.txt"), "--lpips", str(backbone)]
    folder.run(*files, "--clip", str(clip), seeds=1, samples=4)
    found = folder.rows()
    assert float(found["untouched"]["lpips"]) == float(found["full"]["lpips"]) == 0
    assert float(found["N=3"]["lpips"]) > 0
    assert {0 <= float(row["clip"]) <= 100 for row in found.values()} == {True}
    assert found["N=3"]["accuracy"] == ""
    # Others to look with look at the same samples again.
    before = found["N=3"]["lpips"]
    for weight in layers.parameters():
        weight.data.mul_(1.1)
    torch.save({f"features.{name}": one for name, one in layers.state_dict().items()}, backbone)
    assert folder.run(*files, seeds=1, samples=4) == []
    assert folder.rows()["N=3"]["lpips"] != before


def test_classes_are_no_prompts(folder):
    (folder.path / "prompts.txt").write_text("a cat\n")
    argv = ["--prompts", str(folder.path / "prompts.txt"), "--classes", "0-9"]
    with pytest.raises(SystemExit):
        folder.run(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--time-batch", "0"], "time-batch: expected at least 1"),
        (["--arguments", "[1]"], "arguments: expected a JSON object"),
        (["--arguments", '{"height": 3}'], "its sampler takes"),
        (["--reference", "x.npz"], "reference: expected a network with --features"),
        (["--clip", "x"], "clip: expected samples of --prompts, got classes"),
    ],
)
def test_refused_arguments(argv, message, folder):
    with pytest.raises(ValueError, match=message):
        folder.run(*argv)
    assert not folder.out.exists()


def test_too_few_samples(folder):
    with pytest.raises(ValueError, match="samples: expected at least 4, got 3"):
        folder.run(samples=3)


def test_settings_that_do_not_fit_are_refused_before_anything_is_drawn(folder):
    folder.settings([*SETTINGS, {"name": "no text", "config": "pixart-dpm20"}])
    with pytest.raises(ValueError, match="no text: selector: expected one of"):
        folder.run()
    assert not folder.out.exists()


@pytest.mark.parametrize("package", ["torchmetrics", "matplotlib", "tqdm"])
def test_what_is_missing_is_said_at_once(package, folder, monkeypatch):
    own = evaluation.importlib.util.find_spec
    monkeypatch.setattr(
        evaluation.importlib.util, "find_spec", lambda name: None if name == package else own(name)
    )
    with pytest.raises(ValueError, match=rf"{package} is missing.*toca_kernels\[eval\]"):
        folder.run()


TRAINED = """
import sys
sys.path.insert(0, {digits!r})
from sampler import sampler as trained

def sampler(*, device, dtype):
    made = trained(device=device, dtype=dtype)
    made.num_steps = 12
    return made
"""


INTERVALS = (2, 4, 12)


@pytest.mark.slow
def test_the_trained_digits(folder):
    """The judge reads them; quality falls with the interval and rises with the tokens recomputed
    (the order of settings that a prototype found, before there were kernels)."""
    pytest.importorskip("sklearn", reason="it brings the real digits")
    folder.target.write_text(TRAINED.format(digits=str(DIGITS)))
    policies = {"ToCa": {"fresh_ratio": 0.3}, "reuse": {"fresh_ratio": 0.0}}
    folder.settings(
        [
            {"name": f"{policy} {N}", "policy": policy, "config": {"interval": N, **rest}}
            for N in INTERVALS
            for policy, rest in policies.items()
        ]
    )
    folder.run("--features", str(DIGITS / "quality.py"), samples=10, seeds=1)
    found = folder.rows()
    assert float(found["untouched"]["accuracy"]) == 1
    for policy in policies:
        psnr = [float(found[f"{policy} {N}"]["psnr"]) for N in INTERVALS]
        assert psnr[0] > 30
        assert all(few > many + 3 for few, many in pairwise(psnr))
        ssim = [float(found[f"{policy} {N}"]["ssim"]) for N in INTERVALS]
        assert ssim == sorted(ssim, reverse=True)
    for N in INTERVALS[1:]:  # of every second step, so little is stale that it makes no difference
        assert float(found[f"ToCa {N}"]["psnr"]) > float(found[f"reuse {N}"]["psnr"])
    assert float(found["reuse 12"]["fid"]) > 1.5 * float(found["untouched"]["fid"])
    cost = {name: float(row["flops_ratio"]) for name, row in found.items()}
    assert 1 < cost["ToCa 2"] < cost["reuse 2"] < cost["reuse 12"]


# --- settings ------------------------------------------------------------------------------------


def test_settings_of_a_file(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SETTINGS))
    found = read_settings(path, 50)
    assert found[0] == Setting("untouched", "untouched", None, 50)
    assert [one.name for one in found] == NAMES
    assert found[2].config == ToCaConfig.preset("dit-ddim50")
    assert found[3].config == ToCaConfig.preset("dit-ddim50", interval=2)
    assert [one.steps for one in found] == [50, 3, 50, 50, 50]
    assert parse_settings([one.plain() for one in found], 50) == found


def test_an_untouched_setting_of_the_file_is_the_base():
    entries = [SETTINGS[1], {"name": "as it is", "policy": "base"}]
    found = parse_settings(entries, 50)
    assert [one.name for one in found] == ["as it is", "N=3"]
    assert parse_settings(entries, 20)[0].name == "as it is"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "expected a list of settings, got dict"),
        ([3], "expected a setting like"),
        ([{"policy": "x"}], "expected a setting like"),
        ([{"name": "a"}, {"name": "b", "steps": 3}, {"name": "b", "steps": 4}], r"\['b'\] again"),
        ([{"name": "untouched", "steps": 3}], r"\['untouched'\] again"),
        ([{"name": "a", "interval": 3}], r"a: expected some of .*, got \['interval'\]"),
        ([{"name": "a", "steps": 0}], "a: steps: expected"),
        ([{"name": "a", "policy": 3}], "a: policy: expected a name, got 3"),
        ([{"name": "a", "config": 3}], "a: config: expected null, a preset or settings, got 3"),
        ([{"name": "a", "config": "b"}], "a: preset: expected one of"),
        ([{"name": "a", "config": {"intervall": 3}}], "a: unknown setting"),
        ([{"name": "a", "config": {"preset": "flux-50", "x": 3}}], "a: unknown override"),
    ],
)
def test_refused_settings(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(entries, 50)


def test_a_fingerprint_is_of_what_differs_from_the_defaults():
    """A setting that a later version adds does not undo what is stored."""
    one = Setting("a", "a", ToCaConfig(interval=4), 50)
    assert one.plain()["config"] == ToCaConfig(interval=4).to_dict()
    assert settings._changed(one.config) == {"interval": 4}
    assert one.fingerprint() == Setting("b", "b", ToCaConfig(interval=4), 50).fingerprint()
    others = [
        Setting("a", "a", ToCaConfig(interval=5), 50),
        Setting("a", "a", ToCaConfig(interval=4), 49),
        Setting("a", "a", None, 50),
    ]
    marks = {one.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(marks | {one.fingerprint(seed=1), one.fingerprint(seed=2)}) == 6


# --- rows ----------------------------------------------------------------------------------------


def found(name, config, steps, values, full=0.0, done=0.0, times=None):
    """Of two seeds, with as many samples each as there are values."""
    measured = [{"psnr": torch.tensor(seed)} for seed in values]
    counted = [{"flops_full": full, "flops_done": done, "nan_scores": 1.0}] * len(values)
    samples = sum(map(len, values))
    return Found(Setting(name, name, config, steps), measured, counted, times, samples)


def test_rows_by_hand():
    config = ToCaConfig()
    base = found("base", None, 50, [[math.inf], [math.inf]], times=Times(2.0, 1.0, 1.0, 1.0, 3))
    half = found("half", None, 25, [[20.0, 22.0], [25.0, 25.0]])
    toca = found("toca", config, 50, [[30.0], [40.0]], 10e12, 2e12, Times(0.5, 4.0, 3.5, 4.2, 3))
    fewer = found("fewer", config, 25, [[30.0], [40.0]], 5e12, 2e12)
    one, two, three, four = rows([base, half, toca, fewer], Judges())
    assert list(one) == list(COLUMNS)
    assert (one["psnr"], one["psnr_std"]) == (math.inf, None)
    assert two["psnr"] == 23
    assert two["psnr_std"] == pytest.approx(math.sqrt(8))
    assert (one["tflops"], two["tflops"], three["tflops"]) == (10, 5, 2)
    assert (one["flops_ratio"], two["flops_ratio"], three["flops_ratio"]) == (1, 2, 5)
    assert four["flops_ratio"] == 5
    assert three["efficiency"] == pytest.approx(0.8)
    assert (three["seconds"], three["speedup"]) == (0.5, 4)
    assert (one["efficiency"], four["efficiency"], two["speedup"]) == (None, None, None)
    assert three["nan_scores"] == 2


def test_flops_are_not_known_where_no_session_counted():
    base, half = rows(
        [found("base", None, 50, [[1.0]]), found("half", None, 25, [[1.0]])], Judges()
    )
    assert (base["tflops"], half["tflops"]) == (None, None)
    assert (base["flops_ratio"], half["flops_ratio"]) == (1, 2)


def test_metrics_of_sets_are_taken_by_seed_and_of_all():
    seeds = [torch.randn(30, 3), torch.randn(30, 3) + 1]
    reference = Reference.of("x", Features(torch.randn(40, 3)))
    judges = Judges(Extractor("x", "", Features), reference)
    measured = [{"pool": one, "psnr": one[:, 0]} for one in seeds]
    counted = [{"flops_full": 0.0, "flops_done": 0.0, "nan_scores": 0.0}] * 2
    (row,) = rows([Found(Setting("a", "a", None, 5), measured, counted, None, 60)], judges)
    each = [reference.compare(Features(one))["fid"] for one in seeds]
    assert row["fid"] == pytest.approx(sum(each) / 2)
    assert row["fid_std"] == pytest.approx(abs(each[0] - each[1]) / math.sqrt(2))
    assert row["fid_all"] == pytest.approx(reference.compare(Features(torch.cat(seeds)))["fid"])
    assert row["sfid"] is None


# --- times ---------------------------------------------------------------------------------------


def test_times_are_medians_of_ratios(tmp_path):
    path = tmp_path / "times.json"
    base, other = (Setting(name, name, None, steps) for name, steps in (("a", 2), ("b", 1)))
    marks = {base: "A", other: "B"}
    done = [{"A": 4.0, "B": 1.0}, {"A": 6.0, "B": 3.0}, {"A": 8.0, "B": 1.0}, {"A": 9.0}]
    whole.save_json(path, {"about": "x", "rounds": done})
    found = Rounds(path, "x", marks)
    assert found.times(other, 2) == Times(0.5, 4.0, 2.0, 8.0, 3)
    assert found.times(base, 2) == Times(3.5, 1.0, 1.0, 1.0, 4)
    assert (found.missing(other, 5), found.missing(base, 5)) == (2, 1)
    assert found.turns(3) == 0
    assert found.turns(5) == 2 + 1 + 3  # of `other`, with the one that does not count; of `base`
    assert Rounds(path, "y", marks).times(other, 2) is None


# --- files ---------------------------------------------------------------------------------------


def test_arrays_are_read_under_their_fingerprint_only(tmp_path):
    path = tmp_path / "made" / "x.npz"
    arrays.save(path, "one", {"a": np.arange(3), "b": np.ones(2)})
    assert arrays.read(path, "other") is None
    assert set(arrays.read(path, "one")) == {"a", "b"}
    assert arrays.read(path, "one", ["a"])["a"].tolist() == [0, 1, 2]
    assert arrays.read(path, "one", ["c"]) is None
    assert arrays.read(tmp_path / "none.npz", "one") is None
    assert [one.name for one in path.parent.iterdir()] == ["x.npz"]


def test_exported_pictures_of_other_sizes_are_refused(tmp_path):
    parts = [lambda: torch.rand(2, 3, 8, 8), lambda: torch.rand(2, 3, 8, 4)]
    with pytest.raises(ValueError, match="expected all of one size"):
        save_samples(tmp_path / "x.npz", parts)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_gone(tmp_path):
    setting = Setting("a", "a", None, 5)
    job = Job(setting, 0, (Request(0, 1),), 1, "mark", tmp_path / "none.npz")
    assert not job.is_done()
    with pytest.raises(RuntimeError, match="expected samples of a, got none"):
        job.pictures()


# --- plots ---------------------------------------------------------------------------------------


def test_the_front():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (0.5, 5.0)]
    assert front(points, lower=False) == [0, 3, 4]
    assert front(points, lower=True) == [4]
    assert front([(1.0, 2.0), (1.0, 2.0)], lower=True) == [0, 1]


def row(name, policy, **values):
    return dict.fromkeys(COLUMNS) | {"name": name, "policy": policy} | values


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "x.png"
    base = row("untouched", "untouched", psnr=math.inf, speedup=1.0)
    assert not draw_pareto(path, [base], "psnr", plain=(), title="x")
    full = row("full", "full", psnr=math.inf, speedup=1.0, speedup_slowest=1.0, speedup_fastest=1.0)
    assert not draw_pareto(path, [base, full], "psnr", plain=(), title="x")
    assert not draw_pareto(path, [base, full], "fid", plain=(), title="x")
    assert not path.exists()
