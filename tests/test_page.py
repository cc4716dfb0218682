"""The page of a stream: safe to put any words into, and in a real browser it shows what happened, frame by frame."""

import io
import json
import re
import shutil
import time
from base64 import b64decode
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

import stream_tiny
import train_tiny
from mod.config import ModelConfig, UserError
from mod.data import WORDS
from mod.live.costs import chunk_flops, dense, layer_tokens
from mod.live.page import MOST_PIXELS, check_page, picture_uri, write_page
from mod.live.record import Line, Moment

HOSTILE = '</script><!-- <script> </script x <script x & "quotes" \'both\' {{title}} <img src=x onerror="window.broken = 1"> \u2028 ?'
ROUTED, DENSE = ModelConfig(), ModelConfig(layers="none")
SKIPPING = ModelConfig(layers="keep:1,0,1,0.5", grid=3)  # a layer that keeps nothing, and another grid
SAID = [
    [],
    [Line("assistant", "red circle appears", "red circle appears")],
    [Line("user", HOSTILE), Line("assistant", "no idea <b>", "top & left")],
    [Line("assistant", "", "blue square leaves")],
    [Line("assistant", "green star appears", ""), Line("user", "x" * 300), Line("assistant", "top left")],
]  # what is said after a frame: nothing, right, wrong, missed, should have been silence and nobody knows


