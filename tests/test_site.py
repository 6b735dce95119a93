"""The pages as a site: a strict build, whole links, and no request that leaves it."""

import html.parser
import pathlib
import posixpath
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long
# What a browser fetches when it shows a page; an <a> it fetches when a reader follows it.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(html.parser.HTMLParser):
    """What a page fetches, links and names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.names.add(values.get("id", ""))
        if values.get(FETCHED.get(tag, ""), "") and values.get("rel") != "canonical":
            self.fetched.append(values[FETCHED[tag]])
        if tag == "a" and values.get("href"):
            self.linked.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages; a warning of mkdocs ends the build."""
    config_lib = pytest.importorskip("mkdocs.config", reason="the extra [docs] builds the site")
    from mkdocs.commands import build

    out = tmp_path_factory.mktemp("site")
    config = config_lib.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build.build(config)
    return out


def pages(site: pathlib.Path) -> dict[str, Page]:
    """By path below the site; not the page that a server shows for a missing one."""
    found = {str(path.relative_to(site)): path for path in site.rglob("*.html")}
    return {name: Page(path.read_text()) for name, path in found.items() if name != "404.html"}


def test_every_page_is_there(site):
    sources = [path.stem for path in (ROOT / "docs").glob("*.md")]
    assert {f"{name}.html" for name in sources} | {"index.html"} <= set(pages(site))
    assert "H1: Does QK-Norm lower" in (site / "index.html").read_text()  # of the README
    assert not list(site.rglob("*.tar.gz")) and not list(site.rglob("*.py[co]"))


def test_no_page_asks_another_host(site):
    found = pages(site)
    assert all(page.fetched for page in found.values())
    away = [(name, url) for name, page in found.items() for url in page.fetched if "//" in url]
    assert not away
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(), style.name


def test_every_link_leads_to_a_file_and_a_heading(site):
    found = pages(site)
    broken = []
    for name, page in found.items():
        for url in (*page.linked, *page.fetched):
            if "//" in url or url.startswith(("data:", "mailto:")):
                continue
            path, _, anchor = urllib.parse.unquote(url).partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            target = name if not path else target
            known = found.get(target)
            if not (site / target).exists() or (anchor and known and anchor not in known.names):
                broken.append((name, url))
    assert not broken
