"""Quality metrics: known values, invariances, the packages that offer the same, files of networks
and of statistics."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from toca_kernels.apps.evaluation import features, metrics, perceptual, references
from toca_kernels.apps.evaluation.features import Extractor, Features
from toca_kernels.apps.evaluation.metrics import (
    Statistics,
    frechet,
    inception_score,
    precision_recall,
)
from toca_kernels.apps.evaluation.references import Reference


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def points(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def line(*values):
    return torch.tensor(values)[:, None]


# --- pairs ---------------------------------------------------------------------------------------


def test_psnr_of_a_constant_difference():
    x = pictures(3, 3, 16, 16) * 0.5
    off = torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    found = metrics.psnr(x.double() + off, x.double())
    assert found[:2].tolist() == pytest.approx([20, 40], abs=1e-5)
    assert found[2] == math.inf


def test_relative_l2():
    x = pictures(2, 1, 4, 4) + 0.1
    scale = torch.tensor([1.5, 1.0]).view(2, 1, 1, 1)
    assert metrics.relative_l2(x * scale, x).tolist() == pytest.approx([0.5, 0], abs=1e-6)
    black = torch.zeros(1, 1, 4, 4)
    assert metrics.relative_l2(black, black).tolist() == [0]


def test_ssim_of_constant_pictures():
    pytest.importorskip("torchmetrics", reason="optional: it computes SSIM")
    one, other = (torch.full((2, 3, 32, 32), value) for value in (0.2, 0.6))
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(one, other).tolist() == pytest.approx([luminance] * 2, rel=1e-3)
    noise = pictures(2, 1, 32, 32)
    assert metrics.ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert metrics.ssim(noise[:1], noise[1:]) < 0.3
    with pytest.raises(ValueError, match="at least 11×11 pixels"):
        metrics.ssim(noise[..., :10], noise[..., :10])


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.relative_l2])
def test_shapes_that_differ(metric):
    with pytest.raises(ValueError, match=r"expected the shape of their references, \(2, 1, 32, 16"):
        metric(pictures(2, 1, 32, 32), pictures(2, 1, 32, 16))


def test_psnr_is_that_of_torchmetrics():
    library = pytest.importorskip("torchmetrics.functional.image", reason="optional")
    one, other = pictures(4, 3, 16, 16), pictures(4, 3, 16, 16, seed=1)
    want = library.peak_signal_noise_ratio(
        one, other, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    assert metrics.psnr(one, other).tolist() == pytest.approx(want.tolist())


# --- Fréchet distance ----------------------------------------------------------------------------


def gaussian(mu, sigma):
    return Statistics(torch.tensor(mu).double(), torch.tensor(sigma).double())


def test_frechet_of_known_gaussians():
    one = gaussian([1.0], [[4.0]])
    other = gaussian([3.0], [[9.0]])
    assert frechet(one, other) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)
    one = gaussian([0.0, 0.0, 1.0], np.diag([1.0, 4.0, 0.0]).tolist())
    other = gaussian([1.0, 2.0, 1.0], np.diag([9.0, 1.0, 16.0]).tolist())
    assert frechet(one, other) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2 + 16)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_where_the_covariances_do_not_commute():
    one, other = (Statistics.of(points(50, 6, seed=seed) @ points(6, 6, seed=9 + seed))
                  for seed in (0, 1))  # fmt: skip
    # The eigenvalues of Σ₁Σ₂ are those of the product whose root is taken.
    roots = np.sqrt(np.linalg.eigvals((one.sigma @ other.sigma).numpy()).real).sum()
    want = (one.mu - other.mu).square().sum() + one.sigma.trace() + other.sigma.trace() - 2 * roots
    assert frechet(one, other) == pytest.approx(float(want), rel=1e-9)
    assert frechet(other, one) == pytest.approx(float(want), rel=1e-9)


def test_statistics_are_those_of_numpy():
    x = points(20, 5)
    found = Statistics.of(x)
    assert np.allclose(found.mu, x.numpy().mean(0))
    assert np.allclose(found.sigma, np.cov(x.numpy(), rowvar=False))


def test_frechet_of_fewer_samples_than_features():
    """Singular covariances: along a line, the distance is that of one dimension."""
    axis = torch.zeros(64).index_fill_(0, torch.tensor([5]), 1.0)
    one, other = (line(*values).float() * axis for values in ((0.0, 2.0, 4.0), (1.0, 2.0, 3.0)))
    assert frechet(Statistics.of(one), Statistics.of(other)) == pytest.approx(1.0)


def test_frechet_does_not_see_order_or_rotation():
    x, y = points(60, 8), points(40, 8, seed=1) * 1.5 + 0.3
    turn, _ = torch.linalg.qr(points(8, 8, seed=2).double())
    want = frechet(Statistics.of(x), Statistics.of(y))
    shuffled = x[torch.randperm(60)]
    assert frechet(Statistics.of(shuffled), Statistics.of(y)) == pytest.approx(want)
    turned = (Statistics.of(one.double() @ turn) for one in (x, y))
    assert frechet(*turned) == pytest.approx(want)
    assert frechet(Statistics.of(2 * x), Statistics.of(2 * y)) == pytest.approx(4 * want)


class Flat(nn.Module):
    """Pictures of bytes as features."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).float() / 255


