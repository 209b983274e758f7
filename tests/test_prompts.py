"""Prompt lists and class lists in the formats of the benchmarks."""

from __future__ import annotations

import json

import pytest

from toca_kernels.apps.sampling.prompts import read_classes, read_prompts

COCO = {
    "images": [{"id": 7}, {"id": 3}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "a dog\non a beach "},
        {"image_id": 3, "id": 2, "caption": "two cats"},
        {"image_id": 7, "id": 3, "caption": "another caption of the dog"},
    ],
}
VBENCH = [
    {"prompt_en": "a person walking", "dimension": ["human_action"]},
    {"prompt_en": "a red car", "dimension": ["color"]},
]
FILES = {
    "vbench.txt": ("a cat\n\n  a dog  \n", ["a cat", "a dog"]),
    "drawbench.csv": (
        'Prompts,Category\n"A red car, and a cat",Colors\nA sign that says "Hello",Text\n',
        ["A red car, and a cat", 'A sign that says "Hello"'],
    ),
    "marked.csv": ("\ufeffprompts,category\na cat,x\n", ["a cat"]),
    "parti.tsv": ("Prompt\tCategory\na cat, a dog\tAnimals\n", ["a cat, a dog"]),
    "captions.json": (json.dumps(COCO), ["a dog on a beach", "two cats"]),
    "VBench_full_info.json": (json.dumps(VBENCH), ["a person walking", "a red car"]),
    "mjhq.json": ('{"a1": {"category": "x", "prompt": "one"}, "a2": {"prompt": "two"}}',
                  ["one", "two"]),
    "plain.json": ('["one", "two"]', ["one", "two"]),
    "geneval.jsonl": ('{"tag": "x", "prompt": "one"}\n\n"two"\n', ["one", "two"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_prompts_of_every_format(name, tmp_path):
    text, want = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == want


def test_a_cell_over_two_lines(tmp_path):
    (tmp_path / "x.csv").write_text('Prompts,Category\n"a cat\nand a dog",x\nb,y\n')
    assert read_prompts(tmp_path / "x.csv") == ["a cat and a dog", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.png", "a", "expected a file that ends in .txt, .csv"),
        ("x.txt", "\n \n", "expected prompts, got none"),
        ("x.csv", "Category\nx\n", "expected a column prompt, prompts, caption"),
        ("x.csv", "", "expected a column"),
        ("x.json", "{", "x.json: "),
        ("x.json", "3", "expected a list or an object of prompts, got int"),
        ("x.json", '[{"category": "x"}]', "expected prompts or objects with prompt_en"),
        ("x.json", "[3]", "expected prompts or objects"),
        ("x.json", '{"annotations": [{"image_id": 3}]}', "expected prompts or objects"),
        ("x.json", '{"annotations": ["a", 4]}', "expected annotations with image_id"),
    ],
)
def test_refused_prompts(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(OSError, match=r"none\.txt"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="expected a file or numbers"):
        read_classes(tmp_path / "none.txt")


def synsets() -> list[str]:
    return [f"n{number:08d}" for number in range(10_000, 1_010_000, 1000)]


def test_classes_of_text():
    assert read_classes("0-9") == list(range(10))
    assert read_classes("207, 360,0-2") == [207, 360, 0, 1, 2]
    assert read_classes("5") == [5]
    assert read_classes("0..2 7") == [0, 1, 2, 7]
    assert read_classes("0-999") == list(range(1000))


def test_classes_of_files(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("207\n360\n0-2\n")
    assert read_classes(path) == [207, 360, 0, 1, 2]
    names = synsets()
    path.write_text("".join(f"{name} tench, Tinca tinca\n" for name in names[::-1]))
    assert read_classes(path) == list(range(999, -1, -1))
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}))
    assert read_classes(path) == [0, 1]
    path.write_text("[3, 4]")
    assert read_classes(path) == [3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "cat\n", "expected numbers and ranges like \"0-9\", got 'cat'"),
        ("x.txt", "", "expected some, got none"),
        ("x.txt", "9-0", "expected a range that runs up"),
        ("x.txt", "n01440764\nn01443537\n", "expected ImageNet's 1000 synsets"),
        ("x.json", '["cat"]', "expected class numbers"),
        ("x.json", "[-1]", "at least 0"),
    ],
)
def test_refused_classes(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / name)


def test_refused_text():
    for text in ("cat", "", "1,-2", "3-"):
        with pytest.raises(ValueError, match="expected a file or numbers"):
            read_classes(text)
    with pytest.raises(ValueError, match="runs up"):
        read_classes("9-0")
