"""Write the tables of supported models in README.md and docs/models.md from the tests.

Models are those that the tests build; what is cached is what their taps say once they are enabled;
how a cached step runs is what its blocks did in one; "tested" is which of the tests in `CLAIMS` are
collected for a model.

--check only compares.

    PYTHONPATH=benchmarks python tests/support.py
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toca_kernels as toca
from models import sample, tiny_dit
from pipelines import PIPELINES
from toca_kernels.plan import module_kind

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "models.md")
DIFFUSERS = "diffusers"

# What a pipeline of the tests is called; several may be one model.
TITLES = {
    "dit": "DiT",
    "pixart_alpha": "PixArt-α",
    "pixart_sigma": "PixArt-Σ",
    "flux": "FLUX.1",
    "flux_true_cfg": "FLUX.1",
    "chroma": "Chroma",
    "flux2": "FLUX.2",
    "sd3": "SD3",
    "sd35": "SD3.5",
    "auraflow": "AuraFlow",
    "qwenimage": "Qwen-Image",
    "qwenimage_padded": "Qwen-Image",
    "zimage": "Z-Image",
    "lumina2": "Lumina 2",
    "wan": "Wan 2.1",
    "wan22": "Wan 2.2",
    "wan22_ti2v": "Wan 2.2 TI2V",
    "ltx": "LTX-Video",
    "cogvideox": "CogVideoX",
    "hunyuan_video": "HunyuanVideo",
    "hunyuan_video15": "HunyuanVideo 1.5",
    "mochi": "Mochi",
    "allegro": "Allegro",
    "latte": "Latte",
}
# (title, repository) of the structures that are not diffusers'.
REPOSITORIES = {
    "facebook": ("DiT", "facebookresearch/DiT"),
    "pixart": ("PixArt-α", "PixArt-alpha"),
    "pixart_ms": ("PixArt-α", "PixArt-alpha"),
    "flux": ("FLUX.1", "black-forest-labs/flux"),
    "stdit": ("Open-Sora 1.0", "hpcaitech/Open-Sora"),
    "stdit3": ("Open-Sora 1.2", "hpcaitech/Open-Sora"),
}


# What a test shows, in short, and what that means.
WORDS = {
    "bits": "full steps are the model's own bit for bit",
    "repeats": "a second run equals the first bit for bit",
    "attention reused": "with every token recomputed, a cached step is the model's own, given the "
    "attention of the last full step by hooks",
    "plain ToCa": "equal to ToCa written in plain torch, within rounding",
    "rows": "as many rows go through the MLPs as were planned",
    "8 bits": "int8 and fp8 caches",
    "bfloat16": "as good as the model's own bfloat16, or as caching is in float32",
    "LoRA": "linears that were wrapped",
    "quantised": "linears that were quantised",
    "compiled": "one graph for each kind of step, and its results",
    "preset": "a published preset runs as planned",
}

CORE = ("attention reused", "rows")  # models that differ in these are not put together
# How a cached step runs: all of its blocks, some or none composed from the ops.
STEPS = ("from the ops", "from the ops, some blocks through taps", "through taps")


@dataclass(frozen=True)
class Claim:
    """What a test shows of the models that it is parametrised with.

    Attributes:
        word: of `WORDS`.
        test: file::function.
        own: whether its models are those of `REPOSITORIES`; None if its parameters are "facebook"
            and "diffusers", the two sources of DiT.
        model: of a test without such parameters, the name of its model.
    """

    word: str
    test: str
    own: bool | None = False
    model: str | None = None


CLAIMS = (
    Claim("bits", "test_families.py::test_full_steps_are_the_models_own_bit_for_bit"),
    Claim("bits", "test_families.py::test_published_full_steps_bit_for_bit", own=True),
    Claim("bits", "test_session.py::test_always_full_is_the_untouched_model_to_the_bit", own=None),
    Claim("repeats", "test_families.py::test_a_run_leaves_nothing_to_the_next"),
    Claim("repeats", "test_families.py::test_published_runs_repeat_and_end", own=True),
    Claim("repeats", "test_session.py::test_a_second_run_equals_the_first_to_the_bit", own=None),
    Claim(
        "attention reused",
        "test_families.py::test_every_token_recomputed_is_only_the_attention_reused",
    ),
    Claim("attention reused", "test_families.py::test_published_every_token_recomputed", own=True),
    Claim(
        "attention reused",
        "test_families.py::test_flux_every_token_recomputed",
        own=True,
        model="flux",
    ),
    Claim(
        "attention reused",
        "test_session.py::test_every_token_recomputed_is_attention_reuse",
        own=None,
    ),
    Claim("plain ToCa", "test_session.py::test_agrees_with_the_naive_toca", own=None),
    Claim("rows", "test_families.py::test_the_work_done_is_the_plan"),
    Claim("8 bits", "test_families.py::test_eight_bit_caches"),
    Claim("bfloat16", "test_diffusers.py::test_bfloat16"),
    Claim("bfloat16", "test_models.py::test_half_precision_is_as_good_as_the_models_own", own=None),
    Claim("LoRA", "test_diffusers.py::test_lora_before"),
    Claim("LoRA", "test_models.py::test_a_wrapped_linear_is_called", own=None),
    Claim("quantised", "test_quantised.py::test_quantised_before"),
    Claim("quantised", "test_quantised.py::test_own_code_quantised_before", own=True),
    Claim("compiled", "test_diffusers.py::test_compiled_blocks"),
    Claim(
        "compiled",
        "test_compile.py::test_a_compiled_model_samples_as_an_eager_one",
        own=True,
        model="facebook",
    ),
    Claim("preset", "test_families.py::test_presets_run_as_planned", own=True),
)
# Tests of DiT in both sources name these; test_quantised.py says "own dit".
SOURCES_OF_DIT = {"diffusers": (False, "dit"), "facebook": (True, "facebook")}


@dataclass(frozen=True)
class Row:
    """A model, as the tests see it.

    Attributes:
        whole: modules whose output a cached step reuses for all tokens; chosen: those that it
            recomputes for the selected ones.
        partial: whether self-attention can be recomputed for some tokens.
        step: how a cached step runs.
        selectors: what tokens can be ranked by.
        tested: of `CLAIMS`, the words.
    """

    title: str
    source: str
    whole: tuple[str, ...]
    chosen: tuple[str, ...]
    partial: bool
    step: str
    selectors: tuple[str, ...]
    tested: tuple[str, ...]


# --- what is tested ------------------------------------------------------------------------------


def collected() -> dict[str, list[str]]:
    """file::function -> the ids of its parameters, "" where there are none."""
    files = sorted({claim.test.partition("::")[0] for claim in CLAIMS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*command, *(f"tests/{name}" for name in files)], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        raise RuntimeError(f"pytest --collect-only failed:\n{listed.stdout}{listed.stderr}")
    found: dict[str, list[str]] = {}
    for file, test, given in re.findall(r"^tests/(\S+)::(\w+)(?:\[(.*)\])?$", listed.stdout, re.M):
        found.setdefault(f"{file}::{test}", []).append(given)
    return found


def skipped(test: str) -> set[str]:
    """The names for which a test skips itself: `if name == ...: pytest.skip(...)`."""
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    body = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return {
        constant.value
        for node in ast.walk(body)
        if isinstance(node, ast.If) and "pytest.skip" in ast.unparse(node.body[0])
        for constant in ast.walk(node.test)
        if isinstance(constant, ast.Constant)
    }


def tested() -> dict[tuple[bool, str], tuple[str, ...]]:
    """(whether of `REPOSITORIES`, name) -> what is shown of it."""
    found = collected()
    shown: dict[tuple[bool, str], set[str]] = {}
    for claim in CLAIMS:
        if claim.test not in found:
            raise ValueError(f"CLAIMS: expected a test that exists, got {claim.test}")
        names = {part for given in found[claim.test] for part in re.split("[- ]", given)}
        names = ({claim.model} if claim.model else names) - skipped(claim.test)
        keys = [key for name in names if (key := _key(claim, name))]
        if not keys:
            raise ValueError(f"CLAIMS: expected the names of models in {claim.test}, got {names}")
        for key in keys:
            shown.setdefault(key, set()).add(claim.word)
    return {key: tuple(word for word in WORDS if word in some) for key, some in shown.items()}


def _key(claim: Claim, name: str) -> tuple[bool, str] | None:
    """What `rows` calls the model that a test calls `name`; None if that is no model."""
    if claim.own is None:
        return SOURCES_OF_DIT.get(name)
    name = "facebook" if claim.own and name == "dit" else name
    return (claim.own, name) if name in (REPOSITORIES if claim.own else PIPELINES) else None


# --- what is cached ------------------------------------------------------------------------------


def rows() -> list[Row]:
    shown = tested()
    made = [
        _row(TITLES[name], DIFFUSERS, *_stock(name), shown.get((False, name), ()))
        for name in PIPELINES
    ]
    made += [
        _row(*REPOSITORIES[name], *_own(name), shown.get((True, name), ())) for name in REPOSITORIES
    ]
    return list(_united(made))


def _stock(name: str) -> tuple[Any, Any, dict[str, Any]]:
    tiny = PIPELINES[name]
    pipe = tiny()
    return pipe, lambda: tiny.call(pipe, 4), {}


def _own(name: str) -> tuple[Any, Any, dict[str, Any]]:
    if name == "facebook":
        model, call = tiny_dit(), sample
    else:
        module = importlib.import_module(f"published.{name.partition('_')[0]}")
        model = module.tiny(multi_scale=True) if name == "pixart_ms" else module.tiny()
        call = module.sample
    return model, lambda: call(model, 4), {"num_steps": 4}


def _row(
    title: str, source: str, thing: Any, call: Any, given: Mapping[str, Any], shown: Sequence[str]
) -> Row:
    config = toca.ToCaConfig(interval=2, fresh_ratio=0.5, selector="random")
    with toca.enabled(thing, config, **given) as session:
        call()  # ends with a cached step
        blocks = [block for one in (session, *session.others) for block in one._blocks]
    modules = dict.fromkeys(name for block in blocks for name in block.modules)
    taps = [one.tap for block in blocks for one in block.taps]
    chosen = {tap.outputs[0] for tap in taps if tap.cached in ("rows", "rows_out")}
    ranks = [set(block.selectors) for block in blocks]
    return Row(
        title,
        source,
        whole=tuple(name for name in modules if name not in chosen),
        chosen=tuple(name for name in modules if name in chosen),
        partial=any(tap.rowwise for tap in taps),
        step=_step(blocks),
        selectors=tuple(
            n for n in ("attention", "entropy", "norm", "random") if n in set.union(*ranks)
        ),
        tested=tuple(shown),
    )


def _step(blocks: Sequence[Any]) -> str:
    composed = [block.composed for block in blocks]
    return STEPS[0 if all(composed) else 1 if any(composed) else 2]


def _united(made: Sequence[Row]) -> Iterator[Row]:
    """One row for each title and source; what is tested of either is tested."""
    for title, source in dict.fromkeys((row.title, row.source) for row in made):
        same = [row for row in made if (row.title, row.source) == (title, source)]
        shown = {word for row in same for word in row.tested}
        united = [replace(row, tested=tuple(w for w in WORDS if w in shown)) for row in same]
        if any(row != united[0] for row in united):
            raise ValueError(f"{title}: expected one way of caching, got {same}")
        yield united[0]


# --- tables --------------------------------------------------------------------------------------


def compact(made: Sequence[Row]) -> str:
    """Models that are cached alike are one line, with what is tested of each of them."""
    common = _common(made)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(made, key=lambda row: STEPS.index(row.step)):
        shown = tuple(word for word in CORE if word in row.tested)
        groups.setdefault((row.step, row.whole, row.chosen, shown), []).append(row)
    lines = [
        [
            _listed(row.title for row in some),
            _listed(row.source for row in some),
            _by_kind(whole),
            _by_kind(chosen),
            step,
            _listed(word for word in _common(some) if word not in common),
        ]
        for (step, whole, chosen, _), some in groups.items()
    ]
    head = ["models", "in", "reused whole", "chosen tokens", "cached step", "tested"]
    return f"{_table(head, lines)}\n\n{_legend(made)}"


def _by_kind(names: Sequence[str]) -> str:
    """img/txt mlp for img_mlp and txt_mlp."""
    streams: dict[str, list[str]] = {}
    for name in names:
        kind = module_kind(name)
        streams.setdefault(kind if name != kind else "", []).append(name.removesuffix(f"_{kind}"))
    alone = streams.pop("", [])
    return _listed((*alone, *(f"{'/'.join(some)} {kind}" for kind, some in streams.items())))


def complete(made: Sequence[Row]) -> str:
    """A line for each model and source."""
    common = _common(made)
    lines = [
        [
            row.title,
            row.source,
            _listed(row.whole) + (" (or in part)" if row.partial else ""),
            _listed(row.chosen),
            row.step,
            _listed(row.selectors),
            _listed(word for word in row.tested if word not in common),
        ]
        for row in made
    ]
    head = ["model", "in", "reused whole", "chosen tokens", "cached step", "ranked by", "tested"]
    return f"{_table(head, lines)}\n\n{_legend(made)}"


def _legend(made: Sequence[Row]) -> str:
    common = _common(made)
    others = [f"*{word}*: {meaning}" for word, meaning in WORDS.items() if word not in common]
    return textwrap.fill(
        f"Tested of all, with random weights: {'; '.join(WORDS[word] for word in common)}. Tested "
        f"beside that: {'; '.join(others)}.",
        width=100,
    )


def _common(made: Sequence[Row]) -> list[str]:
    return [word for word in WORDS if all(word in row.tested for row in made)]


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def updated(text: str, made: Sequence[Row]) -> str:
    """The text of a page with the tables between its markers renewed."""
    for name, table in (("support", compact), ("support in full", complete)):
        text = re.sub(
            rf"(<!-- {name} -->)\n.*?\n(<!-- end -->)",
            lambda match, table=table: f"{match[1]}\n{table(made)}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    args = parser.parse_args()
    made = rows()
    for page in PAGES:
        old = page.read_text()
        new = updated(old, made)
        if args.check and old != new:
            raise SystemExit(f"{page.name}: its table of models differs from the tests")
        page.write_text(new)


if __name__ == "__main__":
    main()