def test_frechet_is_the_fid_of_torchmetrics():
    library = pytest.importorskip("torchmetrics.image.fid", reason="optional")
    metric = library.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    one, other = ((pictures(40, 3, 2, 2, seed=seed) * 255).to(torch.uint8) for seed in (0, 1))
    metric.update(one, real=True)
    metric.update(other, real=False)
    have = frechet(*(Statistics.of(Flat()(x)) for x in (one, other)))
    assert have == pytest.approx(float(metric.compute()), rel=1e-6)


def test_refused_statistics():
    with pytest.raises(ValueError, match="at least 2 rows"):
        Statistics.of(points(1, 3))
    with pytest.raises(ValueError, match="expected finite numbers"):
        Statistics.of(torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match=r"a covariance \(D, D\), got \(2,\) and \(1, 1\)"):
        gaussian([0.0, 0.0], [[1.0]])
    with pytest.raises(ValueError, match="same width, got 1 and 2; are they of the same network"):
        frechet(gaussian([0.0], [[1.0]]), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="expected finite numbers"):
        frechet(gaussian([math.inf], [[1.0]]), gaussian([0.0], [[1.0]]))


# --- precision and recall ------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    real = line(0.0, 1.0, 2.0, 10.0)  # radii for k = 1: 1, 1, 1, 8
    fake = line(-1.0, 3.5, 20.0)  # radii: 4.5, 4.5, 16.5
    # -1 is on the edge of the ball round 0; 3.5 is in the one round 10; 20 is in none.
    # 0, 1, 2 are within 4.5 of -1; 10 is within 16.5 of 20.
    assert precision_recall(real, fake, k=1) == (2 / 3, 1.0)
    # k = 2: radii 2, 1, 2, 9 of the real ones and 21, 16.5, 21 of the fake ones.
    assert precision_recall(real, fake, k=2) == (2 / 3, 1.0)
    assert precision_recall(real, line(100.0, 101.0), k=1) == (0.0, 0.0)
    # All fakes in one ball, which reach nothing else: precise, and not varied.
    assert precision_recall(real, line(1.4, 1.5, 1.6), k=1) == (1.0, 0.0)
    # One fake far out reaches over everything: varied, and not precise.
    assert precision_recall(real, line(-300.0, 300.0), k=1) == (0.0, 1.0)


def test_the_neighbour_is_the_third_by_default():
    real = line(0.0, 1.0, 2.0, 4.0)
    fake = line(7.9, 8.1, 50.0, 50.0)
    assert precision_recall(real, fake) == precision_recall(real, fake, k=3)
    assert precision_recall(real, fake, k=3)[0] == 0.25  # 7.9 is within 4 of 4, 8.1 is not


