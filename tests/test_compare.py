"""Reports beside each other: what may be compared, what is on the front, and how it is drawn."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image
from test_html_report import EVIL, FIRST, Page

from kvtool.cli import run_command
from kvtool.errors import UsageError
from kvtool.evaluate import pictures
from kvtool.evaluate.compare import Comparison, compare

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report of which some things are given, and gives its file."""

    def written(name: str, share: float, kl: float | None, **changes: Any) -> Path:
        report: dict[str, Any] = copy.deepcopy(FIRST)
        report["bytes_share"], report["divergence"]["kl"]["value"] = share, kl
        for key, value in changes.items():
            report[key] = {**report[key], **value} if isinstance(value, dict) else value
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(report), encoding="utf-8")
        return file

    return written


def refusal(*files: Path) -> str:
    with pytest.raises(UsageError) as caught:
        compare(files)
    return str(caught.value)


def names_of(figure: Figure) -> list[Annotation]:
    return [text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]


def drawn(comparison: Comparison) -> Figure:
    with pictures.style():
        return pictures.pareto(comparison.rows, [pictures.kl_panel, pictures.ratio_panel])


def test_rows_are_sorted_by_bytes_and_what_another_beats_is_not_optimal(write: Write) -> None:
    files = [
        write("large", 0.9, 0.01),
        write("worse", 0.6, 0.5),  # than middle, at more bytes
        write("middle", 0.5, 0.2),
        write("same", 0.5, 0.2),  # does not beat middle
        write("unequal", 0.5, 0.3),  # than middle, at the same bytes
        write("small", 0.25, 0.9),
        write("broken", 0.1, None),  # a KL that was not finite
    ]
    rows = compare(files).rows
    assert [(row.label, row.optimal) for row in rows] == [
        ("broken", False),
        ("small", True),
        ("middle", True),
        ("same", True),
        ("unequal", False),
        ("worse", False),
        ("large", True),
    ]


def test_a_row_has_the_numbers_of_its_report(write: Write) -> None:
    speed = {
        "dense": {"decode_tokens_per_second": 20.0},
        "ours": {"decode_tokens_per_second": 15.0},
    }
    first = write("first", 0.5, 0.25, chat_share=0.75, speed=None, format_version=2)
    report = json.loads(first.read_text())
    first.write_text(json.dumps(report | {"speed": speed}))
    row, _ = compare([first, write("second", 0.6, 0.1)]).rows
    assert (row.source, row.bytes_per_token_bf16) == ("half", 20.0)
    assert (row.kl, row.kl_error) == (0.25, 0.01)
    assert (row.perplexity_ratio, row.perplexity_ratio_error) == (1.2, None)
    assert (row.recall_share, row.chat_share, row.decode_ratio) == (0.5, 0.75, 0.75)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "OTHER"}, "original is OTHER instead of ORIGINAL"),
        ({"environment": {"dtype": "bfloat16"}}, "dtype is bfloat16 instead of float32"),
        ({"settings": {"windows": 4}}, "windows is 4 instead of 2"),
        ({"settings": {"corpus": "mine"}}, "corpus is mine instead of text"),
        (
            {"divergence": {"base_perplexity": {"value": 10.1, "standard_error": 1.0}}},
            "the original's perplexity is 10.1 instead of 10.0",
        ),
        (
            {"divergence": {"base_cache_bytes": 80_000}},
            "the original's cache is 80000 instead of 40000",
        ),
        (
            {"settings": {"passkey_lengths": [2048]}},
            "passkey_lengths is 2048 instead of 512, 1024",
        ),
    ],
)
def test_reports_that_were_measured_unlike_each_other_are_refused_with_what_differs(
    write: Write, changes: dict[str, Any], said: str
) -> None:
    files = [write("a", 0.5, 0.1), write("b", 0.4, 0.1), write("c", 0.4, 0.1, **changes)]
    assert refusal(*files) == f"{files[2]} cannot be compared with {files[0]}: {said}"


def test_the_same_original_on_another_device_may_be_compared(write: Write) -> None:
    close = write(
        "close", 0.4, 0.1, divergence={"base_perplexity": {"value": 10.01, "standard_error": 1.0}}
    )
    assert len(compare([write("a", 0.5, 0.1), close]).rows) == 2


