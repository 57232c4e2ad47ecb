"""Pictures of the page of a run and of TensorBoard for the docs: `python -m tests.screenshots RESULT FIGURES`.

RESULT is the folder of a finished result, FIGURES that of the pictures. Needs Chromium and the extra `browser`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Browser, sync_playwright

PAGE, NARROW, TENSORBOARD = (1200, 1930), (400, 1930), (1600, 1790)  # sizes of the windows in pixels


def main(result: Path, figures: Path) -> None:
    """Writes page.png, page-narrow.png and tensorboard.png."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = (result / "report" / "report.html").resolve().as_uri()
        shoot(browser, page, PAGE, figures / "page.png", 2)
        shoot(browser, page, NARROW, figures / "page-narrow.png", 2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(result / "tensorboard"),
            "--port",
            str(port),
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}/"
            wait_for(address)
            shoot(browser, f"{address}?smoothing=0", TENSORBOARD, figures / "tensorboard.png", 12)
        finally:
            server.terminate()
        browser.close()


def shoot(browser: Browser, address: str, size: tuple[int, int], file: Path, seconds: float) -> None:
    """Opens an address, waits, and saves what is in the window."""
    tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
    tab.goto(address)
    tab.wait_for_timeout(1000 * seconds)
    tab.screenshot(path=str(file))
    tab.close()


def wait_for(address: str, seconds: float = 60) -> None:
    """Waits until a server answers. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urlopen(address).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise TimeoutError(address)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
