"""examples/browser in headless Chromium: a dropped picture, two files, class, time and bytes.

It needs playwright, Chromium and onnxruntime-web (`mpq portability --install web`).
"""

from __future__ import annotations

import functools
import http.server
import io
import os
import shutil
import threading
from pathlib import Path

import nets
import numpy as np
import pytest

import mpq
from mpq.data import Normalization
from mpq.export import float_to_onnx, foreign, runtime, to_onnx
from mpq.policy import ModelInfo, Policy
from mpq.ptq import calibrate

PAGE = Path(__file__).resolve().parents[1] / "examples" / "browser"
WEB = foreign.home() / "node" / "node_modules" / "onnxruntime-web" / "dist"
PARTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CIFAR = Normalization.parse("cifar10")
SIDE = 12
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
DROP = """async ([name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name));
    document.querySelector('#drop').dispatchEvent(
        new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the folder and says nothing."""

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with a small network's two files and the runtime beside it."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    if not WEB.is_dir():
        pytest.skip("onnxruntime-web is not installed: mpq portability --install web")
    place = tmp_path_factory.mktemp("page")
    shutil.copy(PAGE / "index.html", place)
    (place / "ort").mkdir()
    for part in PARTS:
        os.symlink(WEB / part, place / "ort" / part)
    seen = nets.images(16)
    graph = mpq.to_float(nets.build("residual"), seen)
    float_to_onnx(graph, place / "float.onnx")
    info = ModelInfo(arch="small", classes=10, input=tuple(seen.shape[1:]), normalize=str(CIFAR))
    prepared = mpq.prepare(graph, Policy(target="onnxruntime-wasm", model=info))
    calibrate(prepared, seen, method="minmax")
    to_onnx(prepared, place / "model.onnx")
    (place / "labels.txt").write_text("".join(f"name {i}\n" for i in range(10)))
    return place


@pytest.fixture(scope="module")
def address(folder: Path):
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


def picture() -> tuple[bytes, np.ndarray]:
    """A PNG of the network's size, and its pixels."""
    from PIL import Image

    pixels = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), pixels


def test_a_dropped_picture_is_classified_by_both_files(folder, address, browser):
    page, wrong = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("blob:", address)) or wrong.append(r.url))
    page.goto(address)
    page.evaluate("window.ready")
    png, pixels = picture()
    page.evaluate(DROP, ["noise.png", list(png)])
    page.get_by_text("The median of").wait_for()
    for kind, file in (("float", "float.onnx"), ("mpq", "model.onnx")):
        shown = page.locator(f"#{kind}")
        logits = runtime.run(runtime.session(folder / file), CIFAR.apply(pixels[None]))
        best = int(logits.argmax())
        assert shown.locator(".class").inner_text() == f"name {best}"
        size = (folder / file).stat().st_size
        assert shown.locator(".bytes").inner_text() == f"{size:,} bytes"
        assert float(shown.locator(".ms").inner_text().removesuffix(" ms")) > 0
        odds = np.exp(logits[0] - logits.max())
        sure = float(shown.locator(".sure").inner_text().removesuffix(" %"))
        assert sure == pytest.approx(100 / odds.sum(), abs=0.6)
    assert not page.evaluate(WIDE)
    assert wrong == []
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) != light
    if "MPQ_PICTURES" in os.environ:
        page.screenshot(path=Path(os.environ["MPQ_PICTURES"]) / "browser.png", full_page=True)
    page.close()


def test_another_file_is_dropped_and_one_that_is_none_is_told(folder, address, browser):
    page = browser.new_page()
    page.goto(address)
    page.evaluate("window.ready")
    page.evaluate(DROP, ["broken.onnx", [1, 2, 3]])
    page.get_by_text("broken.onnx:").wait_for()
    page.evaluate(DROP, ["other.onnx", list((folder / "model.onnx").read_bytes())])
    page.evaluate(DROP, ["noise.png", list(picture()[0])])
    page.get_by_text("The median of").wait_for()
    page.close()