def stream(config: ModelConfig, frames: int) -> list[Moment]:
    """Pictures and scores by chance, and whatever a stream can hold said in turn."""
    random, moments, text = np.random.default_rng(0), [], 1
    for frame in range(frames):
        moment = Moment(frame, frame / 2, random.uniform(-1, 1, (3, config.image_size, config.image_size)))
        moment.said, text = SAID[frame % len(SAID)], text + 5 * (frame % len(SAID))
        for layer in (number for number, ratio in enumerate(config.keep_ratios) if ratio < 1):
            scores = random.normal(size=config.frame_tokens).astype(np.float32)
            kept = np.zeros(config.frame_tokens, bool)
            kept[np.argsort(-scores)[: config.keep_counts[layer]]] = True
            moment.scores[layer], moment.kept[layer] = scores, kept
        moment.entries, moment.held = layer_tokens(config, frame + 1, text), (frame + 1, text)
        moment.flops = tuple(chunk_flops(each, frame + 1, text, frame + 1, text) for each in (config, dense(config)))
        moment.seconds = 0.01
        moments.append(moment)
    return moments


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("config", [ROUTED, DENSE, SKIPPING])
def test_json_holds_every_moment(config, tmp_path):
    moments = stream(config, 6)
    write_page(tmp_path / "a.html", moments, config, "A stream")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    data = embedded((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert data["layers"] == [layer for layer, ratio in enumerate(config.keep_ratios) if ratio < 1]
    assert (data["grid"], data["tokens"], len(data["moments"])) == (config.grid, config.frame_tokens, 6)
    for moment, told in zip(moments, data["moments"], strict=True):
        assert (told["frame"], told["time"], told["seconds"]) == (moment.frame, moment.time, moment.seconds)
        assert told["entries"] == moment.entries and tuple(told["flops"]) == moment.flops
        assert told["full"] == [config.frame_tokens * moment.held[0] + moment.held[1]] * config.depth
        assert tuple(told["held"]) == moment.held
        assert [Line(**line) for line in told["said"]] == moment.said
        for layer, kept in moment.kept.items():
            assert told["kept"][str(layer)] == [token for token in range(len(kept)) if kept[token]]
            assert told["scores"][str(layer)] == pytest.approx(moment.scores[layer].tolist(), rel=6e-4)
            assert all(len(f"{abs(s):e}".split("e")[0].rstrip("0")) <= 5 for s in told["scores"][str(layer)])
        file = io.BytesIO(b64decode(told["picture"].removeprefix("data:image/png;base64,")))
        shown = imread(file)[..., :3].transpose(2, 0, 1) * 2 - 1
        assert np.abs(shown - moment.picture).max() <= 1 / 255 + 1e-6


def test_words_cannot_break_the_page(tmp_path):
    """Neither questions nor a title can end their element, open a comment, or stand where they do not belong."""
    tags, titles = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

        def handle_data(self, text):
            if tags[-1:] == ["title"] or tags[-1:] == ["h1"]:
                titles.append(text.strip())

    title = "</title><script>window.broken = 1</script> {{data}} \udc80"
    write_page(tmp_path / "a.html", stream(ROUTED, 5), ROUTED, title)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    Reader().feed(page)
    assert tags.count("script") == 2 and tags.count("main") == 1 and "b" not in tags
    assert [text for text in titles if text] == [title.replace("\udc80", "\ufffd")] * 2
    assert embedded(page)["moments"][2]["said"][0]["text"] == HOSTILE
    assert "://" not in page, "the page names a host"


def test_a_score_that_is_no_number_and_a_large_picture(tmp_path):
    moments = stream(ROUTED, 1)
    moments[0].scores[1][3:6] = np.nan, np.inf, -np.inf
    write_page(tmp_path / "a.html", moments, ROUTED, "A stream")
    assert embedded((tmp_path / "a.html").read_text())["moments"][0]["scores"]["1"][3:6] == [None] * 3
    large = np.ones((3, 2 * MOST_PIXELS + 100, 2 * MOST_PIXELS + 100))
    large[:, :300] = -3  # darker than dark
    small = imread(io.BytesIO(b64decode(picture_uri(large).split(",")[1])))
    assert small.shape[:2] == (166, 166) and small[:100, :, 0].max() == 0 and small[100:, :, 0].min() == 1


@pytest.mark.parametrize("name", ["a.htm", "a", "a.html.png", "no/such/a.html", "folder.html", "."])
def test_a_page_that_could_not_be_written_is_refused_in_one_sentence(name, tmp_path):
    (tmp_path / "folder.html").mkdir()
    for refuse in (check_page, lambda path: write_page(path, stream(DENSE, 1), DENSE, "t")):
        with pytest.raises(UserError, match="--html got .*(ends with .html|its folder does not exist)") as error:
            refuse(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.html"]


def test_a_stream_without_frames_is_refused(tmp_path):
    check_page(tmp_path / "a.html")
    with pytest.raises(UserError, match="0 frames, expected at least 1"):
        write_page(tmp_path / "a.html", [], ROUTED, "A stream")
    assert not list(tmp_path.iterdir())


# ---- in a browser ----------------------------------------------------------------------------------------------------

# All that a reader sees, as the browser has it; a line or a number that is not visible is not there.
SHOWN = """
const text = (element) => element.textContent.replace(/\\s+/g, " ").trim();
const visible = (element) => getComputedStyle(element).display !== "none" && element.getClientRects().length > 0;
const one = (id) => document.getElementById(id);
const curve = (id) => {
  const drawn = [...document.querySelectorAll(`#${id} g:not(.future) path`)].map((path) =>
    path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number)));
  const dots = ["mine", "full"].map((name) => {
    const dot = document.querySelector(`#${id} circle.${name}`);
    return [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))];
  });
  return { drawn, dots, values: ["mine", "full"].map((name) => Number(one(`${id}-${name}`).dataset.value)),
    texts: ["mine", "full", "share"].map((name) => text(one(`${id}-${name}`))),
    edge: Number(document.querySelector(`#${id} rect`).getAttribute("width")),
    cursor: document.querySelector(`#${id} .cursor`).getAttribute("transform") };
};
const box = one("dialogue").getBoundingClientRect();
const lines = [...document.querySelectorAll("#lines li")].filter(visible);
const end = lines.length ? lines.at(-1).getBoundingClientRect().bottom : box.bottom;
return {
  now: text(one("now")), slider: Number(one("scrub").value), spoken: one("scrub").getAttribute("aria-valuetext"),
  alts: [...document.images].map((image) => image.alt),
  pictures: [...new Set([...document.images].map((image) => image.src))],
  layers: Object.fromEntries([...document.querySelectorAll("[data-layer]")].map((figure) => [figure.dataset.layer, {
    keeps: text(figure.querySelector(".keeps")), cls: text(figure.querySelector(".cls")),
    cells: [...figure.querySelectorAll(".cell")].map((cell) => ({
      token: Number(cell.dataset.token), score: Number(cell.dataset.score), label: cell.getAttribute("aria-label"),
      dark: getComputedStyle(cell).backgroundColor !== "rgba(0, 0, 0, 0)",
      framed: getComputedStyle(cell).boxShadow !== "none", bar: cell.querySelector("i").style.width,
      number: text(cell.querySelector(".number")), colour: cell.querySelector("i").style.background })) }])),
  lines: lines.map(text), current: [...document.querySelectorAll("#lines .current")].map(text),
  nothing: visible(one("nothing")), scrolled: end <= box.bottom + 1 && end >= box.top, page: scrollY,
  entries: curve("entries"), flops: curve("flops"), more: text(one("entries-more")), clock: text(one("clock")),
};
"""

CONTRAST = """
const parse = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return { rgb: [r, g, b], a }; };
const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {  // what is behind a word: the backgrounds of all around it, one over the other
  if (!element) return [255, 255, 255];
  const { rgb, a } = parse(getComputedStyle(element).backgroundColor), below = a < 1 ? behind(element.parentElement) : rgb;
  return rgb.map((c, i) => a * c + (1 - a) * below[i]);
}
const worst = [];
for (const element of document.querySelectorAll("body *:not(script):not(noscript):not(title)")) {
  const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const style = getComputedStyle(element);
  if (!words || !element.getClientRects().length || style.visibility === "hidden") continue;
  const ink = parse(element.closest("svg") ? style.fill : style.color).rgb;
  const [low, high] = [light(ink), light(behind(element))].sort((a, b) => a - b);
  worst.push([(high + 0.05) / (low + 0.05), element.getAttribute("class") || element.localName, element.textContent.slice(0, 30)]);
}
return worst.sort((a, b) => a[0] - b[0]);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-background-networking "
        "disable-component-update disable-sync window-size=1280,900"
    )
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Write a page and open it; afterwards the console is empty, and the page has asked for nothing but itself."""
    name = (tmp_path / "stream.html").as_uri()

    def show(config, frames, title="A stream", recorded=True):
        moments = stream(config, frames)
        for moment in moments if not recorded else []:
            moment.kept, moment.scores = {}, {}
        write_page(tmp_path / "stream.html", moments, config, title)
        browser.get(name)
        assert browser.execute_script("return data") == embedded((tmp_path / "stream.html").read_text(encoding="utf-8"))
        return moments

    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    # The browser's own first tab (chrome:) may still be loading when the first page opens.
    assert name in asked and {url for url in asked if not url.startswith(("data:", "chrome:"))} == {name}
    assert browser.execute_script("return window.broken") is None


def press(browser, *keys):
    """Keys as a user presses them: they go to whatever has the focus."""
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def keys():
    from selenium.webdriver import Keys

    return Keys


def choose_speed(browser, value: str):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "speed")).select_by_value(value)


def focus(browser, selector):
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].focus()", element)
    return element


