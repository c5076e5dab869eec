"""A browser, and the OHIF viewer in front of Orthanc, as a hospital's web server would have it."""

from __future__ import annotations

import http.client
import mimetypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 1100, "height": 800}

CONFIG = """window.config = {
  routerBasename: null, extensions: [], modes: [], showStudyList: true,
  maxNumberOfWebWorkers: 2, disableConfirmationPrompts: true, showLoadingIndicator: true,
  showWarningMessageForCrossOrigin: false, showCPUFallbackMessage: false,
  investigationalUseDialog: { option: 'never' },
  strictZSpacingForVolumeViewport: true, defaultDataSourceName: 'orthanc',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb', sourceName: 'orthanc',
    configuration: {
      friendlyName: 'Orthanc', name: 'orthanc', wadoUriRoot: '/dicom-web', qidoRoot: '/dicom-web',
      wadoRoot: '/dicom-web', qidoSupportsIncludeField: false, supportsReject: false,
      imageRendering: 'wadors', thumbnailRendering: 'wadors', enableStudyLazyLoad: true,
      supportsFuzzyMatching: false, supportsWildcard: true, dicomUploadEnabled: false,
      bulkDataURI: { enabled: true },
    },
  }],
};"""


@contextmanager
def browser_page(chromium: Path) -> Iterator[tuple[Page, list[str]]]:
    """A page of Debian's Chromium, and what went wrong in it."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page, errors = browser.new_page(viewport=SIZE), []  # type: ignore[var-annotated]
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors
        browser.close()


@contextmanager
def ohif_site(dist: Path, orthanc_port: int, port: int) -> Iterator[str]:
    """The built site with Orthanc's DICOMweb under the same origin; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/dicom-web"):
                self._proxy()
            elif path == "/app-config.js":
                self._say(CONFIG.encode(), "text/javascript")
            else:
                file = dist / path.lstrip("/")
                file = file if path != "/" and file.is_file() else dist / "index.html"
                kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
                self._say(file.read_bytes(), kind)

        def _proxy(self) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", orthanc_port, timeout=60)
            names = ("Accept", "Accept-Language")
            headers = {name: self.headers[name] for name in names if name in self.headers}
            connection.request("GET", self.path, headers=headers)
            answer = connection.getresponse()
            self._say(answer.read(), answer.headers["Content-Type"] or "", answer.status)
            connection.close()

        def _say(self, data: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    server.shutdown()
    server.server_close()


def coloured(picture: Path, least: int = 40) -> NDArray[np.bool_]:
    """Where a screenshot is not grey, (rows, columns)."""
    channels = np.asarray(Image.open(picture).convert("RGB"), dtype=np.int16)
    spread: NDArray[np.bool_] = np.ptp(channels, axis=-1) > least
    return spread


def grey(picture: Path) -> NDArray[np.uint8]:
    """A screenshot without its colours, (rows, columns)."""
    return np.asarray(Image.open(picture).convert("L"))