def test_equal_sets_cover_each_other():
    x = points(200, 16)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x[torch.randperm(200)]) == (1.0, 1.0)
    same = torch.ones(5, 3)  # balls of radius 0
    assert precision_recall(same, same) == (1.0, 1.0)


def test_precision_does_not_see_order_scale_or_rotation():
    real, fake = points(150, 8), points(120, 8, seed=1) * 0.8 + 0.2
    want = precision_recall(real, fake)
    assert 0.5 < want[0] < 1
    turn, _ = torch.linalg.qr(points(8, 8, seed=2).double())
    assert precision_recall(real[torch.randperm(150)], fake[torch.randperm(120)]) == want
    assert precision_recall(real.double() @ turn * 3 + 1, fake.double() @ turn * 3 + 1) == want
    assert precision_recall(fake, real) == want[::-1]


def test_precision_in_parts(monkeypatch):
    """Sets larger than what is compared at a time."""
    real, fake = points(101, 4), points(70, 4, seed=1) + 0.5
    want = precision_recall(real, fake)
    monkeypatch.setattr(metrics, "_ROWS", 13)
    assert precision_recall(real, fake) == want


def test_precision_from_its_definition():
    real, fake = points(60, 5).double(), points(40, 5, seed=1).double() * 0.9

    def share(of, union):
        radii = [sorted((union - one).norm(dim=1).tolist())[3] for one in union]
        balls = list(zip(union, radii, strict=True))
        return np.mean([any((one - at).norm() <= r for at, r in balls) for one in of])

    assert precision_recall(real, fake) == (share(fake, real), share(real, fake))


def test_precision_is_that_of_piq():
    piq = pytest.importorskip("piq", reason="optional; needs torchvision", exc_type=ImportError)
    real, fake = points(150, 8), points(120, 8, seed=1) * 0.8 + 0.2
    want = piq.PR(nearest_k=3)(real, fake)
    assert precision_recall(real, fake) == pytest.approx([float(one) for one in want])


def test_refused_points():
    with pytest.raises(ValueError, match="real: expected at least 4 rows"):
        precision_recall(points(3, 2), points(9, 2))
    with pytest.raises(ValueError, match="fake: expected at least 4 rows"):
        precision_recall(points(9, 2), points(3, 2))
    with pytest.raises(ValueError, match="same width, got 2 and 3"):
        precision_recall(points(9, 2), points(9, 3))
    with pytest.raises(ValueError, match="fake: expected finite numbers"):
        precision_recall(points(9, 2), points(9, 2) / 0)


# --- inception score -----------------------------------------------------------------------------


def test_inception_score_of_known_logits():
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1)
    certain = 100 * torch.eye(7).repeat(3, 1)
    assert inception_score(certain) == pytest.approx(7)
    two = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()  # p = 3/4, 1/4; mean 1/2
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert inception_score(two) == pytest.approx(math.exp(want))


def test_inception_score_is_the_mean_over_parts():
    x = points(30, 5) * 2
    parts = [inception_score(part) for part in (x[:20], x[20:])]
    assert inception_score(x, split=20) == pytest.approx(sum(parts) / 2)
    assert inception_score(x[torch.randperm(30)]) == pytest.approx(inception_score(x))


def test_inception_score_is_that_of_torchmetrics():
    library = pytest.importorskip("torchmetrics.image.inception", reason="optional")
    metric = library.InceptionScore(feature=Flat(), splits=1)
    images = (pictures(40, 3, 2, 2) * 255).to(torch.uint8)
    metric.update(images)
    assert inception_score(Flat()(images)) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


# --- networks from files -------------------------------------------------------------------------

QUALITY = """
import torch

def features():
    def extract(images):
        flat = images.flatten(1)
        return {"pool": flat[:, :3], "logits": flat[:, :5], "classes": flat.argmax(1)}
    return extract

def reference():
    return torch.ones(6, 1, 4, 4) / 2
"""