def at(browser) -> int:
    return int(browser.find_element("id", "scrub").get_property("value"))


def script(browser, text):
    return browser.execute_script(f"return {text}")


def seconds(value: float) -> str:
    return f"{value:g} s"


def words(line: Line, when: float) -> str:
    """How a line reads on the page, white space aside."""
    said = " ".join(f"{seconds(when)} {line.role}: {line.text or '(silent)'}".split())
    if line.truth is None:
        return said
    return f"{said} ✗ should be: {line.truth or '(silent)'}" if line.wrong else f"{said} ✓ right"


def check_curve(curve: dict, pairs: list[tuple[int, int]], now: int, times: list[float]):
    """Both lines go through every value; the strong part, the cursor and the dots end at the present."""
    most, span = max(map(max, pairs)), times[-1] - times[0] or 1
    points = [
        [(48 + 282 * (time - times[0]) / span, 160 - 150 * pair[which] / most) for time, pair in zip(times, pairs, strict=True)]
        for which in (0, 1)
    ]
    assert np.abs(np.array(curve["drawn"]) - np.array(points)).max() < 0.06
    assert np.abs(np.array(curve["dots"]) - np.array(points)[:, now]).max() < 1e-6
    x = points[0][now][0]
    assert curve["edge"] == pytest.approx(x) and f"translate({x:.4g}"[:12] in curve["cursor"]
    assert curve["values"] == list(pairs[now])
    assert float(curve["texts"][2].rstrip(" %")) == pytest.approx(100 * pairs[now][0] / pairs[now][1], abs=0.051)