@pytest.mark.parametrize(
    ("tokens", "prompts", "said"),
    [(96, 4, "chat tokens is 96 instead of 160"), (160, 3, "chat prompts is 3 instead of 4")],
)
def test_what_was_asked_in_chat_counts_where_both_were_asked(
    tmp_path: Path, write: Write, tokens: int, prompts: int, said: str
) -> None:
    plain = write("plain", 0.5, 0.1)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for file, longest, count in ((first, 160, 4), (second, tokens, prompts)):
        chat = {"max_new_tokens": longest, "prompts": [{}] * count}
        file.write_text(json.dumps(json.loads(plain.read_text()) | {"chat": chat}))
    assert len(compare([plain, first]).rows) == 2
    assert refusal(plain, first, second).endswith(f": {said}")


def test_settings_that_decide_no_number_may_differ(write: Write) -> None:
    fast = write("fast", 0.5, 0.1, settings={"speed": False, "speed_repeats": 9})
    assert len(compare([fast, write("slow", 0.5, 0.1)]).rows) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as a report"),
        ("[" * 99999, "cannot be read as a report: maximum recursion depth"),
        ("[]", "not a report of 'kvtool evaluate'"),
        ("7", "not a report of 'kvtool evaluate'"),
        ('{"model": "x"}', "not a report of 'kvtool evaluate', it has no 'format_version'"),
        ('{"format_version": 1, "base": "B"}', "it has no 'environment'"),
        ('{"format_version": 4}', "is of format 4, but this kvtool reads 1 to 3"),
        ('{"format_version": 2, "base": null}', "measured without an original"),
        (None, "cannot be read as a report: No such file or directory"),
    ],
)
def test_a_file_that_is_no_report_is_named(
    write: Write, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    message = refusal(write("a", 0.5, 0.1), file)
    assert message.startswith(f"{file}: ")
    assert said in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bytes_share": None}, "its bytes_share is not a number"),
        ({"bytes_share": "half"}, "its bytes_share is not a number"),
        ({"cache": {"bytes_per_token_bf16": None}}, "its bytes_per_token_bf16 is not a number"),
        ({"divergence": {"kl": {"value": "x", "standard_error": 0.1}}}, "its value is not a num"),
        ({"divergence": {"base_perplexity": {"value": []}}}, "its value is not a number"),
        ({"recall_share": "all"}, "its recall_share is not a number"),
    ],
)
def test_a_report_with_something_else_for_a_number_is_named(
    write: Write, changes: dict[str, Any], said: str
) -> None:
    good, damaged = write("good", 0.5, 0.1), write("damaged", 0.4, 0.1, **changes)
    assert refusal(good, damaged).startswith(
        f"{damaged}: not a report of 'kvtool evaluate': {said}"
    )


def test_a_number_that_is_not_finite_is_one_that_was_not_measured(write: Write) -> None:
    row, _ = compare([write("a", 0.4, math.nan), write("b", 0.5, 0.1)]).rows
    assert (row.label, row.kl, row.optimal) == ("a", None, False)


@pytest.mark.parametrize(("ours", "theirs"), [(15.0, 0.0), (None, 20.0), (15.0, None)])
def test_there_is_no_ratio_of_speeds_without_both(
    write: Write, ours: float | None, theirs: float | None
) -> None:
    file = write("a", 0.5, 0.1)
    rates = {"ours": ours, "dense": theirs}
    speed = {name: {"decode_tokens_per_second": rate} for name, rate in rates.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"speed": speed}))
    assert [row.decode_ratio for row in compare([file, file]).rows] == [None, None]


@pytest.mark.parametrize(
    ("names", "sources", "labels"),
    [
        (("a", "b"), ("x", "x"), ["a", "b"]),
        (("p/report", "q/report"), ("some/x", "some/y"), ["x", "y"]),
        (("p/report", "q/report"), ("here/x", "there/x"), ["here/x", "there/x"]),
    ],
)
def test_a_label_is_the_shortest_name_that_tells_reports_apart(
    write: Write, names: tuple[str, str], sources: tuple[str, str], labels: list[str]
) -> None:
    files = [write(n, 0.5, 0.1, source=s) for n, s in zip(names, sources, strict=True)]
    assert sorted(row.label for row in compare(files).rows) == labels


def test_the_same_file_twice_is_labelled_by_its_path(write: Write) -> None:
    file = write("a", 0.5, 0.1)
    assert [row.label for row in compare([file, file]).rows] == [str(file)] * 2


