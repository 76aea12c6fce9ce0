"""Links between the documents lead somewhere."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/*.md", "*/README.md", "kernels/*/README.md")
DOCUMENTS = sorted(file for place in PLACES for file in REPOSITORY.glob(place))
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]*))?\)")


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda x: str(x.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text()):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_every_command_stands_in_the_readme() -> None:
    from kvtool.cli import app

    readme = (REPOSITORY / "README.md").read_text()
    names = [one.name or one.callback.__name__ for one in app.registered_commands if one.callback]
    groups = {
        group.typer_instance.info.name: [
            one.name or one.callback.__name__.replace("_", "-")
            for one in group.typer_instance.registered_commands
            if one.callback
        ]
        for group in app.registered_groups
        if group.typer_instance
    }
    assert [name for name in names if f"kvtool {name}" not in readme] == []
    missing = [
        f"{group} {name}" for group, all_ in groups.items() for name in all_ if name not in readme
    ]
    assert missing == []
