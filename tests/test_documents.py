"""The documents: their commands are found and typed, their links lead somewhere, README is short.

What it does: reads. What it does not: type a command; tests/support/documents.py says who does.
"""

import re

import pytest

from tests.support import documents
from tests.support.documents import Command, commands
from tools.process import CHECKOUT


def test_commands_are_found_with_all_their_lines() -> None:
    text = """
# One
`docker compose
ps`, `docker`, `docker compose up -d --wait` and `SELECT 1`
```sh
docker compose exec a b '{
  "c": 1}'
docker compose exec d \\
  e  # why
```
## Two
   ```console
   $ docker ps
   CONTAINER ID
   ```
```
docker compose stop a
(what is no command)
```
```json
docker compose down
```
"""
    assert list(documents.find("x.md", text)) == [
        Command("x.md", "One", "inline", "docker compose ps"),
        Command("x.md", "One", "inline", "docker compose up -d --wait"),
        Command("x.md", "One", "sh", "docker compose exec a b '{\n  \"c\": 1}'"),
        Command("x.md", "One", "sh", "docker compose exec d \\\n  e"),
        Command("x.md", "Two", "console", "docker ps"),
        Command("x.md", "Two", "", "docker compose stop a"),
    ]


def test_what_is_said_not_to_be_typed_stands_in_a_document_and_the_rest_is_typed() -> None:
    found = {command.text for command in commands() if command.block != "shell"}
    typed = [documents.to_type(stack) for stack in documents.STACKS]
    assert all(typed)
    assert found.difference(*typed) == documents.NOT_TYPED.keys()


def test_every_block_is_typed_as_a_whole_by_a_test_that_is_there() -> None:
    chapters = {command.chapter for command in commands() if command.block == "shell"}
    assert chapters == documents.BLOCKS.keys()
    for chapter, test in documents.BLOCKS.items():
        assert f'"{chapter}"' in (CHECKOUT / test).read_text()


@pytest.mark.parametrize("name", documents.documents())
def test_a_one_line_query_waits_for_no_key(name: str) -> None:
    for command in documents.find(name, documents.text_of(name)):
        if re.search(r"\bpsql\b.* -c \"[^\\]", command.text) and " -T " not in command.text:
            assert " -P pager=off " in command.text, command


def test_headings_and_links_are_found_as_github_does() -> None:
    text = """
# What's `up`, or *down*?
See [this](a.md#b) and ![a picture](c.png "its title"), not `[that](d.md)`.
## [Linked](e.md) & more
```
# no heading, and [no link](f.md)
```
## Linked & more
[name]: g.md
<img alt="a" src="h.svg">
"""
    assert documents.anchors(text) == {"whats-up-or-down", "linked--more", "linked--more-1"}
    assert documents.links(text) == ["a.md#b", "c.png", "e.md", "g.md", "h.svg"]


@pytest.mark.parametrize("name", documents.documents())
def test_every_link_leads_somewhere(name: str) -> None:
    for link in documents.links(documents.text_of(name)):
        if re.match(r"\w+:", link):
            continue  # another site, which no test asks
        path, _, anchor = link.partition("#")
        target = (CHECKOUT / name).parent / path if path else CHECKOUT / name
        assert target.resolve().is_relative_to(CHECKOUT.resolve()), link
        assert target.exists(), link
        if anchor:
            assert anchor in documents.anchors(target.read_text("utf-8")), link


def test_the_readme_has_at_most_300_lines_and_leads_to_every_page() -> None:
    text = documents.text_of("README.md")
    assert len(text.splitlines()) <= 300
    pages = {name for name in documents.documents() if name.startswith("docs/")}
    assert pages
    in_the_map = set(documents.links(documents.chapter("README.md", "The documentation")))
    assert pages <= in_the_map


@pytest.mark.parametrize("name", sorted(n for n in documents.documents() if n.startswith("docs/")))
def test_a_page_opens_with_the_question_that_it_answers(name: str) -> None:
    title, question = documents.text_of(name).split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert "?" in question
    assert len(question.splitlines()) <= 3


# With DESC alone, PostgreSQL puts NULL first; and a device without a clock sends none.
NULLS_FIRST = re.compile(r"\bts_device\s+DESC\b(?!\s+NULLS\s+LAST)", re.IGNORECASE)


def test_nothing_sorts_events_without_a_time_before_the_newest() -> None:
    for command in commands():
        assert not NULLS_FIRST.search(command.text), command
    for path in [*CHECKOUT.glob("postgres/**/*.sql"), *CHECKOUT.glob("tools/*")]:
        if path.is_file():
            assert not NULLS_FIRST.search(path.read_text()), path
