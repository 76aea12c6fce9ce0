"""The report as a page: self-contained, escaped, the same every time, and complete."""

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from rich.table import Table

from kvtool.cli import run_command
from kvtool.evaluate.html import report_page
from kvtool.evaluate.pictures import DARK, LIGHT

EVIL = "<script>alert('x')</script> & $\\frac$ \"<b>"
VOID = {"meta", "br", "hr", "img", "input", "link"}
FIRST = {
    "format_version": 1,
    "source": "half",
    "base": "ORIGINAL",
    "settings": {"windows": 2, "corpus": "text", "passkey_lengths": [512, 1024]},
    "environment": {"dtype": "float32", "device": "cpu", "versions": {"torch": "2.13.0"}},
    "cache": {"bytes_per_token": 40.0, "bytes_per_token_bf16": 20.0, "constant_bytes": 0.0},
    "base_cache": {"bytes_per_token": 80.0, "bytes_per_token_bf16": 40.0, "constant_bytes": 0.0},
    "divergence": {
        "windows": 2,
        "prefill": 256,
        "continuation": 128,
        "cache_bytes": 20_000,
        "base_cache_bytes": 40_000,
        "perplexity": {"value": 12.0, "standard_error": 1.0},
        "base_perplexity": {"value": 10.0, "standard_error": 1.0},
        "kl": {"value": 0.25, "standard_error": 0.01},
        "perplexity_ratio": {"value": 1.2, "standard_error": None},
        "top1_agreement": {"value": 0.8, "standard_error": 0.01},
    },
    "retrieval": [{"task": "pass-key", "length": 512, "asked": 5, "correct": 2, "base_correct": 4}],
    "speed": None,
    "bandwidth": None,
    "peak_memory": {"process_bytes": 10**9},
    "seconds": 12.3,
    "conversion": None,
    "plan": None,
    "notes": [],
    "bytes_share": 0.5,
    "recall_share": 0.5,
}
SECTIONS = (
    "By position",
    "By layer",
    "Pass-keys by depth and length",
    "Chat prompts that end",
    "Text of both models",
    "Notes",
)


def full_report() -> dict[str, Any]:
    """A report of format 2 with everything in it, and HTML wherever text may come from."""
    report: dict[str, Any] = copy.deepcopy(FIRST)
    report["divergence"]["positions"] = [
        {"start": s, "end": s + 128, "judged": judged, "nll": 2.5, "base_nll": 2.3, "kl": 0.2}
        for s, judged in ((0, "prompt"), (128, "prompt"), (256, "cache"))
    ]
    report |= {
        "format_version": 2,
        "source": EVIL,
        "passkey": [
            {"length": 512, "depth": 0.1, "correct": True, "base_correct": True},
            {"length": 512, "depth": 0.9, "correct": False, "base_correct": True},
            {"length": 1024, "depth": 0.1, "correct": False, "base_correct": False},
        ],
        "layers": [
            {
                "bytes_per_token_bf16": 10.0,
                "constant_bytes": 100.0,
                "base_bytes_per_token_bf16": 20.0,
                "kl": kl,
                "score_error": None if kl == 0 else 0.1,
                "output_error": 0.2,
            }
            for kl in (0.1, 0.3, 0.0)
        ],
        "samples": [{"prompt": EVIL, "base": f"same {EVIL}", "text": f"same other {EVIL}"}],
        "chat": {
            "max_new_tokens": 160,
            "prompts": [
                {"language": "en", "prompt": EVIL, "ended": False, "base_ended": True},
                {"language": "zh", "prompt": "写一句话。", "ended": True, "base_ended": True},
            ],
        },
        "chat_share": 0.5,
        "notes": [EVIL],
    }
    return report


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"streaming_heads": 2, "kv_heads": 6, "codes": []}, "plan: 2 of 6 KV heads stream"),
        (
            {"streaming_heads": 2, "kv_heads": 6, "layers": [{"bits": {"group": 64}}]},
            "plan: 2 of 6 KV heads stream, others have few bits",
        ),
        (
            {"streaming_heads": 0, "kv_heads": 6, "layers": [{"scales": {"window": 0}}]},
            "plan: heads are in fp8",
        ),
        (
            {"streaming_heads": 0, "kv_heads": 0, "layers": [{"bits": {"group": 64}, "kept": {}}]},
            "plan: heads have few bits",
        ),
        (
            {"streaming_heads": 0, "kv_heads": 0, "layers": [{"kept": {"rank": 64}}]},
            "plan: latents of few bits",
        ),
        (
            {
                "codes": [
                    {"kind": "rotated", "layers": n, "widths": w, "sink": 4, "window": 64}
                    for n, w in ((2, [800, 200]), (1, [500]))
                ]
            },
            "plan: 2 rotated codes of 1,500 numbers in all, exact: the first 4 and last 64 tokens",
        ),
    ],
)
def test_a_page_says_what_the_plan_keeps(plan: dict[str, Any], said: str) -> None:
    assert said in report_page(FIRST | {"plan": {"layers": [{}], **plan}})


