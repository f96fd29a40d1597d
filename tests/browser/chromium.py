"""A real headless Chromium for tests, with what it says on its console and asks of the network."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PHONE = (390, 844)
DESKTOP = (1280, 1000)


def missing() -> str | None:
    """Why there is no browser here, None when there is one."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return "chromium and chromedriver are not installed; `make test-browser` installs them"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed; it stands in requirements-dev.txt"
    return None


@contextmanager
def chromium(width: int, height: int) -> Iterator[Page]:
    """A browser window of so many CSS pixels; skips the test where there is no browser."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # A browser of its own talks to its maker now and then; these tests count what the page asks for.
    for argument in ("--disable-background-networking", "--disable-component-update", "--no-first-run"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(120)
        page = Page(driver)
        page.resize(width, height)
        yield page
    finally:
        driver.quit()


class Page:
    """What a test asks of the open page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load a page; file paths are given as `Path.as_uri()`."""
        self.driver.get(address)

    def script(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.driver.execute_script(f"return {expression}")

    def resize(self, width: int, height: int) -> None:
        """Give the window another size in CSS pixels; below 600 it is a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Set the colour scheme that the person prefers: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def console(self) -> list[str]:
        """Warnings and errors on the console so far."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for so far, data URIs left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [p["request"]["url"] for p in sent if not p["request"]["url"].startswith("data:")]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a picture of the page, all of it or the window's part."""
        options: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path.write_bytes(base64.b64decode(picture))

    def pdf(self) -> bytes:
        """The page as it would be printed on A4."""
        options = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False, "preferCSSPageSize": True}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", options)["data"])
