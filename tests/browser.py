"""A browser without a window for tests of pages: Debian's chromium, driven by selenium."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}
"""The programs that are needed, and the Debian packages that bring them."""
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LOCK_S = 300
"""How long to wait while another process installs something."""


class Unavailable(RuntimeError):
    """No browser can be had on this machine; the line says what is missing."""


def install() -> None:
    """Install the packages that are missing.

    Raises:
        Unavailable: this user cannot, or it failed.
    """
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Unavailable(f"no browser on this machine; as root, with Debian: apt-get install {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        command = ["apt-get", "--quiet", "--option", f"DPkg::Lock::Timeout={LOCK_S}", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"apt-get {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")


@contextlib.contextmanager
def browser() -> Iterator[Chrome]:
    """Start a browser that has never been used; what pages say on the console is kept.

    Raises:
        Unavailable: as `install`.
    """
    install()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
        try:
            yield driver
        finally:
            driver.quit()