def check(shown: dict, config: ModelConfig, moments: list[Moment], now: int):
    moment, times = moments[now], [each.time for each in moments]
    name = f"Frame {moment.frame} at {seconds(moment.time)}"
    assert (shown["now"], shown["spoken"], shown["slider"]) == (name, name, now)
    assert shown["pictures"] == [picture_uri(moment.picture)]
    assert list(shown["layers"]) == [str(layer) for layer in moment.kept]
    assert shown["clock"] == "Computed in 10 ms, with all said after it."

    alts = [name]
    for layer, kept in moment.kept.items():
        scores, told = [float(f"{score:.4g}") for score in moment.scores[layer]], shown["layers"][str(layer)]
        everywhere = [float(f"{score:.4g}") for each in moments for score in each.scores[layer]]
        fates = [f"score {s:g}, {'kept' if k else 'skipped'}" for s, k in zip(scores, kept, strict=True)]
        places = [""] + [f"row {row} column {column}" for row in range(1, config.grid + 1) for column in range(1, config.grid + 1)]
        patches = [places[token] for token in range(1, len(kept)) if kept[token]]
        parts = ["CLS"] * bool(kept[0]) + ["patches " + ", ".join(patches)] * bool(patches)
        alts.append(f"Layer {layer} keeps {kept.sum()} of {len(kept)} tokens: {' and '.join(parts) or 'none'}")
        assert told["keeps"] == f"Keeps {config.keep_counts[layer]} of {config.frame_tokens} tokens."
        assert told["cls"] == f"CLS token: {fates[0]}."
        assert [cell["token"] for cell in told["cells"]] == list(range(1, config.frame_tokens))
        for cell, token in zip(told["cells"], range(1, config.frame_tokens), strict=True):
            assert cell["framed"] == kept[token] and cell["dark"] != kept[token], (layer, token)
            assert cell["score"] == scores[token] and cell["label"] == f"{places[token]}: {fates[token]}"
            assert float(cell["number"]) == pytest.approx(scores[token], rel=0.06)
            share = (scores[token] - min(everywhere)) / (max(everywhere) - min(everywhere))
            assert float(cell["bar"].rstrip("%")) == pytest.approx(100 * share, abs=1e-2)
            red, green, blue = map(int, re.findall(r"\d+", cell["colour"]))
            ends = [(0, 114, 178), (0, 158, 115), (240, 228, 66)]
            assert np.abs([np.interp(share, (0, 0.5, 1), e) for e in zip(*ends, strict=True)] - np.array([red, green, blue])).max() < 1
    assert shown["alts"] == alts

    lines = [[words(line, each.time) for line in each.said] for each in moments[: now + 1]]
    assert shown["lines"] == sum(lines, []) and shown["current"] == lines[-1]
    assert shown["nothing"] == (not shown["lines"]) and shown["scrolled"] and shown["page"] == 0

    check_curve(shown["entries"], [(sum(each.entries), sum(layer_tokens(dense(config), *each.held))) for each in moments], now, times)
    check_curve(shown["flops"], [each.flops for each in moments], now, times)
    assert shown["entries"]["texts"][0] == f"{sum(moment.entries):,}"
    size, unit = (1e9, "GFLOPs") if moments[-1].flops[1] >= 1e9 else (1e6, "MFLOPs")
    assert shown["flops"]["texts"][:2] == [f"{float(f'{flops / size:.4g}'):,g} {unit}" for flops in moment.flops]
    frames, text = moment.held
    told = f"They stand for {frames} frame{'s' * (frames != 1)} and {text} text token{'s' * (text != 1)}."
    assert shown["more"] == f"Layer by layer: {' '.join(f'{n:,}' for n in moment.entries)}. {told}"


