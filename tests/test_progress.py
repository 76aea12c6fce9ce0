"""What long pieces of work tell."""

from kvtool.progress import telling


def test_an_item_is_told_of_when_it_is_dealt_with() -> None:
    said: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        said.append((stage, done, total))

    for number, item in enumerate(telling(report, "reading", iter("ab"), 2)):
        assert item == "ab"[number]
        assert said[-1] == ("reading", number, 2)
    assert [done for _, done, _ in said] == [0, 1, 2]
