"""The tables of supported models say what the tests show."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import support


@pytest.fixture(scope="module")
def rows():
    return support.rows()  # skips where this diffusers lacks one of the models


@pytest.mark.slow
def test_pages_are_up_to_date(rows):
    """Else: PYTHONPATH=benchmarks python tests/support.py"""
    for page, marker in zip(support.PAGES, ("support", "support in full"), strict=True):
        text = page.read_text()
        assert f"<!-- {marker} -->" in text
        assert support.updated(text, rows) == text


@pytest.mark.slow
def test_every_model_of_the_tests_is_in_both_tables(rows):
    assert {row.title for row in rows} == {
        *support.TITLES.values(),
        *(title for title, _ in support.REPOSITORIES.values()),
    }
    for table in (support.compact(rows), support.complete(rows)):
        for row in rows:
            assert row.title in table
            assert row.source in table
    assert set(support.TITLES) == set(support.PIPELINES)


def row(**settings):
    given = {
        "title": "One",
        "source": "diffusers",
        "whole": ("attn",),
        "chosen": ("mlp",),
        "partial": False,
        "step": "through taps",
        "selectors": ("random",),
        "tested": ("bits", "rows"),
    }
    return support.Row(**(given | settings))


def test_models_in_one_line_share_what_is_said_of_them():
    rows = [
        row(tested=("bits", "rows", "LoRA")),
        row(title="Two"),
        row(title="Three", chosen=("mlp", "img_mlp", "txt_mlp", "txt_cross_attn")),
        row(title="Four", tested=("bits",)),
        row(title="Five", step="from the ops"),
    ]
    lines = support.compact(rows).splitlines()
    assert lines[2:6] == [
        "| Five | diffusers | attn | mlp | from the ops | rows |",
        "| One, Two | diffusers | attn | mlp | through taps | rows |",
        "| Three | diffusers | attn | mlp, img/txt mlp, txt cross_attn | through taps | rows |",
        "| Four | diffusers | attn | mlp | through taps |  |",
    ]
    assert lines[7].startswith("Tested of all, with random weights: full steps")
    line = "| One | diffusers | attn | mlp | through taps | random | rows, LoRA |"
    assert line in support.complete(rows).splitlines()


def test_variants_of_a_model_are_cached_alike():
    assert list(support._united([row(), row(tested=("repeats",))])) == [
        row(tested=("bits", "repeats", "rows"))
    ]
    with pytest.raises(ValueError, match="One: expected one way of caching"):
        list(support._united([row(), row(chosen=())]))


def test_models_for_which_a_test_skips_itself_are_not_counted(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n"
        "def test_a(name):\n"
        "    if name == 'flux2':\n"
        "        pytest.skip('why')\n"
        "    if name == 'sd3':\n"
        "        name = 'sd35'\n"
    )
    monkeypatch.setattr(support, "ROOT", tmp_path)
    assert support.skipped("test_one.py::test_a") == {"flux2"}


def test_a_claim_names_a_test_and_its_models(monkeypatch):
    for test, listed, message in (
        ("test_one.py::test_gone", {}, "expected a test that exists, got test_one.py::test_gone"),
        ("test_one.py::test_a", {"test_one.py::test_a": ["int8"]}, "expected the names of models"),
    ):
        monkeypatch.setattr(support, "CLAIMS", (support.Claim("bits", test),))
        monkeypatch.setattr(support, "collected", lambda listed=listed: listed)
        monkeypatch.setattr(support, "skipped", lambda test: set())
        with pytest.raises(ValueError, match=message):
            support.tested()