@pytest.mark.parametrize(("config", "frames"), [(ROUTED, 11), (DENSE, 6), (SKIPPING, 6), (ROUTED, 1)])
def test_every_frame_shows_what_happened(config, frames, browser, show):
    """On with the keys, back with the slider; the title is the user's own words, too."""
    title = HOSTILE.replace("\u2028 ", "")  # which browsers do not count as white space, and Python does
    moments = show(config, frames, title=title)
    assert browser.find_element("tag name", "h1").text == title == browser.title
    for now in range(frames):
        check(browser.execute_script(SHOWN), config, moments, now)
        press(browser, keys().ARROW_RIGHT)
    check(browser.execute_script(SHOWN), config, moments, frames - 1)  # nothing after the last
    focus(browser, "#scrub")
    for now in reversed(range(frames)):
        check(browser.execute_script(SHOWN), config, moments, now)
        press(browser, keys().ARROW_LEFT)
    slide = "const s = document.getElementById('scrub'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    for now in (frames - 1, 0, frames // 2):
        browser.execute_script(slide, now)
        check(browser.execute_script(SHOWN), config, moments, now)


def test_keys_do_one_thing_each(browser, show):
    """What a key does in a button, the slider or a map, it does not do on the page a second time."""
    show(ROUTED, 8)
    key = keys()
    for pressed, expected in ((key.END, 7), (key.ARROW_LEFT, 6), (key.HOME, 0), (key.ARROW_LEFT, 0), (key.ARROW_RIGHT, 1)):
        press(browser, pressed)
        assert at(browser) == expected
    for selector in ("#scrub", "#next", "#show-scores", "#dialogue"):
        press(browser, key.HOME)
        focus(browser, selector)
        press(browser, key.ARROW_RIGHT, key.ARROW_RIGHT, key.ARROW_LEFT)
        assert at(browser) == 1, selector
        press(browser, key.END)
        assert at(browser) == 7, selector
    focus(browser, "#previous")
    press(browser, " ")
    assert at(browser) == 6 and script(browser, "timer") is None
    focus(browser, "#speed")
    press(browser, key.ARROW_LEFT)
    assert at(browser) == 6
    focus(browser, "#show-scores")
    press(browser, " ")
    assert script(browser, "timer") is None and script(browser, "document.activeElement.checked")
    for selector in ("body", "#play", "#scrub"):
        script(browser, "document.activeElement.blur()")
        focus(browser, selector)
        press(browser, " ")
        assert script(browser, "timer !== null") and browser.find_element("id", "play").text == "Pause", selector
        press(browser, " ")
        assert script(browser, "timer === null") and browser.find_element("id", "play").text == "Play", selector
    script(browser, "show(3)")
    modified = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', altKey: true, bubbles: true}))"
    script(browser, modified)
    assert at(browser) == 3


def test_buttons_and_playing(browser, show):
    """Paused until it is asked; then to the end, in the stream's own time, without chatter; and from the beginning again."""
    show(ROUTED, 5)
    for name, expected in (("next", 1), ("next", 2), ("previous", 1)):
        browser.find_element("id", name).click()
        assert at(browser) == expected and browser.find_element("id", "dialogue").get_attribute("aria-live") == "polite"
    play = browser.find_element("id", "play")
    time.sleep(0.3)
    assert at(browser) == 1  # nothing moves by itself
    choose_speed(browser, "4")
    spy = "window.waits = []; const set = setTimeout; window.setTimeout = (f, wait) => (waits.push(wait), set(f, wait))"
    browser.execute_script(spy)
    started = time.monotonic()
    play.click()
    assert play.text == "Pause"
    while at(browser) < 2:
        assert time.monotonic() - started < 5
    assert browser.find_element("id", "dialogue").get_attribute("aria-live") == "off"
    assert browser.find_element("id", "now").get_attribute("aria-live") == "off"
    while play.text == "Pause":
        assert time.monotonic() - started < 5
    assert at(browser) == 4
    assert script(browser, "waits") == [125] * 3  # half a second of stream time, four times as fast
    choose_speed(browser, "1")
    play.click()
    assert at(browser) == 0 and play.text == "Pause"
    play.click()
    time.sleep(0.7)  # longer than to the next frame
    assert at(browser) == 0 and play.text == "Play"