def a_table() -> Table:
    table = Table("measure", caption="not shown")
    table.add_column("original", justify="right")
    table.add_row(EVIL, "77,777")
    return table


@pytest.fixture(scope="module")
def page() -> str:
    """The page of the full report, with its table."""
    return report_page(full_report(), a_table())


class Page(HTMLParser):
    """What a browser makes of a page: tags that match, ids, references and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.classes: Counter[str] = Counter()
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "action")
            if name == "id":
                self.ids[value or ""] += 1
            if name == "class":
                self.classes.update((value or "").split())
            if name == "aria-labelledby":
                self.references |= set((value or "").split())
            if name in ("href", "xlink:href"):
                assert value is not None
                assert value.startswith("#")
                self.references.add(value[1:])
            self.references |= set(re.findall(r"url\(#(.*?)\)", value or ""))


def test_a_page_is_one_file_that_fetches_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & parsed.tags.keys()
    addresses = set(re.findall(r"https?://[^\"\s]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_text_of_a_report_is_escaped_everywhere(page: str) -> None:
    assert "<script" not in page
    assert '"<b>' not in page
    parsed = Page(page)
    assert parsed.tags["b"] == 5  # the big numbers
    for text in (EVIL, "same ", f"other {EVIL}", "写一句话。"):
        assert text in parsed.text


def test_ids_are_unique_and_every_reference_leads_somewhere(page: str) -> None:
    parsed = Page(page)
    assert max(parsed.ids.values()) == 1
    assert parsed.tags["svg"] == 5
    assert len(parsed.references) > 10
    assert parsed.references <= parsed.ids.keys()


def test_pictures_follow_the_theme_and_have_words_for_those_who_cannot_see_them(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for picture in pictures:
        used = set(re.findall(r"var\(--([\w-]+)\)", picture))
        assert {"muted", "line", "ours"} <= used <= LIGHT.keys()
        assert not re.search(r": #[0-9a-f]{6}", picture)
        assert "<style" not in picture
        assert re.search(r"<title id=.*?>\w.*</title><desc id=.*?>\w.*</desc>", picture)
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert "Largest in layer 1: 0.3 nats" in page


def test_the_same_report_gives_the_same_bytes_whatever_the_settings_of_matplotlib(
    page: str,
) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        assert report_page(full_report(), a_table()) == page
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("empty", [{}, {"layers": [], "samples": None, "chat": None}])
def test_a_report_of_format_1_has_a_page_without_the_sections_it_lacks(
    empty: dict[str, Any], page: str
) -> None:
    parsed = Page(report_page(FIRST | empty))
    assert not any(section in parsed.text for section in SECTIONS)
    assert parsed.tags["svg"] == 0
    for shown in (
        "50.0%",
        "0.25",
        "± 0.01",
        "12 against 10",
        "2 of 4 answers",
        "20.0 kB instead of 40.0 kB for 384 tokens, float32",
    ):
        assert shown in parsed.text
    complete = Page(page).text
    assert all(section in complete for section in SECTIONS)


def test_numbers_that_a_report_lacks_leave_gaps_and_do_not_fail() -> None:
    report = full_report()
    report["divergence"]["positions"][-1] |= {"nll": None, "kl": None}
    report["divergence"]["kl"]["value"] = None
    for layer in report["layers"]:
        layer |= {"kl": None, "score_error": None}
    report["layers"][0]["output_error"] = None
    parsed = Page(report_page(report))
    assert "Damage by layer" not in parsed.text
    assert "Mean relative error over layers: output 0.2." in parsed.text
    assert not re.search(r"\bnan\b", parsed.text, re.IGNORECASE)


def test_a_report_without_an_original_shows_what_was_measured() -> None:
    report = full_report()
    report |= {"base": None, "base_cache": None, "bytes_share": None, "recall_share": None}
    report["chat_share"] = None
    for name in ("base_cache_bytes", "base_perplexity", "kl", "perplexity_ratio"):
        report["divergence"][name] = None
    for bucket in report["divergence"]["positions"]:
        bucket |= {"base_nll": None, "kl": None}
    for item in (*report["passkey"], *report["retrieval"]):
        item["base_correct"] = None
    for prompt in report["chat"]["prompts"]:
        prompt["base_ended"] = None
    report["samples"][0]["base"] = None
    report["layers"] = [
        {**dict.fromkeys(layer), "bytes_per_token_bf16": 10.0, "constant_bytes": 0.0}
        for layer in report["layers"]
    ]
    parsed = Page(report_page(report))
    assert "against" not in parsed.text
    assert "2/5" in parsed.text
    assert "not answered" in parsed.text
    assert "original" not in parsed.text


def test_a_pass_key_is_answered_lost_or_too_hard_for_the_original(page: str) -> None:
    parsed = Page(page)
    cells = re.findall(r'<td class="(\w+)" title="(.*?)">(.)</td>', page)
    assert cells == [
        ("correct", "answered", "✓"),
        ("lost", "lost", "✗"),
        ("neither", "the original fails too", "–"),
    ]
    assert [parsed.classes[kind] for kind, _, _ in cells] == [2, 2, 2]  # and in the legend


def test_what_both_models_say_is_told_from_what_one_of_them_says(page: str) -> None:
    same = '<span class="muted">same </span>'
    assert f"{same}&lt;script" in page
    assert f"{same}other &lt;script" in page


def test_the_page_has_every_cell_of_the_table(page: str) -> None:
    assert '<td class="right">77,777</td>' in page
    assert "All numbers" in page
    assert "All numbers" not in report_page(FIRST)


def test_the_command_writes_every_output_it_is_given(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / "report.json", tmp_path / "report.html"]
    folder = str(tiny("llama"))
    command = ["evaluate", folder, "--against", folder, "--windows", "2", "--prefill", "48"]
    command += ["--continuation", "16", "--length", "128", "--no-speed", "--quick", "-q"]
    assert run_command([*command, *(f"-o{file}" for file in outputs)]) == 0
    assert "KL in nats" in capfd.readouterr().out
    report = json.loads(outputs[0].read_text(encoding="utf-8"))
    parsed = Page(outputs[1].read_text(encoding="utf-8"))
    assert report["divergence"]["kl"]["value"] == 0.0
    assert "KL in nats (48+16 tokens, 2 windows)" in parsed.text
    assert "Bytes by layer" in parsed.text


@pytest.mark.parametrize("name", ["report.txt", "report", "missing/report.html"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "report.json"
    command = ["evaluate", "no/such/model", "-o", str(good), "-o", str(tmp_path / name)]
    assert run_command(command) == 2
    assert f"{tmp_path / name} cannot be written" in capfd.readouterr().err


def test_the_command_line_draws_nothing_before_it_is_asked_to() -> None:
    script = (
        "import sys, kvtool.cli, kvtool.evaluate.compare\n"
        "sys.exit(str({'matplotlib', 'jinja2', 'torch'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
