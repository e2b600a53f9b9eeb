"""The page of routes: what it holds of strangers' text, and how it behaves in a browser, where there is one."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, find_chromium, open_browser

from mixadapters.surgery import page as page_module
from mixadapters.surgery.page import page, short_keys, write_page
from mixadapters.surgery.tracing import LayerRoutes, RouteTable
from mixadapters.surgery.usage import ExpertUsage

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{script}}\u2028 & \"'"
TOKENS = [["The", " cell", " di", "vides", "."], ["def", " f", "(x):", "\n   ", " return", "", " 😀"], [EVIL, " end"]]
NAMES = ("0", "1", "2")


def table(labels: bool = True, names: tuple[str, ...] = NAMES) -> RouteTable:
    """Two layers: in the first each token goes to its place modulo 3, in the second to the next expert."""
    layers = []
    for layer in range(2):
        first = [(torch.arange(len(text)) + layer) % len(names) for text in TOKENS]
        experts = [torch.stack([f, (f + 1) % len(names)], 1) for f in first]
        weights = [torch.tensor([[0.75, 0.25]]).repeat(len(text), 1) for text in TOKENS]
        layers.append(LayerRoutes(f"model.layers.{layer}.mlp.experts", names, experts, weights))
    return RouteTable(TOKENS, layers, ["biology", "code", EVIL] if labels else None)


class Reader(HTMLParser):
    """What a parser of HTML finds: elements by tag, and the text inside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside in ("title", "h1"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_text_of_strangers_is_data_and_never_markup() -> None:
    names = ("a", "</script><script>window.hacked = 1</script>", "c")
    read = Reader(page(table(names=names), title=EVIL))
    assert [tag for tag, _ in read.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in read.tags]
    assert not [attributes for _, attributes in read.tags if any(name.startswith("on") for name in attributes)]
    data = json.loads(read.scripts[0])
    assert [text["tokens"] for text in data["texts"]] == TOKENS
    assert data["labels"][2] == EVIL
    assert [expert["name"] for expert in data["experts"]] == list(names)
    assert read.text.count(EVIL) == 2  # in title and heading, whole


def test_nothing_is_asked_of_the_network() -> None:
    text = page(table())
    assert not re.search(r"https?:|//|@import|url\(|src=", re.sub(r"<script type.*?</script>|//.*", "", text))
    (policy,) = [a["content"] for _, a in Reader(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_experts_are_numbered_through_by_name() -> None:
    one, other = table().layers
    other = LayerRoutes(other.key, ("1", "2", "frozen"), other.experts, other.weights)
    data = json.loads(Reader(page(RouteTable(TOKENS, [one, other]))).scripts[0])
    assert [(e["name"], e["frozen"]) for e in data["experts"]] == [
        ("0", False), ("1", False), ("2", False), ("frozen", True),
    ]  # fmt: skip
    assert data["layers"][1]["has"] == [1, 2, 3]
    assert data["layers"][1]["texts"][0]["experts"][:4] == [2, 3, 3, 1]
    assert data["layers"][1]["texts"][0]["weights"][:2] == [750, 250]


def test_recorded_usage_is_that_of_its_layer_and_label() -> None:
    path = table().layers[0].key
    usage = ExpertUsage(
        layers={path: SimpleNamespace(names=("2", "0"), mass=torch.tensor([4.0, 1.0]))},
        by_label={"code": ExpertUsage(layers={path: SimpleNamespace(names=("2",), mass=torch.tensor([3.0]))})},
    )
    data = json.loads(Reader(page(table(), usage)).scripts[0])
    assert data["usage"][0] == {"all": [1.0, 0.0, 4.0], "labels": [None, [0.0, 0.0, 3.0], None]}
    assert data["usage"][1] is None  # nothing was recorded there


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["m.layers.0.mlp.experts", "m.layers.11.mlp.experts"], ["0", "11"]),
        (["m.0.up", "m.0.down"], ["up", "down"]),
        (["m.0.q.x", "m.1.v.x"], ["0.q", "1.v"]),
        (["gate"], ["gate"]),
        (["m.gate", "m.gate"], ["gate", "gate"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["m.0.up/law", "m.1.up/law"], ["0", "1"]),
        (["m.0/law", "m.0/code"], ["law", "code"]),
    ],
)
def test_layers_are_called_by_what_tells_them_apart(keys, expected) -> None:
    assert short_keys([LayerRoutes(key, (), [], []) for key in keys]) == expected


def test_what_a_browser_could_not_draw_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(page_module, "MOST_TOKENS", 13)
    with pytest.raises(ValueError, match=r"14 tokens with 56 choices .* fewer or shorter texts"):
        write_page(table(), tmp_path / "page.html")
    with pytest.raises(ValueError, match="nothing to show"):
        write_page(RouteTable([[]], []), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    file = tmp_path / "page.html"
    write_page(table(), file, title="old")
    old = file.read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_page(table(), file, title="new")
    assert file.read_text(encoding="utf-8") == old
    assert list(tmp_path.iterdir()) == [file]


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab() -> Any:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("there is no Chromium here; Debian's package is `chromium`")
    with open_browser(chromium) as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(table(), path, title=f"Routes {EVIL}")
    return path


def opened(tab: Page, file: Any, **window: Any) -> Page:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(file, **window)
    return tab


def looks(tab: Page, selector: str = ".t") -> list[str]:
    """The classes of elements that are not hidden."""
    return tab.run(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.checkVisibility()).map(e => e.className)"
    )


def text_of(tab: Page, selector: str) -> str:
    return tab.run(f"document.querySelector({selector!r}).innerText")


def test_nothing_strange_runs_and_the_console_is_silent(tab, file) -> None:
    opened(tab, file)
    assert tab.run("typeof window.hacked") == "undefined"
    assert tab.run("document.querySelectorAll('img, iframe, a[href^=http]').length") == 0
    shown = tab.run("[...document.querySelectorAll('.tokens')].map(e => e.textContent)")
    assert shown == ["".join(text) for text in TOKENS]
    assert tab.requests == [file.resolve().as_uri()]
    assert tab.messages == []


def test_no_other_script_and_no_other_style_works(tab, file) -> None:
    opened(tab, file)
    tab.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    assert tab.run("typeof window.hacked") == "undefined"
    tab.run("document.body.insertAdjacentHTML('beforeend', '<p id=late style=color:red>late</p>')")
    assert tab.run("getComputedStyle(late).color") != "rgb(255, 0, 0)"


def test_it_works_by_keyboard(tab, file) -> None:
    opened(tab, file)
    seen = []
    for _ in range(60):
        tab.press("Tab")
        seen.append(tab.run("document.activeElement.id || document.activeElement.className.split(' ')[0]"))
        if seen[-1] == "t":
            break
    assert seen[:4] == ["skip", "layer", "after", "play"]  # there is nothing before the first layer
    assert seen[-1] == "t"
    assert "The" in text_of(tab, "#inspector")
    assert "expert 0\n0.75" in re.sub(r"\n+", "\n", text_of(tab, "#inspector"))
    tab.press("ArrowRight")
    assert "cell" in text_of(tab, "#inspector")
    assert "expert 1" in text_of(tab, "#inspector")
    tab.press("ArrowDown")  # the next layer, at the same token
    assert tab.run("document.querySelector('#layer').value") == "1"
    assert "expert 2" in text_of(tab, "#inspector")
    tab.press("End")
    assert tab.run("document.activeElement.textContent") == "."
    tab.press("ArrowRight", "Home", "ArrowLeft", "Escape")
    assert tab.run("document.activeElement.textContent") == "The"
    assert not tab.run("document.querySelectorAll('.at').length")
    tab.press("Tab")  # one stop in each text, not one for each token
    assert tab.run("document.activeElement.textContent") == "def"
    assert tab.messages == []


def test_the_slider_and_its_buttons_choose_the_layer(tab, file) -> None:
    opened(tab, file)
    assert text_of(tab, "#where").startswith("1 / 2 model.layers.0")
    first = looks(tab)
    tab.run("document.querySelector('#layer').focus()")
    tab.press("ArrowRight")
    assert text_of(tab, "#where").startswith("2 / 2 model.layers.1")
    assert tab.run("document.querySelector('#layer').getAttribute('aria-valuetext')").startswith(
        "2 of 2, model.layers.1"
    )
    assert tab.run("document.querySelector('.t').dataset.n") == "1"
    assert tab.run("document.querySelector('#after').disabled")
    tab.run("document.querySelector('#before').click()")
    assert looks(tab) == first
    tab.run("document.querySelectorAll('#by-layer tbody button')[1].click()")
    assert text_of(tab, "#where").startswith("2 / 2")


def test_labels_filter_texts_and_numbers(tab, file) -> None:
    opened(tab, file)
    assert len(looks(tab)) == 14
    tab.run("document.querySelector('#labels input').focus()")
    tab.press("ArrowRight", "ArrowRight")  # All, biology, code
    assert len(looks(tab)) == 7
    # 0, 1, 2, 0, 1, 2, 0 with 0.75, and the next with 0.25: (3 * 0.75 + 2 * 0.25) / 7
    assert text_of(tab, "#bars li .share") == "39%"
    heat = tab.run("[...document.querySelectorAll('#by-label tbody tr')].map(r => [...r.cells].map(c => c.innerText))")
    assert heat[1] == ["code", "39", "32", "29"]


def test_an_expert_can_be_seen_alone(tab, file) -> None:
    opened(tab, file)
    tab.run("document.querySelectorAll('#bars button')[1].focus()")
    tab.press("Enter")
    assert tab.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    kept = tab.run("[...document.querySelectorAll('.t:not(.off)')].map(e => e.dataset.n)")
    assert set(kept) == {"1"}
    assert len(kept) == 5
    tab.press(" ")
    assert not tab.run("document.querySelectorAll('.off').length")


def test_pointing_at_a_token_tells_its_experts(tab, file) -> None:
    opened(tab, file)
    tab.point(".t[data-i='2']")
    assert "di" in text_of(tab, "#inspector")
    assert "0.75" in text_of(tab, "#inspector")
    assert len(tab.run("[...document.querySelectorAll('.way li')].map(e => e.innerText)")) == 2


def test_experts_are_told_by_number_and_not_by_colour_alone(tab, file) -> None:
    opened(tab, file)
    spans = tab.run("[...document.querySelectorAll('.t')].map(e => [e.matches('.first'), e.dataset.n, "
                    "getComputedStyle(e, '::before').content])")  # fmt: skip
    assert all(first and content.startswith(f'"{number}"') for first, number, content in spans)


def test_every_control_has_a_name_and_a_role(tab, file) -> None:
    opened(tab, file)
    nodes = [n for n in tab.accessibility() if not n.get("ignored")]
    controls = [n for n in nodes if n["role"]["value"] in ("button", "slider", "radio", "region", "group")]
    roles = [n["role"]["value"] for n in controls]
    assert {"button", "slider", "radio", "region", "group"} <= set(roles)
    unnamed = [n["role"]["value"] for n in controls if not n.get("name", {}).get("value", "").strip()]
    assert not unnamed
    assert "heading" in [n["role"]["value"] for n in nodes]
    assert tab.run("document.documentElement.lang") == "en"


# The contrast of an element's text with what lies behind it, both as painted (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return [...document.querySelectorAll("h1, h2, h3, p, .t, .badge, .name, .share, td, th, #labels span, output")]
    .filter((e) => e.checkVisibility() && e.innerText.trim())
    .map((e) => {
      const behind = [];
      for (let at = e; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
      const one = light(painted(behind)), other = light(painted([...behind, getComputedStyle(e).color]));
      return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), e.className || e.tagName];
    });
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(tab, tmp_path, dark) -> None:
    many = 24
    tokens = [[f" {i}" for i in range(many)]]
    experts = [torch.arange(many).view(-1, 1)]
    write_page(
        RouteTable(tokens, [LayerRoutes("gate", tuple(map(str, range(many))), experts, [torch.ones(many, 1)])], ["a"]),
        tmp_path / "page.html",
    )  # fmt: skip
    opened(tab, tmp_path / "page.html", dark=dark)
    tab.run("document.querySelector('.t').click()")
    found = tab.run(CONTRAST)
    assert len(found) > 3 * many
    assert not [pair for pair in found if pair[0] < 4.5]
    assert tab.run("getComputedStyle(document.body).colorScheme") == "light dark"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (320, 640)])
def test_it_fits_the_window_and_is_not_blank(tab, file, width, height) -> None:
    image = pytest.importorskip("PIL.Image")
    opened(tab, file, width=width, height=height)
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("document.querySelector('.tokens').scrollIntoView({ block: 'center' })")
    pixels = np.asarray(image.open(io.BytesIO(tab.screenshot())).convert("RGB")).reshape(-1, 3).astype(int)
    coloured = (pixels.max(1) - pixels.min(1) > 40).mean()
    assert len(np.unique(pixels, axis=0)) > 100
    assert 0.002 < coloured < 0.9