def test_one_frame_cannot_be_played(browser, show):
    show(DENSE, 1)
    for name in ("play", "next", "previous"):
        browser.find_element("id", name).click()
    assert at(browser) == 0 and browser.find_element("id", "play").text == "Play"
    assert browser.find_element("id", "explanation").text == "No layer is routed: every layer processes every token of every frame."
    assert not browser.find_element("id", "show-scores").is_displayed()


def test_choices_that_were_not_recorded_are_not_said_to_be_none(browser, show):
    show(ROUTED, 2, recorded=False)
    assert browser.find_element("id", "explanation").text == "What the routed layers keep was not recorded."


def test_scores_are_told_when_pointed_at_and_for_all_on_demand(browser, show):
    from selenium.webdriver import ActionChains

    moments, key = show(ROUTED, 3), keys()
    numbers = browser.find_elements("css selector", '[data-layer="3"] .number')
    cells = browser.find_elements("css selector", '[data-layer="3"] .cell')
    detail = browser.find_element("css selector", '[data-layer="3"] .detail')

    def seen():
        return [token for token, number in enumerate(numbers, start=1) if number.is_displayed()]

    def told(frame, token):
        return f"score {float(f'{moments[frame].scores[3][token]:.4g}'):g}, {'kept' if moments[frame].kept[3][token] else 'skipped'}."

    assert seen() == [] and detail.text == "Point at a patch for its score."
    ActionChains(browser).move_to_element(cells[7]).perform()
    assert seen() == [8] and detail.text == "Patch row 2 column 3: " + told(0, 8)
    cells[12].click()
    assert seen() == [13] and detail.text == "Patch row 3 column 3: " + told(0, 13)
    script(browser, "show(1)")  # what is told stays true when the frame changes
    assert detail.text == "Patch row 3 column 3: " + told(1, 13)
    for pressed, token in ((key.ARROW_RIGHT, 14), (key.ARROW_DOWN, 19), (key.HOME, 16), (key.ARROW_LEFT, 16), (key.END, 20),
                           (key.ARROW_RIGHT, 20), (key.ARROW_DOWN, 25), (key.ARROW_DOWN, 25), (key.ARROW_UP, 20)):
        press(browser, pressed)
        assert script(browser, "document.activeElement.dataset.token") == str(token)
    assert detail.text == "Patch row 4 column 5: " + told(1, 20) and at(browser) == 1
    assert script(browser, "[...document.querySelectorAll('[data-layer=\"3\"] [tabindex=\"0\"]')].map((c) => c.dataset.token)") == ["20"]
    browser.find_element("id", "show-scores").click()
    assert seen() == list(range(1, 26))


