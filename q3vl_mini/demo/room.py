"""Room on the disk, which what strangers upload must not fill."""

import shutil
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse

FREE = 2**30  # bytes of the disk that stay free
FULL = "this server has no room for more files; try again later"


def has_room(folder: str | Path) -> bool:
    """Whether more may be written to the disk of a folder."""
    return shutil.disk_usage(folder).free >= FREE


class RoomForUploads:
    """The server `app`, which refuses an upload (HTTP 507), unread, while the disk of `folder` has no room."""

    def __init__(self, app: Any, folder: str | Path):
        self.app, self.folder = app, folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        app = PlainTextResponse(FULL, status_code=507) if is_upload and not has_room(self.folder) else self.app
        await app(scope, receive, send)
