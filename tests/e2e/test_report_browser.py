"""The report page in a real browser: sorting, filtering, pictures, theme, keyboard, no errors, and quick to open."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from models import made, random
from torch import nn

import sparsec
from sparsec.api import Options
from sparsec.report.page import write

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = [
    name
    for name, found in (
        ("selenium (pip install selenium)", importlib.util.find_spec("selenium")),
        ("chromium (apt-get install chromium)", CHROMIUM),
        ("chromedriver (apt-get install chromium-driver)", DRIVER),
    )
    if not found
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no browser to open the page in: {', '.join(MISSING)} missing"),
]
SITES = 200
SECONDS = 1.0  # to open a page of as many sites
ROWS = "return [...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden).map(row => "


class Mixed(nn.Module):
    """Numbered layers of two kinds, and a head that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 20), "down": nn.Linear(20, 16)}) for _ in range(SITES // 2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return self.head(x)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sparsec.compile(
        made(Mixed), [random(4, 16)], pattern="16:2:5", targets={"re:down": "2:4"}, out=folder / "net.sparsec",
        options=Options(measure_speed=False),
    )  # fmt: skip
    return write(folder / "net.sparsec")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    browser.get(page.as_uri())
    return browser


def names(browser: Chrome) -> list[str]:
    found: list[str] = browser.execute_script(f"{ROWS}row.cells[0].dataset.value)")  # type: ignore[no-untyped-call]
    return found


def column(browser: Chrome, head: str) -> list[str]:
    """The texts of the rows that are shown."""
    at = [one.text.split()[0] for one in browser.find_elements("css selector", "#table thead button")].index(head)
    found: list[str] = browser.execute_script(f"{ROWS}row.cells[{at}].textContent.trim())")  # type: ignore[no-untyped-call]
    return found


def press(browser: Chrome, head: str) -> str:
    """Click the head of a column; its order afterwards."""
    (button,) = (
        one for one in browser.find_elements("css selector", "#table thead button") if one.text.split()[0] == head
    )
    button.click()
    return str(button.find_element("xpath", "..").get_attribute("aria-sort"))


def test_heads_sort_numbers_as_numbers_up_down_and_back(opened: Chrome) -> None:
    as_made = names(opened)
    assert SITES + 1 == len(as_made)

    assert "ascending" == press(opened, "Kept")
    up = column(opened, "Kept")
    assert up[-1] == ""  # the head keeps everything: it has no score
    assert sorted(up[:-1], key=float) == up[:-1]
    assert "descending" == press(opened, "Kept")
    down = column(opened, "Kept")
    assert down[-1] == ""
    assert sorted(down[:-1], key=float, reverse=True) == down[:-1]
    assert "none" == press(opened, "Kept")
    assert as_made == names(opened)

    press(opened, "Site")
    numbers = [int(name.split(".")[1]) for name in names(opened) if name.startswith("layers")]
    assert sorted(numbers) == numbers  # 2 before 10
    press(opened, "Pattern")
    assert 1 == len(opened.find_elements("css selector", "#table [aria-sort=ascending]"))


def test_the_filter_takes_all_words_in_any_order_and_says_how_many_are_left(opened: Chrome) -> None:
    box = opened.find_element("id", "filter")

    box.send_keys("2:4 LAYERS.7")
    left = names(opened)
    assert [f"layers.{i}.down.weight" for i in (7, *range(70, 80))] == left
    assert "11 of 201 sites" == opened.find_element("id", "count").text
    box.clear()
    box.send_keys("dense")
    assert ["head.weight"] == names(opened)
    box.send_keys(" nothing of the kind")
    assert [] == names(opened)
    assert "0 of 201 sites" == opened.find_element("id", "count").text


def test_a_weight_is_chosen_by_list_buttons_and_table(opened: Chrome) -> None:
    def shown() -> tuple[str, list[str]]:
        about = opened.find_element("id", "which").text
        return about, [str(one.get_attribute("src")) for one in opened.find_elements("css selector", "#pictures img")]

    first = shown()
    assert "20 x 16; 16:2:5 = keep 2 of 5" in first[0]
    opened.find_element("id", "next").click()
    second = shown()
    assert "16 x 20; 2:4 = keep 2 of 4" in second[0]
    assert 3 == len(set(second[1]) - set(first[1]))
    opened.find_element("id", "previous").click()
    assert first == shown()
    opened.find_element("link text", "layers.0.down").click()
    assert second == shown()
    loaded = "return [...document.querySelectorAll('#pictures img')].every(one => one.complete && one.naturalWidth > 0)"
    assert opened.execute_script(loaded)  # type: ignore[no-untyped-call]


def test_the_theme_follows_the_system_until_it_is_chosen(opened: Chrome) -> None:
    def ground() -> str:
        return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))  # type: ignore[no-untyped-call]

    seen = {}
    for system in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": system}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        seen[system] = ground()
    assert seen["light"] != seen["dark"]
    button = opened.find_element("id", "theme")
    assert "Use light colours" == button.get_attribute("aria-label")
    button.click()
    assert seen["light"] == ground()
    assert "Use dark colours" == button.get_attribute("aria-label")
    button.click()
    assert seen["dark"] == ground()


def test_everything_can_be_reached_and_used_with_the_keyboard_alone(opened: Chrome) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def active() -> Any:
        return opened.switch_to.active_element

    visited: list[str] = []
    for _ in range(60):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        one = active()
        visited.append(one.get_attribute("id") or one.text.strip().split("\n")[0])
        outline = opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle")  # type: ignore[no-untyped-call]
        assert outline == "solid", visited
        if visited[-1].startswith("Kept"):
            break
    assert {"theme", "filter", "Skip to the figures"} <= set(visited)
    active().send_keys(Keys.ENTER)
    assert "ascending" == active().find_element("xpath", "..").get_attribute("aria-sort")


def test_a_narrow_window_scrolls_tables_and_not_the_page(opened: Chrome) -> None:
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        opened.refresh()
        widths = "return [document.documentElement.scrollWidth, innerWidth]"
        page_width, window = opened.execute_script(widths)  # type: ignore[no-untyped-call]
        assert page_width <= window
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_opens_within_a_second_loads_nothing_and_says_no_word_to_the_console(browser: Chrome, page: Path) -> None:
    browser.get_log("browser")  # what earlier pages said
    best = float("inf")
    for _ in range(5):
        browser.get(page.as_uri())
        timing = "const [one] = performance.getEntriesByType('navigation'); return one.loadEventEnd - one.startTime"
        best = min(best, browser.execute_script(timing) / 1000)  # type: ignore[no-untyped-call]

    assert best < SECONDS
    fetched = browser.execute_script(  # type: ignore[no-untyped-call]
        "return performance.getEntriesByType('resource').map(one => one.name).filter(one => !one.startsWith('data:'))"
    )
    assert [] == fetched
    assert [] == browser.get_log("browser")
    assert page.stat().st_size < 2_000_000
    print(f"{SITES} sites: {page.stat().st_size / 1e6:.2f} MB, open in {best:.2f} s")