def test_names_for_a_screen_reader(browser, show):
    show(ROUTED, 3)
    assert script(browser, "document.documentElement.lang") == "en"
    for tag, number in (("main", 1), ("h1", 1), ("h2", 3), ("figure", 5), ("figcaption", 5)):
        assert len(browser.find_elements("tag name", tag)) == number, tag
    for element in browser.find_elements("css selector", "button, input, select, img, [role]:not([role=row]), section"):
        assert element.accessible_name, element.get_attribute("outerHTML")[:100]
    assert browser.find_element("id", "scrub").accessible_name == "Frame"
    assert browser.find_element("id", "speed").accessible_name == "Speed"
    assert browser.find_element("id", "next").accessible_name == "Next frame"
    assert script(browser, "getComputedStyle(document.getElementById('picture')).imageRendering") == "pixelated"
    press(browser, keys().TAB)
    assert script(browser, "getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme, browser, show):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    show(ROUTED, 5)
    script(browser, "show(last)")
    browser.find_element("id", "show-scores").click()
    measured = browser.execute_script(CONTRAST)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert {"number", "when", "who", "text", "truth", "quiet", "keeps", "cls", "detail", "button", "kbd"} <= {name for _, name, _ in measured}
    assert measured[0][0] >= 4.5, measured[:3]
    dark = script(browser, "getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(255, 255, 255)"  # the emulation is over


@pytest.mark.parametrize("config", [ROUTED, DENSE, ModelConfig(image_size=112, grid=14)])
def test_a_phone_shows_it_without_scrolling_sideways(config, browser, show):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    show(config, 5, title="W" * 100)
    for now in range(5):
        script(browser, f"show({now})")
        assert script(browser, "[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    wide = "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 360).map((e) => e.outerHTML)"
    assert script(browser, wide) == []


def test_a_long_stream_stays_quick(browser, show):
    """The dialogue and the curves are made once; a step changes a few attributes."""
    show(ROUTED, 600)
    script(browser, "window.made = [...document.querySelectorAll('#lines li, #drawings path')]")
    took = browser.execute_script("const t = performance.now(); for (let i = 300; i < 350; i++) show(i); return performance.now() - t")
    assert took / 50 < 100, f"{took / 50} ms a step"
    same = "const still = document.querySelectorAll('#lines li, #drawings path'); return made.every((e, i) => e === still[i])"
    assert script(browser, "made.length") > 700 and browser.execute_script(same)
    press(browser, keys().END)
    assert script(browser, "[...document.querySelectorAll('#lines li')].every((line) => !line.hidden)")


def test_the_scripts_page_of_hostile_words_and_a_hostile_file_name_is_inert(tmp_path_factory, browser):
    """`stream_tiny.py --html` of a video whose name, and of questions whose words, are elements, scripts and handlers."""
    from tests.test_llm import write_checkpoint
    from tests.test_video import numbered, write
    from tests.test_vision import write_tower

    folder = tmp_path_factory.mktemp("hostile")
    attack = "<img src=x onerror='window.broken=1'><script>window.broken=2<\u2044script>"
    words = ["<s>", "</s>", "<unk>", "User", "Assistant", *WORDS]
    write_checkpoint(folder / "llm", {"model_type": "llama", "tie_word_embeddings": True}, 6, words=words)
    (folder / "vision").mkdir()
    write_tower(folder / "vision")
    run = ["--llm", str(folder / "llm"), "--vision", str(folder / "vision"), "--out", str(folder / "run"), "--frame-tokens", "1+2x2"]
    assert train_tiny.main([*run, "--steps", "0", "--lora-rank", "2", "--eval-clips", "1", "--frames", "2", "--device", "cpu"]) == 0
    video = folder / f"{attack}\"' onload=alert(1) .mkv"
    write(video, numbered(3, 32), rate=Fraction(2))
    questions = [attack, "</script><script>window.broken=3</script>", "--><svg onload=window.broken=4>", "javascript:alert(1)"]
    page = folder / "s.html"
    flags = [part for at, text in enumerate(questions) for part in ("--ask", f"{at / 4}s:{text}")]
    assert stream_tiny.main(["--checkpoint", str(folder / "run"), "--video", str(video), "--html", str(page), "--device", "cpu", *flags]) == 0
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    press(browser, keys().END)
    assert attack in browser.find_element("tag name", "h1").text and attack in browser.title
    shown = script(browser, "document.getElementById('lines').textContent")
    assert all(question in shown for question in questions)
    assert script(browser, "window.broken") is None and script(browser, "document.scripts.length") == 2
    assert script(browser, "document.querySelectorAll('[onload], [onerror], h1 *').length") == 0
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "chrome:"))} == {page.as_uri()}