def test_a_python_file(tmp_path):
    path = tmp_path / "quality.py"
    path.write_text(QUALITY)
    found = features.load(path)
    images = pictures(5, 1, 4, 4)
    seen = found.of(images, batch=2)
    assert torch.equal(seen.pool, images.flatten(1)[:, :3])
    assert torch.equal(seen.classes, images.flatten(1).argmax(1))
    assert seen.spatial is None
    assert found.reference().shape == (6, 1, 4, 4)
    before = found.fingerprint
    path.write_text(QUALITY + "\n")
    assert features.load(path).fingerprint != before
    path.write_text("def features():\n    return lambda images: images.flatten(1)\n")
    found = features.load(path)
    assert found.reference is None
    whole = (images * 255).to(torch.uint8)
    assert torch.equal(found.of(whole).pool, whole.flatten(1) / 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "expected a function features"),
        ("features = lambda: 3", "expected features.. to return a function, got int"),
        ("import nothing_of_this_name", "No module named"),
    ],
)
def test_refused_python_files(text, message, tmp_path):
    (tmp_path / "quality.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        features.load(tmp_path / "quality.py")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("3", "expected a tensor, or one for each of some of pool, spatial"),
        ("{'spatial': x}", "expected a tensor, or one for each"),
        ("{'pool': x, 'other': x}", "expected a tensor, or one for each"),
        ("x", r"expected pool of 5 pictures, got a shape of \(5, 1, 4, 4\)"),
        ("x.flatten(1)[1:]", "expected pool of 5 pictures"),
        ("(x.flatten(1), None, None, x.flatten(1))", "expected classes of 5 pictures"),
    ],
)
def test_features_of_other_kinds(returned, message, tmp_path):
    path = tmp_path / "quality.py"
    path.write_text(f"features = lambda: lambda x: {returned}\n")
    with pytest.raises(ValueError, match=message):
        features.load(path).of(pictures(5, 1, 4, 4))


def test_no_pictures():
    with pytest.raises(ValueError, match="got none"):
        Extractor("x", "", Features).of(pictures(0, 1, 4, 4))


