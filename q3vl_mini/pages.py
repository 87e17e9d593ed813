"""Pages of PDF files as pictures that are drawn when they are looked at.

`manual.pdf#page=3` is the third page: pages count from 1, as in a link (RFC 8118).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ADDRESS = re.compile(r"(?P<path>.+\.pdf)#page=(?P<number>\d+)", re.IGNORECASE)
DPI = 144  # pixels an inch: an A4 page is 1190 x 1684
MAX_PIXELS = 50_000_000  # a page of 1.2 x 1.2 metres


@dataclass(frozen=True)
class PdfPage:
    """One page of a PDF file; an image wherever an instance takes one. `number` counts from 1."""

    path: str
    number: int
    dpi: int = DPI

    def render(self) -> Image.Image:
        """The page on white. Raises ValueError if the file cannot be read or has no such page."""
        with open_pdf(self.path) as pdf:
            if not 1 <= self.number <= len(pdf):
                raise ValueError(f"{self.path} has pages 1 to {len(pdf)}, and no page {self.number}")
            try:
                page = pdf[self.number - 1]
                width, height = (points * self.dpi / 72 for points in page.get_size())
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{self} has {width:.0f} x {height:.0f} pixels at {self.dpi} dpi; lower dpi")
                return page.render(scale=self.dpi / 72).to_pil().convert("RGB")
            except RuntimeError as error:  # PdfiumError
                raise ValueError(f"cannot draw {self} ({error}); replace the file or drop its rows") from error

    def __str__(self) -> str:
        return f"{self.path}#page={self.number}"


def pdf_page(address: str, folder: str | Path = "") -> PdfPage | None:
    """The page that `file.pdf#page=3` names, its path counted from `folder`; None if it is no such address."""
    match = ADDRESS.fullmatch(address)
    return PdfPage(str(Path(folder, match["path"])), int(match["number"])) if match else None


def open_pdf(path: str | Path) -> Any:
    """A pypdfium2.PdfDocument, to be used in a `with` statement.

    Raises:
        ImportError: pypdfium2 is not installed. FileNotFoundError, ValueError: naming the file.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("pages of PDF files need pypdfium2: pip install 'q3vl-mini[pdf]'") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {str(path)!r}; check the path")
    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"cannot read {path} as a PDF ({error}); replace the file or drop its rows") from error
