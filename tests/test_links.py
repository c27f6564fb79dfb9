"""Every link of the documents leads to a file that is there, and to a heading that it has."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)")
CODE = re.compile(r"```.*?```", re.DOTALL)


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.splitlines()]


def headings(document: Path) -> set[str]:
    """As GitHub names them in links."""
    text = CODE.sub("", document.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = CODE.sub("", document.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:|\.\./\.\./actions/", target):
            continue  # elsewhere, or beside the repository where it is hosted
        name, _, heading = target.partition("#")
        there = (document.parent / name).resolve() if name else document
        assert there.exists(), f"{document.name}: {target}"
        if heading and there.suffix == ".md":
            assert heading in headings(there), f"{document.name}: {target}"