class Pool(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images.flatten(1)


class Bytes(nn.Module):
    def forward(self, images, return_features: bool = False):
        assert return_features
        return images.flatten(1)


def test_torchscript_files(tmp_path):
    path = tmp_path / "network.pt"
    images = pictures(5, 3, 4, 4)
    torch.jit.script(Pool()).save(str(path))
    seen = features.load(path).of(images, batch=2)
    assert torch.equal(seen.pool, images.mean((2, 3)))
    assert torch.equal(seen.spatial, images.flatten(1))
    torch.jit.script(Bytes()).save(str(path))
    assert torch.equal(features.load(path).of(images).pool, (images * 255).round().flatten(1))
    path.write_text("nothing")
    with pytest.raises(ValueError, match="expected TorchScript"):
        features.load(path)


def test_refused_files(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.py, \.pt, \.pth"):
        features.load(tmp_path / "network.onnx")
    with pytest.raises(OSError, match="no such file"):
        features.load(tmp_path / "network.pt")


def test_inception_of_torch_fidelity(tmp_path):
    """Spatial features are the first 7 channels of mixed_6/conv, channels last, as ADM has them."""
    library = pytest.importorskip(
        "torch_fidelity", reason="optional; needs torchvision", exc_type=ImportError
    )
    network = library.FeatureExtractorInceptionV3.__new__(library.FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network.__init__("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    maps = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *given: maps.append(given[-1]))
    images = pictures(2, 3, 32, 32)
    (pool,) = network((images * 255).round().to(torch.uint8))
    seen = features.load(tmp_path / "inception.pth").of(images)
    assert torch.equal(seen.pool, pool)
    assert torch.equal(seen.spatial.view(2, 17, 17, 7), maps[0][:, :7].permute(0, 2, 3, 1))
    assert seen.logits.shape == (2, 1008)


# --- references ----------------------------------------------------------------------------------


def extractor():
    def extract(images):
        flat = images.flatten(1)
        return Features(flat[:, :4], flat[:, :6], flat)

    return Extractor("flat", "", extract)


def test_pictures_as_the_reference(tmp_path):
    """arr_0, as ADM's evaluator has it."""
    images = (pictures(20, 4, 4, 3) * 255).to(torch.uint8)
    np.savez(tmp_path / "reference.npz", images.numpy())
    found = references.read(tmp_path / "reference.npz", extractor(), batch=7)
    flat = (images.permute(0, 3, 1, 2) / 255).flatten(1)
    assert torch.equal(found.points, flat[:, :4])
    assert torch.equal(found.pool.mu, Statistics.of(flat[:, :4]).mu)
    have = found.compare(extractor().of(images.permute(0, 3, 1, 2)))
    assert have["fid"] == pytest.approx(0, abs=1e-9)
    assert have["sfid"] == pytest.approx(0, abs=1e-9)
    assert (have["precision"], have["recall"]) == (1, 1)
    assert have["is"] == pytest.approx(inception_score(flat))


def test_statistics_as_the_reference(tmp_path):
    path = tmp_path / "statistics.npz"
    mu, sigma, mu_s, sigma_s = np.ones(4), 2 * np.eye(4), np.zeros(6), np.eye(6)
    samples = Features(points(30, 4), points(30, 6, seed=1))
    np.savez(path, mu=mu, sigma=sigma)  # pytorch-fid
    have = references.read(path, extractor()).compare(samples)
    assert list(have) == ["fid"]
    want = frechet(Statistics.of(samples.pool), gaussian(mu.tolist(), sigma.tolist()))
    assert have["fid"] == pytest.approx(want)
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)  # ADM
    have = references.read(path, extractor()).compare(samples)
    assert list(have) == ["fid", "sfid"]
    # VIRTUAL_imagenet*.npz: statistics of all pictures, and some pictures.
    some = (pictures(20, 4, 4, 1) * 255).to(torch.uint8).numpy()
    np.savez(path, arr_0=some, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    both = references.read(path, extractor()).compare(samples)
    assert both["fid"] == have["fid"]
    assert set(both) == {"fid", "sfid", "precision", "recall"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.ones(3)}, "expected mu and sigma, or arr_0, got neither"),
        ({"mu": np.ones(3)}, "expected mu and sigma, or arr_0, got neither"),
        ({"mu": np.ones(3), "sigma": np.eye(4)}, r"a covariance \(D, D\), got \(3,\) and \(4, 4\)"),
        ({"arr_0": np.ones((3, 4, 4, 3))}, r"in uint8, got a shape of \(3, 4, 4, 3\) in float64"),
    ],
)
def test_refused_references(arrays, message, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        references.read(tmp_path / "reference.npz", extractor())


def test_a_reference_that_is_no_npz(tmp_path):
    path = tmp_path / "reference.npz"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        references.read(path, extractor())
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        references.read(tmp_path / "one.npy", extractor())
    with pytest.raises(OSError, match=r"none\.npz"):
        references.read(tmp_path / "none.npz", extractor())


def test_another_networks_statistics():
    found = Reference("x", gaussian([0.0], [[1.0]]))
    with pytest.raises(ValueError, match="are they of the same network"):
        found.compare(Features(points(9, 4)))


# --- LPIPS and CLIP score ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("alex", 64), ("vgg", 32)])
def test_lpips_is_that_of_torchmetrics(kind, size, tmp_path, monkeypatch):
    library = pytest.importorskip("torchmetrics.functional.image.lpips", reason="optional")
    layers = nn.Sequential(*perceptual._layers(kind), nn.MaxPool2d(2))  # torchvision's last one
    weights = {f"features.{name}": one for name, one in layers.state_dict().items()}
    weights["classifier.0.weight"] = torch.ones(1)
    path = tmp_path / "backbone.pth"
    torch.save(weights, path)
    monkeypatch.setattr(library, "_get_tv_model_features", lambda *args, **kwargs: layers)
    other = library._LPIPS(net=kind, pnet_rand=True)
    one, two = pictures(3, 3, size, size), pictures(3, 3, size, size, seed=1)
    found = perceptual.Lpips(path)
    want = other(one, two, normalize=True).flatten()
    assert found(one, two).tolist() == pytest.approx(want.tolist(), rel=1e-4)
    assert found(one, one).tolist() == [0, 0, 0]
    grey = one[:, :1], two[:, :1]
    assert torch.equal(found(*grey), found(*(x.repeat(1, 3, 1, 1) for x in grey)))


def test_refused_weights_of_lpips(tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save({"features.0.weight": torch.ones(8, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"alexnet or vgg16, got .* \(8, 3, 3, 3\)"):
        perceptual.Lpips(path)
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match="Missing key"):
        perceptual.Lpips(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        perceptual.Lpips(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        perceptual.Lpips(path)
    with pytest.raises(OSError, match=r"none\.pth"):
        perceptual.Lpips(tmp_path / "none.pth")
    layers = nn.Sequential(*perceptual._layers("alex"))
    torch.save({f"features.{name}": one for name, one in layers.state_dict().items()}, path)
    heads = tmp_path / "heads.pth"
    torch.save({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, heads)
    with pytest.raises(ValueError, match=r"expected lin1.model.1.weight with 192 numbers for alex"):
        perceptual.Lpips(path, heads)


def clip_folder(folder):
    """A tiny CLIP of random weights that reads single letters."""
    import transformers

    words = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {word: at for at, word in enumerate(["<|startoftext|>", "<|endoftext|>", *words])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>",
                    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>"})
    )  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**size, **text},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    kind = transformers.CLIPImageProcessor
    kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def test_clip_score(tmp_path):
    transformers = pytest.importorskip("transformers", reason="optional: it loads CLIP")
    clip_folder(tmp_path)
    score = perceptual.ClipScore(tmp_path)
    images = pictures(3, 3, 40, 40)
    prompts = ["a cat", "dog", "a very long prompt that must be cut"]

    model = transformers.CLIPModel.from_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    read = tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    seen = processor(images=list((images * 255).round().to(torch.uint8)), return_tensors="pt")
    out = model(pixel_values=seen["pixel_values"], **read)
    cosine = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    assert len(set(cosine.tolist())) == 3
    found = score(images, prompts)
    assert found.tolist() == pytest.approx((100 * cosine).clamp(min=0).tolist(), abs=1e-3)

    model.text_projection.weight.data.neg_()
    model.save_pretrained(tmp_path)
    score = perceptual.ClipScore(tmp_path)
    found = score(images, prompts)
    assert found.tolist() == pytest.approx((-100 * cosine).clamp(min=0).tolist(), abs=1e-3)

    grey = score(images[:, :1], prompts)
    assert grey.tolist() == pytest.approx(score(images[:, :1].repeat(1, 3, 1, 1), prompts).tolist())
    with pytest.raises(ValueError, match="expected one for each of 3, got 2"):
        score(images, prompts[:2])
    with pytest.raises(OSError, match="no such folder"):
        perceptual.ClipScore(tmp_path / "none")


def test_pictures_of_two_channels():
    with pytest.raises(ValueError, match="expected 1 or 3 channels, got 2"):
        features.rgb(pictures(1, 2, 4, 4))


@pytest.mark.parametrize("package", ["torchmetrics", "transformers", "torch_fidelity"])
def test_what_is_missing_is_named(package, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "weights.pth").touch()
    uses = {
        "torchmetrics": lambda: metrics.ssim(pictures(1, 1, 32, 32), pictures(1, 1, 32, 32)),
        "transformers": lambda: perceptual.ClipScore(tmp_path),
        "torch_fidelity": lambda: features.load(tmp_path / "weights.pth"),
    }
    with pytest.raises(ValueError, match=rf"{package}.* is missing, .*toca_kernels\[eval\]"):
        uses[package]()