def test_the_front_is_a_staircase_that_no_point_is_below(write: Write) -> None:
    sizes = [(0.2, 0.9), (0.4, 0.3), (0.5, 0.4), (0.8, 0.02)]
    figure = drawn(compare([write(f"r{i}", *size) for i, size in enumerate(sizes)]))
    (steps,) = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert steps.get_xdata()[:3] == pytest.approx([20, 40, 80])
    assert list(steps.get_ydata()) == [0.9, 0.3, 0.02, 0.02]
    assert steps.get_xdata()[3] == pytest.approx(figure.axes[0].get_xlim()[1])
    assert figure.axes[0].get_yscale() == "log"


def test_a_lossless_report_does_not_squeeze_the_others(write: Write) -> None:
    files = [write("exact", 1.0, 6e-11), write("zero", 1.0, 0.0), write("half", 0.5, 0.3)]
    figure = drawn(compare(files))
    low, high = figure.axes[0].get_ylim()
    assert 0.05 < low < high < 1
    names = {text.get_text() for text in names_of(figure)}
    assert {"exact: 6e-11", "zero: 0", "half"} <= names


def test_names_of_reports_that_lie_close_do_not_cover_each_other(write: Write) -> None:
    places = [(0.5, 0.3), (0.505, 0.31), (0.51, 0.29), (0.6, 0.2), (0.61, 0.21), (0.3, 0.9)]
    files = [write(f"a-long-name-{i}", *place) for i, place in enumerate(places)]
    with pictures.style():
        figure = pictures.pareto(compare(files).rows, [pictures.kl_panel])
    frame = figure.axes[0].get_window_extent()
    boxes = [Text.get_window_extent(text) for text in names_of(figure)]
    assert len(boxes) == len(files)
    for index, box in enumerate(boxes):
        assert pictures.overlap(box, frame) == pytest.approx(box.width * box.height)
        assert not any(pictures.overlap(box, other) for other in boxes[index + 1 :])


def test_reports_without_a_finite_number_are_left_out_of_the_picture(write: Write) -> None:
    ratio = {"value": None, "standard_error": None}
    broken = write("broken", 0.5, None, divergence={"perplexity_ratio": ratio})
    report = json.loads(broken.read_text())
    report["divergence"]["kl"] = ratio
    broken.write_text(json.dumps(report))
    assert names_of(drawn(compare([broken, broken]))) == []


def test_the_command_prints_a_table_or_json(
    write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [str(write("half", 0.5, 0.1)), str(write("third", 0.33, 0.2))]
    assert run_command(["compare", *files]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if " ● " in line]
    assert [row[:2] for row in rows] == [["third", "●"], ["half", "●"]]
    assert run_command(["compare", *files, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["file"] for row in result["reports"]] == files[::-1]
    assert result["conditions"]["original"] == "ORIGINAL"


def test_a_comparison_is_printed_even_if_its_picture_cannot_be_written(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    output.symlink_to(tmp_path / "missing" / "page.html")
    file = str(write("half", 0.5, 0.1))
    assert run_command(["compare", file, file, "-o", str(output), "--json"]) == 1
    out, err = capfd.readouterr()
    assert len(json.loads(out)["reports"]) == 2
    assert str(output) in err


def test_the_page_of_a_comparison_is_like_that_of_a_report(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    files = [
        str(write("a", 0.5, 0.1, source=EVIL, base=EVIL)),
        str(write("b", 0.3, 0.2, base=EVIL)),
    ]
    assert run_command(["compare", *files, "-o", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    parsed = Page(page)
    assert "<script" not in page
    assert f"against {EVIL}" in parsed.text
    assert parsed.tags["svg"] == 2
    assert max(parsed.ids.values()) == 1
    assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", page)


def test_a_picture_of_its_own_has_both_panels(write: Write, tmp_path: Path) -> None:
    files = [str(write("写a$x_$", 0.5, 0.1)), str(write("b", 0.3, 0.2))]
    for suffix in ("svg", "png"):
        assert run_command(["compare", *files, "-o", str(tmp_path / f"p.{suffix}")]) == 0
    text = (tmp_path / "p.svg").read_text(encoding="utf-8")
    for shown in ("KL, nats per token", "perplexity ratio", "写a$x_$", "against ORIGINAL"):
        assert shown in text
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 1600


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.json"], "two reports or more"),
        (["a.json", "b.json", "-o", "x.pdf"], "must end in .html or .svg or .png"),
        (["a.json", "b.json", "-o", "missing/x.png"], "existing folder"),
        (["a.json", "b.json"], "a.json: cannot be read as a report"),
    ],
)
def test_what_cannot_be_compared_is_a_usage_error(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["compare", *arguments]) == 2
    assert said in capfd.readouterr().err
