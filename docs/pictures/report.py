"""Photograph the demo's report for the README: `make demo`, then `python docs/pictures/report.py demo/report.html`.

Writes `report.png` beside this file: the first screenful of the page, in light colours, as chromium shows it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 880, 986
COLOURS = 64
"""Enough for text and flat colours, at a third of the bytes."""


def main() -> None:
    """Photograph the page that is named on the command line."""
    page = Path(sys.argv[1]).resolve()
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "report.png"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        size = [f"--window-size={WIDTH},{HEIGHT}", "--blink-settings=preferredColorScheme=1"]
        subprocess.run(
            [browser, *options, *size, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True
        )
        Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
            HERE / "report.png", optimize=True
        )


if __name__ == "__main__":
    main()
