"""Tests of the report in a browser: chromium through chromedriver."""

import os
import shutil

import pytest

from dss.reporting.collect import collect
from dss.reporting.page import write_report
from tests.reporting.fabricate import write_run

EVIL = "</script><script>document.title = 'taken'</script>"
LONG = "pneumono" * 60
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDTHS = (390, 1280)
SWEPT = [
    (method, right + examples // 100, examples, width, seed)
    for method, right in (("finetune", 60), ("step_by_step_rules", 70))
    for examples in (250, 500, 1000)
    for width in (16, 32)
    for seed in (0, 1)
]


def _missing() -> str | None:
    programs = ("chromium", "chromedriver")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return (
            f"no {' and no '.join(missing)} to show the report in; scripts/test installs them "
            "where it may: apt-get install chromium chromium-driver"
        )
    try:
        import selenium  # noqa: F401
    except ModuleNotFoundError:
        return "no selenium to drive the browser; pip install 'dss[test]'"
    return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    why = _missing()
    if why:
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the driver named, selenium looks for no other and downloads nothing.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Returns a page of 24 finished runs and a failed one, whose texts are HTML and long words."""
    folder = tmp_path_factory.mktemp("report")
    for method, right, examples, width, seed in SWEPT:
        texts = [EVIL, LONG] if seed else []
        place = {"examples": examples, "width": width, "seed": seed}
        write_run(folder / "runs", method, right, texts=texts, **place)
    write_run(folder / LONG[:200], "distill_rules", None, seed=2, outcome=f"failed: {LONG}")
    path = folder / "report.html"
    write_report(collect([str(folder)]), path, command=f"dss report {LONG}")
    return path


@pytest.fixture(params=WIDTHS)
def shown(request, browser, page):
    """Opens the page in a browser of each width; returns browser and width."""
    device = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    browser.get(page.as_uri())
    return browser, request.param


def _rows(browser) -> int:
    return len(browser.find_elements("css selector", "#rows article"))


def _click(browser, selector: str) -> None:
    """Scrolls to an element and clicks it, which fails if it is covered."""
    found = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()


def _count(browser) -> str:
    return browser.find_element("id", "count").text


def _overflowing(browser) -> list[str]:
    """Returns elements that are wider than the page and not inside a scrollable element."""
    return browser.execute_script(
        "return [...document.body.querySelectorAll('*')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll'))"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )


def test_the_page_renders_without_errors_and_fits_the_width(shown):
    browser, width = shown
    assert browser.execute_script("return innerWidth") == width
    for everything in (False, True):
        if everything:
            browser.execute_script(
                "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
            )
        assert _overflowing(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.title == "toy: dss report"
    assert "Step-by-step" in browser.find_element("css selector", "h1").text
    drawn = browser.find_elements("css selector", "figure svg")
    assert len(drawn) == 5
    assert all(figure.size["width"] > 250 and figure.size["height"] > 150 for figure in drawn)
    assert browser.get_log("browser") == []


def test_predictions_are_filtered_by_correctness_and_text(shown):
    browser, _ = shown
    assert (_count(browser), _rows(browser)) == ("100 of 100", 20)  # the best run: 80 are right
    _click(browser, "[data-verdict=wrong]")
    assert (_count(browser), _rows(browser)) == ("20 of 100", 20)
    assert {e.text for e in browser.find_elements("css selector", "dd.wrong")} == {"no · incorrect"}
    _click(browser, "[data-verdict=right]")
    assert (_count(browser), _rows(browser)) == ("80 of 100", 20)
    assert browser.find_elements("css selector", "dd.wrong") == []
    _click(browser, "#more")
    assert _rows(browser) == 40
    browser.find_element("id", "text").send_keys("is 79 ")
    assert (_count(browser), _rows(browser)) == ("1 of 100", 1)
    browser.find_element("id", "text").clear()
    worst = browser.find_elements("css selector", "#other option")[-1]
    worst.click()
    _click(browser, "[data-verdict=differ]")
    assert _count(browser) == f"{80 - 62} of 100"
    assert "other run" in browser.find_element("css selector", "#rows article").text
    assert browser.get_log("browser") == []


def test_predictions_are_shown_as_text_and_not_executed(shown):
    browser, width = shown
    options = browser.find_elements("css selector", "#run option")
    next(option for option in options if "seed 1" in option.text).click()
    assert EVIL in browser.find_element("css selector", "#rows article").text
    assert browser.title == "toy: dss report"
    assert _overflowing(browser) == [], "a word without an end"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
